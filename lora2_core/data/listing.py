"""What lies in a folder of photos: which files are, what is left out and why.

Hidden files, and those that systems leave, are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..files.header import one_line
from .caption_files import ENDINGS, LIST
from .photos import DatasetError
from .pictures import kind_of

COMMON_ENDINGS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".avif",
    ".heic",
    ".jxl",
    ".tif",
    ".gif",
    ".bmp",
)
READ_ENDINGS = {
    *COMMON_ENDINGS,
    *(".apng", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".tiff", ".dib"),
    *(".avifs", ".heif", ".hif", ".heics"),
}
_RAW = {".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"}
_OTHERS = {
    *(".psd", ".psb", ".xcf", ".kra", ".clip", ".svg", ".svgz", ".eps", ".ai", ".jp2", ".j2k"),
    *(".jpf", ".jpx", ".tga", ".ico", ".exr", ".hdr", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi"),
    *(".dds", ".pcx", ".wdp", ".jxr"),
}
_SYSTEM = {"thumbs.db", "desktop.ini", "__macosx"}  # what systems leave in folders
_LISTS = {"metadata.csv", "metadata.parquet"}  # what datasets takes, too
_REPEATED = re.compile(r"([0-9]+)_.*", re.DOTALL)  # kohya's folders: 5_cat
_MOST_REPEATS = 1000
_SHOWN, _NAME = 5, 60  # names in a note, and characters of one


@dataclass(frozen=True)
class Folder:
    """What lies in a folder, or in one of its folders that are called like 5_cat."""

    path: Path
    inside: str = ""  # "5_cat/" of such a one
    repeats: int = 1
    photos: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of all files
    left_out: dict[str, list[str]] = field(default_factory=dict)  # names by reason

    def leave(self, name: str, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(self.inside + name)


def list_folders(folder: Path) -> list[Folder]:
    """The folder itself, and those of its folders whose names begin with a number and "_"."""
    top = Folder(folder)
    found = [top]
    for name in _listed(top):
        repeats = _REPEATED.fullmatch(name)
        if repeats is None:
            top.leave(name, "a folder; those called like 5_cat are read, or choose it itself")
            continue
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            top.leave(name, "a link that leads out of the folder")
            continue
        number = int(repeats[1][:9])
        if not number:
            top.leave(name, "a folder with 0 repeats")
            continue
        if number > _MOST_REPEATS:
            raise DatasetError(
                f"the folder {shown(name)} asks for {repeats[1][:20]} repeats, as kohya reads such "
                f"a name; at most {_MOST_REPEATS:,} are taken: rename it, or move it elsewhere."
            )
        part = Folder(folder / name, f"{name}/", number)
        for one in _listed(part):
            part.leave(one, "a folder in a folder")
        if not part.photos:
            part.leave("", "a folder without photos")
        found.append(part)
    return found


def _listed(part: Folder) -> list[str]:
    """Sort the files of a folder into photos and others; the names of its folders."""
    folders: list[str] = []
    try:
        paths = sorted(part.path.iterdir())
    except OSError as error:
        raise DatasetError(
            f"folder {shown(part.path.name)!r} cannot be read ({error.strerror or error}); check "
            "its permissions."
        ) from error
    for path in paths:
        name, ending = path.name, path.suffix.lower()
        if name.startswith(".") or name.lower() in _SYSTEM:
            continue
        if path.is_dir():
            folders.append(name)
            continue
        part.names.append(name)
        if ending in READ_ENDINGS:
            part.photos.append(name)
        elif ending in _RAW:
            part.leave(name, "raw pictures of a camera are not read; save them as PNG or JPEG")
        elif ending in _OTHERS:
            part.leave(name, "not read; save it as PNG")
        elif name.lower() in _LISTS or (ending == ".jsonl" and name.lower() != LIST):
            part.leave(name, f"captions of a folder are read from {LIST}")
        elif ending not in (*ENDINGS, ".jsonl", ".json") and (kind := kind_of(path)):
            part.leave(name, f"{kind} by another ending; rename it")
    return folders


def names_of(names: Iterable[str]) -> str:
    listed = list(names)
    text = ", ".join(map(shown, listed[:_SHOWN]))
    return text if len(listed) <= _SHOWN else f"{text} and {len(listed) - _SHOWN} more"


def shown(name: str) -> str:
    """A name in one line, its middle left out where it is long."""
    plain = one_line(name)
    return plain if len(plain) <= _NAME else f"{plain[: _NAME - 16]}…{plain[-15:]}"
