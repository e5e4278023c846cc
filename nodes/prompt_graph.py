"""The part of a prompt that one node depends on, to be kept and sent again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BASES = ("ckpt_name", "unet_name")  # what ComfyUI's loaders call the file of a model


def needed_by(prompt: Mapping[str, Any], node_id: str) -> dict[str, Any] | None:
    """``node_id`` and all that it depends on, in API format; None where it is not in ``prompt``.

    That is so in a prompt that another node has expanded. Only what a client sends is kept:
    ComfyUI notes in a running prompt what it found out, and would believe it the next time.
    """
    if node_id not in prompt:
        return None
    found: dict[str, Any] = {}
    left = [node_id]
    while left:
        name = left.pop()
        if name in found or name not in prompt:
            continue
        node = prompt[name]
        found[name] = {key: node[key] for key in ("class_type", "inputs", "_meta") if key in node}
        left += _links(node)
    return {name: found[name] for name in prompt if name in found}


def base_of(prompt: Mapping[str, Any], node_id: str) -> str:
    """The file of the model that comes in as ``model``; empty where no loader tells."""
    seen: set[str] = set()
    name, socket = node_id, "model"
    while name in prompt and name not in seen:
        seen.add(name)
        inputs = prompt[name].get("inputs", {})
        for base in _BASES:
            if isinstance(inputs.get(base), str):
                return inputs[base]
        link = inputs.get(socket)
        if not _is_link(link):
            return ""
        name = link[0]
    return ""


def _links(node: Mapping[str, Any]) -> list[str]:
    return [value[0] for value in node.get("inputs", {}).values() if _is_link(value)]


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
