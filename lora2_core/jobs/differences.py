"""What a run is made of, and how it differs from one that lies unfinished under the same name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..data.cache import digest_of_each
from ..files.checkpoint import Label
from ..files.header import one_line
from ..files.metadata import LATER, deciding
from ..training.setup import TrainingSetup

_NAMED = 3  # differences that are told one by one
_CHARACTERS = 40  # of a value
_SETTINGS, _BASE, _DATA = "settings", "base", "data"
_ORDER = "order"
# What may be another one, and how to say so.
_GROUPS = {
    _BASE: "another base model",
    "photos": "other photos",
    "captions": "other captions",
    "masks": "other masks",
    "repeats": "other repeats of photos",
    "class images": "other class images",
    "text and VAE": "another CLIP or VAE",
    "sampling": "another sampling of the model",
    _ORDER: "the photos in another order",
}
# One for each photo: where photos come or go, all of these differ.
_OF_EACH = ("photos", "captions", "masks", "repeats")
# Settings that decide what class images the base model paints.
_PAINTING = ("resolution", "precision", "frozen_weights", "class_prompt", "class_images")
_OTHER_NAMES = {
    "rank mode": "mode",
    "optimizer name": "optimizer",
    "text learning_rate": "text_learning_rate",
    "text targets": "text targets",
}


def made_of(setup: TrainingSetup) -> dict[str, Any]:
    """What decides the run of ``setup``, for its checkpoint: settings as they are, all else as a
    digest of each kind. JSON."""
    captions = {"captions": digest_of_each(setup.captions)}
    digests = {**setup.data_parts, **captions, _BASE: setup.base_hash, _DATA: setup.data_hash}
    return {_SETTINGS: json.loads(json.dumps(deciding(setup.config))), **digests}


def sentence(other: Label, now: Mapping[str, Any]) -> str:
    """For people: that a run made of ``now`` is another one than the unfinished ``other``, why,
    and what becomes of that one."""
    steps = other.made_of.get(_SETTINGS, {}).get("steps")
    of = f" of {steps}" if isinstance(steps, int) else ""
    found = differences(other.made_of, now)
    if not found:
        why = "its settings, photos or model differ, and its checkpoint does not say which"
    else:
        named, more = found[:_NAMED], len(found) - _NAMED
        why = ", ".join(named) + (f", and {more} more" if more > 0 else "")
    return (
        f"This starts anew: {one_line(other.name)} lies unfinished after step {other.step}{of}, "
        f"but this is another run ({why}). The checkpoint of the unfinished one stays: queued as "
        "it was, it goes on."
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what runs differ that are made of these; empty where nothing is known of one.

    A base is told by its weights in the precision of the run: where that has changed too, whether
    it is another one cannot be told. Photos are told by a sample of their pixels; where only the
    whole of the data differs, it is photos.
    """
    settings = (made.get(_SETTINGS) for made in (before, now))
    old, new = (dict(_flat({**LATER, **found} if found else {})) for found in settings)
    changed = [name for name in new if name not in old or old[name] != new[name]] if old else []
    known = [kind for kind in (*_GROUPS, _DATA) if kind in before and kind in now]
    other = {kind for kind in known if before[kind] != now[kind]}
    if "photos" in other:
        # Then what each photo has can only be compared without regard to which.
        other -= {k for k in _OF_EACH if k in other and _anyhow(before[k]) == _anyhow(now[k])}
        if "photos" not in other and not other & {*_OF_EACH}:
            other.add(_ORDER)
    if "precision" in changed:
        other.discard(_BASE)
    explained = other - {_DATA} or any(name in _PAINTING for name in changed)
    if _DATA in other and not explained:
        other.add("photos")
    found = [words for kind, words in _GROUPS.items() if kind in other]
    return found + [f"{name} {_shown(old.get(name))} → {_shown(new[name])}" for name in changed]


def _anyhow(digest: str) -> str:
    """Of :func:`.data.cache.digest_of_each` what does not depend on the order."""
    return digest.partition("/")[2] or digest


def _flat(settings: Mapping[str, Any], part: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by the names that people know them by, in order."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, name)
        else:
            full = f"{part} {name}"
            bare = full if part.endswith("_prior") else name
            yield _OTHER_NAMES.get(full, bare), value


def _shown(value: Any) -> str:
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    text = one_line(value if isinstance(value, str) else json.dumps(value)) or "none"
    return text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 1] + "…"
