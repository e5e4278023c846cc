"""Checkpoints of trainings that are over: limited by number and age, and cleared at once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from lora2_pack.lora2_core.jobs import checkpoints
from lora2_pack.lora2_core.jobs.checkpoints import KEPT, CheckpointFolder, Unused

DAY = 24 * 3600


def run(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fifteen checkpoints, one a day old more each."""
    for number in range(15):
        put(tmp_path, f"{run(number)}.safetensors", days=number)
    return tmp_path


def put(folder: Path, name: str, days: float = 0, nbytes: int = 100) -> Path:
    path = folder / name
    path.write_bytes(bytes(nbytes))
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_are_kept(folder: Path) -> None:
    CheckpointFolder(folder).tidy(set())
    assert left(folder) == {f"{run(number)}.safetensors" for number in range(KEPT)}


def test_old_ones_go_however_few(tmp_path: Path) -> None:
    put(tmp_path, f"{run(1)}.safetensors", days=29)
    put(tmp_path, f"{run(2)}.safetensors", days=31)
    CheckpointFolder(tmp_path).tidy(set())
    assert left(tmp_path) == {f"{run(1)}.safetensors"}


def test_what_is_in_use_stays_and_does_not_count(folder: Path) -> None:
    in_use = {run(number) for number in (0, 3, 14)}
    put(folder, f"{run(99)}.safetensors", days=400)
    made = CheckpointFolder(folder)
    assert made.measure(in_use | {run(99)}) == Unused(12, 1200)
    made.tidy(in_use)
    assert {f"{one}.safetensors" for one in in_use} <= left(folder)
    assert len(left(folder)) == KEPT + 3 and f"{run(99)}.safetensors" not in left(folder)
    made.clear(in_use)
    assert left(folder) == {f"{one}.safetensors" for one in in_use}
    assert made.measure(in_use) == Unused(0, 0)


def test_other_files_are_not_ours_to_delete(folder: Path) -> None:
    """A LoRA that found no other place, and whatever a person put there."""
    others = {put(folder, name, days=99).name for name in ("cat_00001_.safetensors", "notes.txt")}
    damaged = put(folder, f"{run(0)}.safetensors.damaged").name
    half = put(folder, f".{run(1)}.safetensors.ab12cd34").name
    made = CheckpointFolder(folder)
    made.tidy(set())
    assert others <= left(folder) and damaged in left(folder) and half not in left(folder)
    made.clear({run(0)})
    assert left(folder) == others | {f"{run(0)}.safetensors"}


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = CheckpointFolder(tmp_path / "none")
    made.tidy(set())
    made.clear(set())
    assert made.measure(set()) == Unused(0, 0)
    monkeypatch.setattr(checkpoints, "_delete", None)
    assert not (tmp_path / "none").exists()
