"""Captions as people keep them: beside a photo, or those of a folder in one file.

Names in such a file are only compared with those of the photos; nothing is opened by them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.header import one_line
from ..files.raw.regular import NotAFile, open_regular

ENDINGS = (".txt", ".caption")  # of text files, in the order in which they are read
LIST = "metadata.jsonl"  # of diffusers and datasets: a line for each picture
MOST_CAPTION = 100_000  # bytes
MOST_OF_ALL = 20_000_000  # bytes of a file that holds those of a folder
_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
_NO_TEXT = re.compile("[\0\x1b\ud800-\udfff]")  # of UTF-16 without a mark, of ISO-2022; half a sign


class CaptionError(ValueError):
    """A caption file cannot be read; the message names it, and says what to do."""


@dataclass(frozen=True)
class Table:
    """The captions of one file, by the names of the pictures as they stand in it."""

    name: str  # of the file
    captions: Mapping[str, str]
    by_stem: bool  # a name may be without its ending, and with folders before it, as kohya's are

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in self.captions.values()):
            raise CaptionError(f"{self.name} holds captions that are no text; give text alone.")

    def of(self, photos: Sequence[str]) -> tuple[dict[str, str], list[str]]:
        """Captions by photo, and the names that are of none of ``photos``.

        ``photos``: their names below the folder of the file, with "/" between folders. Raises
        CaptionError where two names of the file mean one photo and say different things.
        """
        known: dict[str, list[str]] = {}
        for photo in photos:
            whole, stem = photo.rpartition("/")[2], photo.rpartition("/")[2].rpartition(".")[0]
            for last in dict.fromkeys((whole, stem) if self.by_stem else (whole,)):
                known.setdefault(last, []).append(photo)
        found: dict[str, str] = {}
        strange: list[str] = []
        for name, text in self.captions.items():
            plain = name.replace("\\", "/").removeprefix("./")
            meant = [p for p in known.get(plain.rpartition("/")[2], ()) if self._means(plain, p)]
            depth = max(
                (photo.count("/") for photo in meant), default=0
            )  # its folders agree in most
            for photo in (p for p in meant if p.count("/") == depth):
                if found.setdefault(photo, text) != text:
                    raise CaptionError(
                        f"{self.name} gives {one_line(photo)} two captions; keep one of them."
                    )
            if not meant:
                strange.append(name)
        return found, strange

    def _means(self, name: str, photo: str) -> bool:
        if not self.by_stem:
            return name == photo
        return any(
            name == one or name.endswith("/" + one) for one in (photo, photo.rpartition(".")[0])
        )


def beside(photo: str, names: Mapping[str, Sequence[str]]) -> list[str]:
    """The text files of a photo, in the order in which they are read.

    ``names``: all of the folder, by how they are spelt in small letters.
    """
    stem = photo.rpartition(".")[0]
    wanted = [one + ending for ending in ENDINGS for one in (stem, photo)]
    found: dict[str, None] = {}
    for name in wanted:
        alike = names.get(name.lower(), ())
        found.update(dict.fromkeys(sorted(alike, key=lambda n: (n != name, n.lower() != n, n))))
    return list(found)


def read_text(path: Path) -> str:
    """A caption without the blanks around it; empty for what is no file.

    Raises CaptionError for what is too large, and for what is not UTF-8, or UTF-16 with its mark.
    """
    try:
        return _text(path, MOST_CAPTION, "which no caption has; shorten it").strip()
    except NotAFile:
        return ""


def tables_of(folder: Path, names: Sequence[str]) -> Iterator[Table | CaptionError]:
    """What the files that hold captions of several pictures say: the list first, then kohya's.

    ``names``: all files of ``folder``. A file of JSON that holds something else is passed over;
    one that cannot be read comes as the error.
    """
    lists = [name for name in sorted(names) if name.lower() == LIST]
    trees = [name for name in sorted(names) if name.lower().endswith(".json")]
    for name in [*lists, *trees]:
        try:
            table = (_list if name in lists else _tree)(folder / name)
        except NotAFile:
            continue
        except CaptionError as error:
            yield error
            continue
        if table is not None:
            yield table


def _text(path: Path, most: int, why: str) -> str:
    name = one_line(path.name)
    try:
        with open_regular(path) as file:
            data = file.read(most + 1)
    except NotAFile:
        raise
    except OSError as error:
        raise CaptionError(
            f"{name} cannot be read ({error.strerror or error}); check its permissions."
        ) from error
    if len(data) > most:
        raise CaptionError(f"{name} has more than {most:,} bytes, {why}.")
    mark, coding = next((one for one in _MARKS if data.startswith(one[0])), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(coding)
    except UnicodeDecodeError:
        text = "\0"
    if _NO_TEXT.search(text):
        raise CaptionError(
            f"{name} is not readable UTF-8 text; save it anew as UTF-8 (in Notepad: Save as, "
            "Encoding: UTF-8)."
        )
    return text


def _list(path: Path) -> Table:
    """``{"file_name": "cat.png", "text": "a cat"}`` in every line."""
    name, found = one_line(path.name), dict[str, str]()
    text = _text(path, MOST_OF_ALL, "more than is read; split the folder")
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON holds such signs
        if not line.strip():
            continue
        entry = _parsed(line)
        picture = entry.get("file_name") if isinstance(entry, dict) else None
        caption = (entry.get("text") or "") if isinstance(entry, dict) else None
        if not isinstance(picture, str) or not isinstance(caption, str) or not entry.keys() - {
            "file_name"
        }:  # fmt: skip
            raise CaptionError(
                f'{name}, line {number} is not of the form {{"file_name": "cat.png", "text": "a '
                'cat"}; correct it, or remove the line.'
            )
        if found.setdefault(picture, _caption(name, caption)) != caption.strip():
            raise CaptionError(
                f"{name}, line {number} gives {one_line(picture)} another caption than a line "
                "before; keep one of them."
            )
    return Table(name, found, by_stem=False)


def _tree(path: Path) -> Table | None:
    """``{"cat": {"caption": "a cat", "tags": "sitting"}}``; None for JSON of another kind."""
    name = one_line(path.name)
    tree = _parsed(_text(path, MOST_OF_ALL, "more than is read; move it out of the folder"))
    if tree is None:
        raise CaptionError(f"{name} is no JSON; correct it, or move it out of the folder.")
    entries = tree if isinstance(tree, dict) else {}
    said = {
        key: [value.get(part) for part in ("caption", "tags")]
        for key, value in entries.items()
        if isinstance(value, dict)
    }
    if not any(isinstance(part, str) for parts in said.values() for part in parts):
        return None
    texts = {
        key: ", ".join(part.strip() for part in parts if isinstance(part, str) and part.strip())
        for key, parts in said.items()
    }
    return Table(name, {key: _caption(name, text) for key, text in texts.items()}, by_stem=True)


def _parsed(text: str) -> Any:
    """None for what is no JSON, too."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _caption(name: str, text: str) -> str:
    if _NO_TEXT.search(text):
        raise CaptionError(f"{name} holds a caption with signs that are no text; write it anew.")
    if len(text.encode()) > MOST_CAPTION:
        raise CaptionError(
            f"{name} holds a caption of more than {MOST_CAPTION:,} bytes; shorten it."
        )
    return text.strip()
