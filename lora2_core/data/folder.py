"""A folder of photos as people keep them, with their captions and masks.

Every picture is either read or named with the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .caption_files import CaptionError
from .folder_captions import captions_of
from .formats.kinds import NoDecoderError
from .listing import COMMON_ENDINGS, Folder, list_folders, names_of, shown
from .photos import DatasetError, to_tensor
from .pictures import PictureError, decode, goes_on, open_picture

_STRIP = 256  # rows that are worked on at once


@dataclass(frozen=True)
class FolderPhotos:
    """What a folder holds for training; the sequences are as long as each other."""

    images: Sequence[Tensor]  # (1, height, width, 3) each, fp32, 0 to 1
    captions: Sequence[str]
    masks: Sequence[Tensor]  # (1, height, width) each
    repeats: Sequence[int]  # how often each is given, with no divisor that all have
    notes: Sequence[str] = ()  # sentences for whoever trains on it

    def __post_init__(self) -> None:
        if len({len(self.images), len(self.captions), len(self.masks), len(self.repeats)}) != 1:
            raise DatasetError(
                "images, captions, masks and repeats differ in number; give one each."
            )

    def lists(self) -> tuple[list[Tensor], list[str], list[Tensor]]:
        """Images, captions and masks, each as often as it repeats: the same tensor again."""
        numbers = [n for n, repeats in enumerate(self.repeats) for _ in range(repeats)]
        return (
            [self.images[n] for n in numbers],
            [self.captions[n] for n in numbers],
            [self.masks[n] for n in numbers],
        )


def load_folder(folder: Path) -> FolderPhotos:
    """The photos of a folder, in the order of their names, those of folders like ``5_cat`` last.

    A mask is how opaque an image is; transparent parts of it are white. A photo of more than 32
    megapixels comes out at so many. A caption is the first of these that is there and not empty:
    ``cat.txt``, ``cat.png.txt``, ``cat.caption``, ``cat.png.caption``, a line of
    ``metadata.jsonl``, kohya's JSON. Raises DatasetError for a folder without images, for a file
    that is no image, wholly transparent, or beyond the limits of :mod:`.limits`, and for captions
    that cannot be read.
    """
    folders = list_folders(folder)
    read = [one for part in folders for one in _read_photos(part)]
    reasons = _reasons(folders)
    if not read:
        kinds = ", ".join(suffix.lstrip(".") for suffix in COMMON_ENDINGS)
        why = f" Left out: {'; '.join(reasons)}." if reasons else ""
        raise DatasetError(
            f"folder {shown(folder.name)!r} holds no image; put {kinds} files into it.{why}"
        )
    photos = [(one.folder, one.name) for one in read]
    try:
        captions, said = captions_of(folders, photos)
    except CaptionError as error:
        raise DatasetError(str(error)) from error
    divisor = math.gcd(*(one.folder.repeats for one in read))
    notes = [f"Left out: {reason}." for reason in reasons]
    if longer := [one.folder.inside + one.name for one in read if one.goes_on]:
        notes.append(f"Of {names_of(longer)} the first picture alone is read.")
    return FolderPhotos(
        [one.pixels[None] for one in read],
        captions,
        [one.mask[None] for one in read],
        [one.folder.repeats // divisor for one in read],
        [*notes, *_about_repeats(read), *said],
    )


@dataclass(frozen=True)
class _Read:
    """One photo of a folder."""

    folder: Folder
    name: str
    pixels: Tensor  # (height, width, 3) on white
    mask: Tensor  # (height, width), how opaque they are
    goes_on: bool  # whether its file holds more pictures


def watched_files(folder: Path) -> list[Path]:
    """All that :func:`load_folder` looks at, to tell whether any of it has changed."""
    return [path for part in list_folders(folder) for path in sorted(part.path.iterdir())]


def _read_photos(part: Folder) -> Iterator[_Read]:
    for name in part.photos:
        try:
            yield _read_image(part, name)
        except NoDecoderError as error:
            part.leave(name, f"{error.kind}: {error.get}")
        except PictureError as error:
            raise DatasetError(f"{shown(part.inside + name)} {error}.") from error


def _reasons(folders: Sequence[Folder]) -> list[str]:
    """What is left out, by why."""
    left_out: dict[str, list[str]] = {}
    for part in folders:
        for reason, names in part.left_out.items():
            left_out.setdefault(reason, []).extend(names)
    return [f"{names_of(names)} ({reason})" for reason, names in left_out.items()]


def _read_image(part: Folder, name: str) -> _Read:
    path = part.path / name
    picture = open_picture(path)
    longer = goes_on(path, picture)
    image = decode(picture)
    width, height = image.size
    pixels, mask = torch.empty(height, width, 3), torch.ones(height, width)
    # In strips, so that nothing of a photo's size is in memory beside it and what comes out.
    for top in range(0, height, _STRIP):
        bottom = min(top + _STRIP, height)
        strip = image.crop((0, top, width, bottom))
        if strip.mode == "RGBA":
            mask[top:bottom] = to_tensor(strip.getchannel("A"))
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        pixels[top:bottom] = to_tensor(strip.convert("RGB"))
    if not mask.any():
        raise PictureError("is transparent everywhere; remove it")
    return _Read(part, name, pixels, mask, longer)


def _about_repeats(read: Sequence[_Read]) -> list[str]:
    if not any(one.folder.inside for one in read):
        return []
    photos = Counter((one.folder.inside.rstrip("/"), one.folder.repeats) for one in read)
    told = ", ".join(
        f"{shown(name) or 'the folder itself'} {repeats} ({count} photo{'s' * (count > 1)})"
        for (name, repeats), count in photos.items()
    )
    alike = len({repeats for _, repeats in photos}) == 1
    end = "; all alike, so each photo comes once" if alike else ""
    return [f"Repeats: {told}{end}."]
