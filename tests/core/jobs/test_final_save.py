"""The last save: what cannot be written is kept, and nothing that is there is replaced."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.config.train import TrainConfig
from lora2_pack.lora2_core.jobs.job import TrainingJob
from lora2_pack.lora2_core.training.trainer import TrainingError
from lora2_pack.tests.core import toy, toy_job
from lora2_pack.tests.core.toy_job import at_draw, config, finish

NAME = "cat_00001_.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a run without any accident."""
    return finish(toy_job.job(tmp_path_factory.mktemp("whole") / NAME, config())).path.read_bytes()


def _no_step() -> None:
    raise AssertionError("a step is done again")


# --- no place ---------------------------------------------------------------------------------


def blocked(folder: Path) -> Callable[[], None]:
    """Takes a folder away, and sees to it that it cannot be made again."""

    def act() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.write_bytes(b"")

    return act


def apart(tmp_path: Path, wanted: TrainConfig) -> TrainingJob:
    """A job whose LoRA and checkpoints lie in different folders."""
    found = toy_job.job(tmp_path / "loras" / NAME, wanted)
    found._keeper.path = tmp_path / "lora2" / "checkpoints" / f"{found.run_hash}.safetensors"
    return found


def test_a_lora_that_finds_no_place_is_kept_and_saved_later(tmp_path: Path, whole: bytes):
    """The output folder goes during the last step: nothing of the run is lost."""
    wanted = config()
    kept = tmp_path / "lora2" / "checkpoints"
    job = at_draw(apart(tmp_path, wanted), 2 * wanted.steps, blocked(tmp_path / "loras"))
    with pytest.raises(lora_file.LoRAFileError) as caught:
        finish(job)
    assert job.progress.state == "failed" and job.progress.step == wanted.steps
    assert f"kept in the folder of checkpoints: lora2/checkpoints/{NAME}" in str(caught.value)
    assert "goes straight to saving" in str(caught.value)
    assert (kept / NAME).read_bytes() == whole
    assert job.result is not None and job.result.path == kept / NAME
    (tmp_path / "loras").unlink()
    again = apart(tmp_path, wanted)
    finish(at_draw(again, 1, _no_step))
    assert "All steps are done" in again.progress.message
    assert again.path.read_bytes() == whole
    assert again.path == tmp_path / "loras" / NAME
    assert {file.name for file in kept.iterdir()} == {NAME}, "the checkpoint has done its duty"


def test_a_full_disk_at_the_end_leaves_the_checkpoint(tmp_path: Path, whole: bytes, monkeypatch):
    """Full to the last byte: neither the LoRA nor its copy can be written."""
    wanted, real = config(), lora_file.write_atomically

    def full(path: Path, data: bytes) -> None:
        with toy.file_size_limit(100):
            real(path, data)

    monkeypatch.setattr(lora_file, "write_atomically", full)
    job = toy_job.job(tmp_path / NAME, wanted)
    with pytest.raises(lora_file.LoRAFileError, match=r"File too large.*straight to saving"):
        finish(job)
    assert job.result is None and not (tmp_path / NAME).exists()
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == [
        f"{job.run_hash}.safetensors"
    ]
    monkeypatch.undo()
    again = toy_job.job(tmp_path / NAME, wanted)
    finish(at_draw(again, 1, _no_step))
    assert again.path.read_bytes() == whole


def test_an_exploded_run_without_a_place_says_where_its_lora_is(tmp_path: Path):
    job = apart(tmp_path, config(steps=70))
    matrix = toy_job.task_of(job).matrix

    def explode() -> None:
        matrix.mul_(30.0)
        blocked(tmp_path / "loras")()

    at_draw(job, 2 * 30 + 1, explode)
    with pytest.raises(TrainingError, match=f"exploded.*lora2/checkpoints/{NAME}.*No checkpoint"):
        finish(job)
    assert lora_file.load(tmp_path / "lora2" / "checkpoints" / NAME).state
