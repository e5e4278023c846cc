"""What goes wrong with an input from ComfyUI."""

from __future__ import annotations


class HostError(ValueError):
    """An input from ComfyUI cannot be used; the message names it and what to connect instead."""
