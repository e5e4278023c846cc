"""Which caption each photo of a folder has, and what is to be said of that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files.header import one_line
from .caption_files import ENDINGS, CaptionError, beside, read_text, tables_of
from .listing import Folder, names_of, shown

_Photo = tuple[str, str]  # "5_cat/" or nothing, and its name
_Said = dict[_Photo, list[tuple[str, str]]]  # of each photo, (source, caption) in order


def captions_of(
    folders: Sequence[Folder], photos: Sequence[tuple[Folder, str]]
) -> tuple[list[str], list[str]]:
    """A caption for each photo, and what is to be said of them."""
    found, used = _from_texts(folders, [(part.inside, name) for part, name in photos])
    notes, strange = _from_tables(folders, found, not all(map(_first, found.values())))
    texts = [name for part in folders for name in (part.inside + n for n in part.names)]
    lone = [n for n in texts if Path(n).suffix.lower() in ENDINGS and n not in used]
    notes += [f"Captions of no photo here: {names_of(lone)}."] if lone else []
    notes += strange
    chosen = [_first(found[part.inside, name]) for part, name in photos]
    notes += _about_choice(photos, found)
    without = [part.inside + name for (part, name), c in zip(photos, chosen, strict=True) if not c]
    if without and any(chosen):
        notes.append(f"Without a caption (they take the prompt): {names_of(without)}.")
    return chosen, notes


def _from_texts(folders: Sequence[Folder], read: Sequence[_Photo]) -> tuple[_Said, set[str]]:
    """What the texts beside each photo that is ``read`` say, and all texts that are of a photo."""
    found: _Said = {photo: [] for photo in read}
    used = set[str]()
    for part in folders:
        by_small: dict[str, list[str]] = {}
        for name in part.names:
            by_small.setdefault(name.lower(), []).append(name)
        for name in part.photos:
            said = found.get((part.inside, name))
            for text in beside(name, by_small):
                used.add(part.inside + text)
                if said is None:
                    continue
                try:
                    # The first that says something is read; what others hold need not be text.
                    caption = "" if _first(said) else read_text(part.path / text)
                except CaptionError as error:
                    raise CaptionError(f"{one_line(part.inside)}{error}") from error
                said.append((text, caption))
    return found, used


def _from_tables(
    folders: Sequence[Folder], found: _Said, needed: bool
) -> tuple[list[str], list[str]]:
    """Add to ``found`` what files of several captions say; what is left out, and names of none."""
    notes: list[str] = []
    strange: list[str] = []
    # Those of a photo's own folder come before those of the folder around it.
    for part in reversed(folders):
        within = {
            (inside + name)[len(part.inside) :]: (inside, name)
            for inside, name in found
            if inside.startswith(part.inside)
        }
        for table in tables_of(part.path, part.names):
            try:
                if isinstance(table, CaptionError):
                    raise table
                captions, none = table.of(list(within))
            except CaptionError as error:
                if needed:
                    raise CaptionError(f"{one_line(part.inside)}{error}") from error
                notes.append(f"Left out: {one_line(part.inside)}{error}")
                continue
            for photo, caption in captions.items():
                found[within[photo]].append((table.name, caption))
            if none:
                strange.append(
                    f"{one_line(part.inside)}{table.name} names pictures that are not here: "
                    f"{names_of(none)}."
                )
    return notes, strange


def _first(said: Sequence[tuple[str, str]]) -> str:
    return next((caption for _, caption in said if caption), "")


def _about_choice(photos: Sequence[tuple[Folder, str]], found: _Said) -> list[str]:
    """Which is read where a photo has captions in several places."""
    several: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for part, name in photos:
        said = found[part.inside, name]
        read = next((source for source, caption in said if caption), "")
        others = tuple(_kind(name, source) for source, _ in said if source != read)
        if read and others:
            several.setdefault((_kind(name, read), others), []).append(part.inside + name)
    return [
        f"Captions of {names_of(names)}: {read} is read, not {' or '.join(others)}."
        for (read, others), names in several.items()
    ]


def _kind(photo: str, source: str) -> str:
    """``.txt`` for cat.txt beside cat.png; the name of a file that holds several."""
    stem = photo.rpartition(".")[0]
    if source.lower().startswith(stem.lower() + ".") and source.lower().endswith(ENDINGS):
        return source[len(stem) :]
    return shown(source)
