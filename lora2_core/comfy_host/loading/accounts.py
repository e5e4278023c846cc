"""Which weight each tensor of a file changes: none twice, and none without a word left out.

ComfyUI keeps one patch a weight of a file; of a second one it says nothing.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...files.header import shown_key, shown_keys
from ...files.keys import ParsedKeys, counted

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Change:
    """What one component does to one weight."""

    weight: Any  # the key in the model, or of a part of it
    keys: tuple[str, ...]  # in the file


def changes_of(
    parsed: ParsedKeys, names: Mapping[str, Any], present: Container[str]
) -> Iterator[Change]:
    """All that a file changes of the layers in ``names``, by those of its keys that count."""
    for name, of_bias, keys in parsed.changes():
        if name in names and all(key in present for key in keys):
            weight = names[name]
            yield Change(f"{str(weight)[: -len(_WEIGHT)]}.bias" if of_bias else weight, keys)


def changed_twice(parsed: ParsedKeys, names: Mapping[str, Any], present: Container[str]) -> str:
    """For a person: a weight that a file changes in two ways; empty where there is none."""
    seen: dict[Any, str] = {}
    for change in changes_of(parsed, names, present):
        other = seen.setdefault(change.weight, change.keys[0])
        if other != change.keys[0]:
            weight = change.weight if isinstance(change.weight, str) else change.weight[0]
            return f"{weight} twice ({shown_key(other)} and {shown_key(change.keys[0])})"
    return ""


def left_out(
    parsed: ParsedKeys,
    names: Mapping[str, Any],
    present: Container[str],
    patches: Container[Any],
    source: str,
) -> str:
    """For a person: what changes nothing, though the model has the layer; empty without that."""
    keys = [
        key
        for change in changes_of(parsed, names, present)
        if change.weight not in patches
        for key in change.keys
    ]
    if not keys:
        return ""
    have = "has no place" if len(keys) == 1 else "have no place"
    return (
        f"{source}: {counted(len(keys), 'tensor')} that {have} in the model left out: "
        f"{shown_keys(keys)}."
    )
