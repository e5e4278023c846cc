"""Everything a LoRA file says of itself, from its header alone; its tensors only on request."""

from __future__ import annotations

import base64
import binascii
import functools
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.pictures import PictureError, decode, open_picture
from ..files.header import (
    Header,
    LoRAFileError,
    one_line,
    read_header,
    shown_key,
    shown_keys,
)
from ..files.keys import counted
from ..files.kohya_names import changed_twice
from ..files.metadata import (
    STRENGTH,
    headline,
    is_ours,
    newer_version,
    scales_by_root,
    understood_metadata,
)
from ..files.model_family import Family, guess_family
from ..files.read import (
    Beside,
    ComponentInfo,
    alphas_of,
    beside_components,
    inspect_header,
)
from ..resizing.measure import Measured, measure_file, strongest
from .canvas import fitted
from .rank_map import MARGIN, WIDTH
from .report import rank_picture
from .summary import fit_middle, rank_table, summarize

_TAGS = 8
_NAMES = 4  # of what lies beside the components
_CORNER, _TOP = 64, 24  # px: side of a thumbnail in the rank map, and where it starts
_LINE = 200  # characters of a value that are shown
_LARGEST_THUMBNAIL = 1_000_000  # characters of its data URI
_LARGEST_PICTURE = 4096 * 4096  # pixels
_SHOWN_KINDS = ("PNG", "JPEG", "WebP")  # that every page shows
_KEPT_PICTURE = 512 * 512  # pixels of one that was decoded
_REMEMBERED = 8  # pictures of files that were looked at lately
_THUMBNAIL = re.compile(r"data:image/(?:png|jpeg|webp);base64,([A-Za-z0-9+/=\s]{16,})")
_SETTINGS = {
    "mode": "lora2.mode", "steps": "ss_steps", "learning rate": "ss_learning_rate",
    "optimizer": "ss_optimizer", "schedule": "ss_lr_scheduler", "batch": "ss_total_batch_size",
    "resolution": "ss_resolution", "precision": "ss_mixed_precision", "seed": "ss_seed",
    "photos": "ss_num_train_images", "trainer": "ss_network_module",
}  # fmt: skip
_HASHES = {"sha-256 of the weights": "sshs_model_hash", "kohya's short hash": "sshs_legacy_hash"}
_DIGEST = re.compile(r"[0-9a-fA-F]{8,64}")
_BASES = ("ss_sd_model_name", "lora2.base_model_hash", "ss_new_sd_model_hash", "ss_sd_model_hash")


@dataclass(frozen=True)
class FileReport:
    """One LoRA."""

    name: str
    nbytes: int
    components: tuple[ComponentInfo, ...]
    metadata: Mapping[str, str]
    family: Family  # of the models that it was made for
    measured: Measured | None = None
    told_alphas: tuple[float, ...] = ()  # the different ones that stand in the metadata alone
    beside: tuple[Beside, ...] = ()  # what no component has a place for
    damage: str = ""  # why no loader should take it, though it can be shown

    @property
    def trigger(self) -> str:
        return self.metadata.get("modelspec.trigger_phrase", "")

    @property
    def tags(self) -> list[str]:
        """The words that stood in most captions, if the trainer noted them."""
        return most_frequent_tags(self.metadata)

    @property
    def kinds(self) -> dict[str, int]:
        return dict(Counter(component.kind for component in self.components))

    @property
    def hashes(self) -> dict[str, str]:
        """Those that the file tells of itself, by their key; what is no hash is left out."""
        told = {key: self.metadata.get(key, "") for key in _HASHES.values()}
        return {key: text for key, text in told.items() if _DIGEST.fullmatch(text)}

    @property
    def alpha(self) -> str:
        """What the header tells of it; the numbers themselves are tensors."""
        if is_ours(self.metadata):
            told = "1 in every component, so that strength 1 is as "
            kept = _strength(self.metadata.get(STRENGTH, ""))
            if kept is None:
                return f"{told}trained"
            return f"{told}saved: {kept:g} of what was trained, all of which {1 / kept:.2f} is"
        if self.told_alphas:
            each = ", ".join(f"{alpha:.4g}" for alpha in self.told_alphas)
            if scales_by_root(self.metadata):
                return f"counts as {each}, by use_rslora over √rank (lora_adapter_metadata)"
            return f"{each} (lora_adapter_metadata)"
        return self.metadata.get("ss_network_alpha", "")

    def thumbnail(self) -> Thumbnail | None:
        """The picture in the file; None where there is none that can be shown."""
        return decoded(self.metadata.get("modelspec.thumbnail", ""))

    def picture(self) -> Image.Image:
        """The rank map, and in its corner the picture that the file holds."""
        title, line = Path(self.name).stem, headline(self.metadata)
        found = self.thumbnail()
        if found is None:
            return rank_picture(self.components, title, line)
        small = found.picture.copy()
        small.thumbnail((_CORNER, _CORNER), Image.Resampling.LANCZOS)
        room = WIDTH - 2 * MARGIN - _CORNER - 16  # what is written ends before the picture
        title, line = fitted(title, 26, room), fitted(line, 14, room)
        picture = rank_picture(self.components, title, line)
        picture.paste(small, (picture.width - MARGIN - small.width, _TOP))
        return picture

    def text(self) -> str:
        """All of it as lines of monospaced text."""
        facts = [f"{name:<12} {_one_line(text)}" for name, text in self._facts() if text]
        table = rank_table(self.components)
        name = _one_line(self.name)
        return "\n".join([name, "=" * min(len(name), 100), *facts, "", table]) + (self._strengths())

    def as_dict(self) -> dict[str, Any]:
        """All of it for scripts."""
        return {
            "name": self.name,
            "bytes": self.nbytes,
            "base": {**asdict(self.family), "text": self.family.text},
            "trigger": self.trigger,
            "tags": self.tags,
            "kinds": self.kinds,
            "beside": [asdict(one) for one in self.beside],
            "damage": self.damage,
            "alpha": self.alpha,
            "hashes": self.hashes,
            "summary": asdict(summarize(self.components)),
            "components": [asdict(component) for component in self.components],
            "metadata": dict(self.metadata),
            "measured": None if self.measured is None else asdict(self.measured),
        }

    def _facts(self) -> list[tuple[str, str]]:
        known = understood_metadata(self.metadata)
        settings = [f"{n} {known[k]}" for n, k in _SETTINGS.items() if known.get(k)]
        hashes = [f"{self.hashes[key]} ({name})" for name, key in _HASHES.items()
                  if key in self.hashes]  # fmt: skip
        base = [self.family.text, *(known.get(key, "") for key in _BASES)]
        kinds = ", ".join(self._kind_texts())
        newer = newer_version(self.metadata)
        told = f"LoRA² {newer}, newer than this pack knows; read as a plain LoRA"
        return [
            ("Damaged", self.damage),
            ("Format", told if newer else ""),
            ("File", f"{self.nbytes / 1e6:,.2f} MB, {kinds}"),
            *(("Beside", text) for text in self._beside_lines()),
            ("Trigger", self.trigger),
            ("Tags", ", ".join(self.tags)),
            ("Base", " · ".join(filter(None, base))),
            ("Training", ", ".join(settings)),
            ("Alpha", self.alpha),
            ("Thumbnail", self._about_thumbnail()),
            *(("Hash", text) for text in hashes),
        ]

    def _kind_texts(self) -> list[str]:
        """Kinds and their numbers; of several also their share of the file."""
        sizes = Counter[str]()
        for component in self.components:
            sizes[component.kind] += component.nbytes
        alone = len(self.kinds) == 1
        return [
            f"{count} {kind}" + ("" if alone else f" ({self._share(sizes[kind])})")
            for kind, count in self.kinds.items()
        ]

    def _beside_lines(self) -> list[str]:
        """What lies beside the components, a line each kind."""
        lines = []
        for kind in dict.fromkeys(one.kind for one in self.beside):
            some = [one for one in self.beside if one.kind == kind]
            listed = shown_keys([one.name for one in some if one.name], _NAMES)
            tensors, nbytes = sum(o.tensors for o in some), sum(o.nbytes for o in some)
            lines.append(
                counted(len(some), kind) + (f": {listed}" if listed else "")
                + ("" if kind == "unknown" else f"; {counted(tensors, 'tensor')}")
                + f", {nbytes / 1e3:,.1f} kB, {self._share(nbytes)} of the file"
            )  # fmt: skip
        return lines

    def _share(self, nbytes: int) -> str:
        return f"{100 * nbytes / self.nbytes:.1f} %"

    def _about_thumbnail(self) -> str:
        if not self.metadata.get("modelspec.thumbnail"):
            return ""
        picture = self.thumbnail()
        if picture is not None:
            return f"{picture.width}×{picture.height} px"
        return (
            "ignored: it is no PNG, JPEG or WebP picture of at most "
            f"{_LARGEST_THUMBNAIL:,} characters that can be shown"
        )

    def _strengths(self) -> str:
        if self.measured is None:
            return ""
        missing = [self.measured.not_measured] if self.measured.not_measured else []
        if not self.measured.components:
            return "\n".join(["", *missing]) + "\n"
        if not self.measured.norm:
            return (
                "\n".join(["", *missing, "Norm of the update 0: its factors change nothing."])
                + "\n"
            )
        lines = [
            "",
            *missing,
            f"Norm of the update {self.measured.norm:.4g}; it {self.measured.could_be_cut}.",
            "",
            f"{'norm':>10}{'energy':>9}{'rank':>7}{'90 %':>7}  strongest components",
        ]
        lines += [
            f"{one.norm:>10.4g}{100 * one.share:>8.2f}%{one.rank:>7}{one.effective_rank:>7}  "
            f"{fit_middle(one.key, 64)}"
            for one in strongest(self.measured.components)
        ]
        return "\n".join(lines) + "\n"


def inspect(path: Path, with_tensors: bool = False, name: str = "") -> FileReport:
    """Look inside a LoRA file: its header, and on request its tensors.

    Raises LoRAFileError for what cannot be read or is no LoRA.
    """
    header = read_header(path)
    components, metadata = inspect_header(header)
    return FileReport(
        name or path.name,
        header.file_bytes,
        tuple(components),
        metadata,
        # The difference of a bias may have the key of factors, and tells no width.
        guess_family({c.key: c.in_features for c in reversed(components)}, metadata),
        measure_file(path) if with_tensors else None,
        _told_alphas(header),
        beside_components(header),
        _damage(header),
    )


def _damage(header: Header) -> str:
    """What the header says against itself, for a person."""
    found = []
    if twice := changed_twice(header.parsed):
        found.append(f"it changes a layer twice ({' and '.join(map(shown_key, twice))})")
    try:
        alphas_of(header)
    except LoRAFileError as error:
        found.append(str(error).removeprefix(one_line(f"{header.path} ")).rstrip("."))
    return "; ".join(found)


def _told_alphas(header: Header) -> tuple[float, ...]:
    try:
        return tuple(sorted(set(alphas_of(header).values())))
    except LoRAFileError:  # as :func:`_damage` says
        return ()


def most_frequent_tags(metadata: Mapping[str, str]) -> list[str]:
    """Of kohya's ``ss_tag_frequency``; empty where it is missing or of another form."""
    try:
        counts: Counter[str] = Counter()
        for folder in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            counts.update({str(tag): int(count) for tag, count in folder.items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return []
    return [_one_line(tag) for tag, _ in counts.most_common(_TAGS)]


@dataclass(frozen=True)
class Thumbnail:
    """A picture that came in a file."""

    width: int  # px, as it is there
    height: int
    picture: Image.Image  # RGB, of at most 512² px; not to be changed


@functools.lru_cache(maxsize=_REMEMBERED)
def decoded(uri: str) -> Thumbnail | None:
    """The picture of a data URI that a stranger wrote; None for what is none, or too large.

    Decoded once, however often a node, a page and a picture of ranks ask.
    """
    match = _THUMBNAIL.fullmatch(uri) if len(uri) <= _LARGEST_THUMBNAIL else None
    if match is None:
        return None
    try:
        data = base64.b64decode("".join(match[1].split()), validate=True)
        opened = open_picture(io.BytesIO(data), _LARGEST_PICTURE, _SHOWN_KINDS)
        width, height = opened.size
        return Thumbnail(width, height, decode(opened, _KEPT_PICTURE).convert("RGB"))
    except (PictureError, binascii.Error):
        return None


def side_by_side(reports: Sequence[FileReport]) -> str:
    """The key figures of several files as one table."""
    width = max([4, *(len(one.name) for one in reports)])
    width = min(width, 48)
    head = f"{'file':<{width}}{'MB':>10}{'components':>12}{'mean rank':>11}{'highest':>9}"
    lines = [head]
    for one in reports:
        figures = summarize(one.components)
        name = fit_middle(one.name, width)
        ranks = f"{figures.rank_mean:>11.1f}{figures.rank_max:>9}"
        if figures.unranked == figures.count:
            ranks = f"{'-':>11}{'-':>9}"
        lines.append(f"{name:<{width}}{one.nbytes / 1e6:>10,.2f}{figures.count:>12}{ranks}")
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:_LINE]).strip()


def _strength(text: str) -> float | None:
    """What a file says of the strength at which it was saved; None where it is all or no number."""
    try:
        number = float(text[:20])
    except ValueError:
        return None
    return number if 0 < number < 1 else None
