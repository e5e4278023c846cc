"""All records of a run in one small file of text, to be kept where LoRAs and pictures are not.

The first line holds what many records share; every other line is a record.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ....lora2_core.files.atomic import replacing
from ....tools.tiny_sdxl.evaluation.figures import write_json

Record = dict[str, Any]
_OWN = ("subject", "method", "seed", "rate")  # settings that tell records apart
_RANKS = ("ranks", "learnt")  # of the file, and before it was cut to its size: by component
_ROUNDED = {"seconds": 2, "peak_megabytes": 1, "loss": 5, "mean_rank": 3, "megabytes": 6}


def write(folder: Path, file: Path) -> int:
    """Pack all records of a run's folder; returns how many there are."""
    records = [json.loads(one.read_text("utf-8")) for one in files(folder)]
    shared: list[Record] = []
    names = sorted({key for record in records for kind in _RANKS for key in record.get(kind, {})})
    lines = [_packed(record, shared, names) for record in records]
    text = [_json({"shared": shared, "components": names}), *map(_json, lines)]
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as out:
        out.write(("\n".join(text) + "\n").encode())
    return len(lines)


def files(folder: Path) -> list[Path]:
    """The records of a run's folder, in an order of their own."""
    return sorted((folder / "records").glob("*/*.json"))


def stem_of(method: str, seed: int, rate: float | None) -> str:
    """The name of a record and of what lies beside it; ``rate``: None without training."""
    return f"{method}-{seed}" if rate is None else f"{method}-{rate:g}-{seed}"


def file_of(folder: Path, subject: str, stem: str) -> Path:
    """Where a run's folder has the record."""
    return folder / "records" / subject / f"{stem}.json"


def read(file: Path) -> list[Record]:
    """The records as :func:`write` was given them, but for rounding."""
    head, *lines = file.read_text("utf-8").splitlines()
    about = json.loads(head)
    return [_unpacked(json.loads(line), about) for line in lines]


def unpack(file: Path, folder: Path) -> None:
    """Put the records that a run's folder lacks into it, so that it goes on behind them.

    A LoRA that a cut to be made needs is trained again: no archive holds it.
    """
    for record in read(file):
        own = record["settings"]
        stem = stem_of(own["method"], own["seed"], own["rate"])
        target = file_of(folder, own["subject"], stem)
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target, record)


def _packed(record: Record, shared: list[Record], names: Iterable[str]) -> Record:
    settings = {key: value for key, value in record["settings"].items() if key not in _OWN}
    if settings not in shared:
        shared.append(settings)
    line = {key: record["settings"][key] for key in _OWN} | {"shared": shared.index(settings)}
    line |= {key: value for key, value in record.items() if key not in ("settings", *_RANKS)}
    for key, digits in _ROUNDED.items():
        if key in line:
            line[key] = round(line[key], digits)
    for kind in (kind for kind in _RANKS if kind in record):
        line[kind] = [record[kind].get(name, 0) for name in names]
    return line


def _unpacked(line: Record, about: Record) -> Record:
    settings = about["shared"][line.pop("shared")] | {key: line.pop(key) for key in _OWN}
    record = {"settings": settings, **line}
    for kind in (kind for kind in _RANKS if kind in record):
        pairs = zip(about["components"], record[kind], strict=True)
        record[kind] = {name: rank for name, rank in pairs if rank}
    return record


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
