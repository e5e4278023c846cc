"""Captions as people keep them: beside a photo, or those of a folder in one file.

Names in such a file are only compared with those of the photos; nothing is opened by them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.header import one_line
from ..files.raw.regular import NotAFile, open_regular

ENDINGS = (".txt", ".caption")  # of text files, in the order in which they are read
LIST = "metadata.jsonl"  # of diffusers and datasets: a line for each picture
MOST_CAPTION = 100_000  # bytes
_NUMBERS = 5  # of lines in a note
_PLURAL = {"line": "lines", "entry": "entries"}
MOST_OF_ALL = 20_000_000  # bytes of a file that holds those of a folder
_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
_TEXTS = ("text", "caption", "prompt")  # what a line of a list may call a caption, in this order
# Signs that steer a device: of UTF-16 without a mark, of ISO-2022; and half a sign.
_NO_TEXT = re.compile("[\0-\x08\x0b\x0e-\x1f\ud800-\udfff]")


class CaptionError(ValueError):
    """A caption file cannot be read; the message names it, and says what to do."""


@dataclass(frozen=True)
class Table:
    """The captions of one file, by the names of the pictures as they stand in it."""

    name: str  # of the file
    captions: Mapping[str, str]
    by_stem: bool  # a name may be without its ending, and with folders before it, as kohya's are
    # It holds captions, even if they are of other photos; else only those of photos are looked at.
    certain: bool = True
    without: str = ""  # which of its lines have no text

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in self.captions.values()):
            raise CaptionError(f"{self.name} holds captions that are no text; give text alone.")

    def of(self, photos: Sequence[str]) -> tuple[dict[str, str], list[str]]:
        """Captions by photo, and the names that are of none of ``photos``.

        ``photos``: their names below the folder of the file, with "/" between folders. Raises
        CaptionError where two names of the file mean one photo and say different things, and for
        what is no caption.
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
            if meant and not self.certain:
                _caption(self.name, text)
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


@dataclass(frozen=True)
class Unread:
    """A file of JSON that holds no captions, or in a form of its own."""

    name: str

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name is empty; give that of the file.")


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


def tables_of(folder: Path, names: Sequence[str]) -> Iterator[Table | CaptionError | Unread]:
    """What the files that hold captions of several pictures say: the list first, then JSON.

    ``names``: all files of ``folder``. One that cannot be read comes as the error.
    """
    lists = [name for name in sorted(names) if name.lower() == LIST]
    trees = [name for name in sorted(names) if name.lower().endswith(".json")]
    for name in [*lists, *trees]:
        try:
            yield (_lines if name in lists else _tree)(folder / name) or Unread(name)
        except NotAFile:
            continue
        except CaptionError as error:
            yield error


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


def _lines(path: Path) -> Table:
    """``{"file_name": "cat.png", "text": "a cat"}`` in every line."""
    text = _text(path, MOST_OF_ALL, "more than is read; split the folder")
    lines = enumerate(text.split("\n"), 1)  # not splitlines: JSON holds such signs
    entries = ((number, _parsed(line)) for number, line in lines if line.strip())
    return _list(one_line(path.name), "line", entries)


def _list(name: str, what: str, entries: Iterable[tuple[int, Any]]) -> Table:
    """``what`` is numbered: a line, or an entry."""
    found, without = dict[str, str](), list[int]()
    for number, entry in entries:
        picture = entry.get("file_name") if isinstance(entry, dict) else None
        texts = [entry[key] for key in _TEXTS if entry.get(key) is not None] if picture else []
        if not isinstance(picture, str) or not all(isinstance(text, str) for text in texts):
            raise CaptionError(
                f'{name}, {what} {number} is not of the form {{"file_name": "cat.png", "text": "a '
                f'cat"}}; correct it, or remove the {what}.'
            )
        if not texts:
            without.append(number)
            continue
        caption = _caption(name, next((text for text in texts if text.strip()), ""))
        if found.setdefault(picture, caption) != caption:
            raise CaptionError(
                f"{name}, {what} {number} gives {one_line(picture)} another caption than a {what} "
                "before; keep one of them."
            )
    return Table(name, found, by_stem=False, without=_numbered(what, without))


def _numbered(what: str, numbers: Sequence[int]) -> str:
    """``lines 2, 3 and 4 more``; nothing for none."""
    told = ", ".join(map(str, numbers[:_NUMBERS]))
    more = f" and {len(numbers) - _NUMBERS} more" if len(numbers) > _NUMBERS else ""
    return f"{what if len(numbers) == 1 else _PLURAL[what]} {told}{more}" if numbers else ""


def _tree(path: Path) -> Table | None:
    """JSON in one of three forms; None for another kind.

    kohya's ``{"cat": {"caption": "a cat", "tags": "sitting"}}``, a plain ``{"cat": "a cat"}``, and
    a list of what lines of the list are.
    """
    name = one_line(path.name)
    tree = _parsed(_text(path, MOST_OF_ALL, "more than is read; move it out of the folder"))
    if tree is None:
        raise CaptionError(f"{name} is no JSON; correct it, or move it out of the folder.")
    if isinstance(tree, list) and any(isinstance(e, dict) and "file_name" in e for e in tree):
        return _list(name, "entry", enumerate(tree, 1))
    entries = tree if isinstance(tree, dict) else {}
    said = {key: _said(value) for key, value in entries.items()}
    if not any(parts is not None for parts in said.values()):
        return None
    certain = any(said[key] and isinstance(value, dict) for key, value in entries.items())
    texts = {
        key: ", ".join(filter(None, map(str.strip, parts or ()))) for key, parts in said.items()
    }
    if certain:
        texts = {key: _caption(name, text) for key, text in texts.items()}
    return Table(name, texts, by_stem=True, certain=certain)


def _said(entry: Any) -> list[str] | None:
    """Caption and tags of an entry of kohya's, or a text alone; None where there is neither."""
    if isinstance(entry, str):
        return [entry]
    parts = [entry.get(part) for part in ("caption", "tags")] if isinstance(entry, dict) else []
    if parts and isinstance(parts[1], list) and all(isinstance(tag, str) for tag in parts[1]):
        parts[1:] = parts[1]
    texts = [part for part in parts if isinstance(part, str)]
    return texts or None


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
