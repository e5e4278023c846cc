"""Outputs that are not there yet."""

from __future__ import annotations

from typing import Any

from comfy_execution.graph_utils import ExecutionBlocker


def blocked() -> Any:
    """An output of a node that has nothing to give: what depends on it is left out, silently."""
    return ExecutionBlocker(None)
