"""Folders of small photos with files of captions."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image


def folder(root: Path, *photos: str, **texts: str | bytes) -> Path:
    """Photos of 8 px, and files whose names have a dash for each dot."""
    for name in photos:
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name, "PNG")
    for name, text in texts.items():
        data = text if isinstance(text, bytes) else text.encode()
        (root / name.replace("__", ".")).write_bytes(data)
    return root


def lines(*entries: dict | str) -> str:
    return "\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries)
