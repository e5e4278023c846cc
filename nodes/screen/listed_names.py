"""How files and folders are named to a screen: as in ComfyUI's lists, never by where they lie."""

from __future__ import annotations

import re
import time
from pathlib import Path

from ...lora2_core import comfy_host
from .views import Host

_REMEMBERED = 1000
_LISTED_SECONDS, _MISSING_SECONDS = 2.0, 30.0
# An absolute path that no scheme or name precedes: its folders, up to the last separator.
_START = r"(?<![\w:/\\.~-])(?:[A-Za-z]:)?[/\\](?=\S)"
_FOLDERS = re.compile(_START + r"(?:[^\s/\\:*?\"'<>|]+[/\\])+")
# The same up to the end of quotes or brackets, or to the name of a file: blanks may be in it, too.
_BLANKS = _START + r"(?:[^/\\:*?\"'<>|()\n]+[/\\])+"
_QUOTED = re.compile(_BLANKS + r"(?=[^/\\\n\"'()]*[\"')])")
_OF_A_FILE = re.compile(_BLANKS + r"(?=[^/\\:*?\"'<>|\n]{1,200}?\.(?:safetensors|sft|json|png)\b)")
_LONGEST = 10_000  # characters of a text that are looked at


def host() -> Host:
    """What lora2_core cannot know by itself."""
    return Host(_FileNames().of, clean)


def clean(text: str) -> str:
    """``text`` without folders of this machine: a path becomes its last part."""
    text = text[:_LONGEST]
    if "/" not in text and "\\" not in text:
        return text
    for folder in comfy_host.own_folders():  # they may hold blanks, which end any other path
        text = text.replace(f"{folder}/", "").replace(f"{folder}\\", "")
    for pattern in (_QUOTED, _OF_A_FILE, _FOLDERS):
        text = pattern.sub("", text)
    return text


class _FileNames:
    """Names of files in the list of LoRAs.

    A screen asks for a hundred of them several times a second, and while a training runs every
    look at a disk may wait for it: so what is known is asked for seldom, and all at once.
    """

    def __init__(self) -> None:
        self._names: dict[Path, str] = {}
        self._missing: dict[Path, float] = {}  # until when nobody looks again
        self._listed: frozenset[str] = frozenset()
        self._listed_until = 0.0

    def of(self, path: Path) -> str | None:
        """The name of a file; None where it is not there or in no loras folder."""
        now = time.monotonic()
        if self._missing.get(path, 0.0) > now:
            return None
        if now >= self._listed_until:
            self._listed = frozenset(comfy_host.lora_names())
            self._listed_until = now + _LISTED_SECONDS
        name = self._names.get(path)
        if name in self._listed or (name and path.is_file()):  # just written, not listed yet
            return name
        name = _find(path) if path.is_file() else None
        known = self._missing if name is None else self._names
        if len(known) >= _REMEMBERED:
            known.clear()
        if name is None:
            self._missing[path] = now + _MISSING_SECONDS
        else:
            self._names[path] = name
        return name


def _find(path: Path) -> str | None:
    """The shortest end of ``path`` under which a loras folder has this very file."""
    for start in range(len(path.parts) - 1, 0, -1):
        name = str(Path(*path.parts[start:]))
        try:
            if comfy_host.lora_path(name).resolve() == path.resolve():
                return name
        except comfy_host.HostError:
            continue
    return None
