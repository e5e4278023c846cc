"""All that speaks to ComfyUI's server."""

from __future__ import annotations

from server import PromptServer


def show_text(node_id: str, text: str) -> None:
    """Show ``text`` inside a node while it runs."""
    PromptServer.instance.send_progress_text(text, node_id)
