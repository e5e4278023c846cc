"""The last save: what cannot be written is kept, and nothing that is there is replaced."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.config.train import TrainConfig
from lora2_pack.lora2_core.files import checkpoint
from lora2_pack.lora2_core.jobs.job import TrainingJob
from lora2_pack.lora2_core.training.trainer import TrainingError
from lora2_pack.tests.core import toy, toy_job
from lora2_pack.tests.core.toy_job import at_draw, config, finish
from PIL import Image
from torch import Tensor

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

    def full(path: Path, data: bytes, new: bool = False) -> None:
        with toy.file_size_limit(100):
            real(path, data, new)

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


# --- nothing is replaced ----------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_file_put_there_meanwhile_stays(tmp_path: Path, links: bool, monkeypatch):
    """Also on exFAT, which has no hard links."""
    if not links:

        def no_links(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / NAME
    job = at_draw(toy_job.job(path, config()), 40, lambda: path.write_bytes(b"another's"))
    finish(job)
    assert path.read_bytes() == b"another's"
    assert job.progress.state == "finished"
    assert job.path == tmp_path / "cat_00002_.safetensors"
    assert job.result is not None and job.result.path == job.path
    assert lora_file.load(job.path).metadata["ss_output_name"] == "cat_00002_"
    assert "was taken meanwhile; the LoRA is cat_00002_" in job.progress.message
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {NAME, job.path.name}


@pytest.mark.parametrize("seeds", [(5, 5), (5, 6)], ids=["one graph", "two graphs"])
def test_two_servers_with_one_name_both_keep_their_lora(tmp_path: Path, seeds: tuple[int, int]):
    jobs = [toy_job.job(tmp_path / NAME, config(seed=seed)) for seed in seeds]
    for job in jobs:
        job._keeper.path = None  # each server has a user folder of its own
    for job in jobs:
        finish(job)
    first, second = (job.path for job in jobs)
    assert (first.name, second.name) == (NAME, "cat_00002_.safetensors")
    assert [lora_file.load(p).metadata["lora2.seed"] for p in (first, second)] == [*map(str, seeds)]


def test_a_link_that_leads_nowhere_is_a_name_too(tmp_path: Path):
    path = tmp_path / NAME
    path.symlink_to(tmp_path / "gone")
    assert finish(toy_job.job(path, config(steps=3))).path.name == "cat_00002_.safetensors"
    assert path.is_symlink()


def test_a_run_killed_after_its_save_replaces_its_own_file(tmp_path: Path, whole: bytes):
    """The file is there and the checkpoint, too: one LoRA is left, not two."""
    path = tmp_path / NAME
    job = toy_job.job(path, config())
    job._keeper.remove = lambda: None  # as a kill before it would have it
    finish(job)
    again = finish(toy_job.job(tmp_path / "cat_00002_.safetensors", config()))
    assert again.path == path and path.read_bytes() == whole
    assert [file.name for file in tmp_path.glob("*.safetensors")] == [NAME]


def test_a_strip_replaces_its_older_self_alone(tmp_path: Path):
    painted = config(samples=toy_job.prompts("a cat", every=6))
    strip = tmp_path / "strips" / "cat_00001_.png"
    strip.parent.mkdir()
    strip.write_bytes(b"a holiday photo")
    first = toy_job.job(tmp_path / NAME, painted, strip_path=strip)
    finish(at_draw(first, 20, first.stop))
    assert strip.read_bytes() == b"a holiday photo"
    own = strip.with_name("cat_00002_.png")
    assert first.strip is not None and first.strip.path == own
    before = Image.open(own).size
    again = finish(toy_job.job(tmp_path / NAME, painted, strip_path=strip))
    assert again.strip is not None and again.strip.path == own, "the resumed run's own strip"
    assert Image.open(own).width > before[0] and Image.open(own).format == "PNG"
    assert sorted(file.name for file in strip.parent.iterdir()) == [strip.name, own.name]
    other = config(samples=toy_job.prompts("a cat", every=6), seed=9)
    last = finish(toy_job.job(tmp_path / NAME, other, strip_path=strip))
    assert last.strip is not None and last.strip.path.name == "cat_00003_.png"


def test_the_same_graph_queued_again_breaks_no_checkpoint(tmp_path: Path, whole: bytes):
    """Its job is made, and another server's starts, while the first one writes."""
    path = tmp_path / NAME
    job = toy_job.job(path, config())
    again = toy_job.job(path, config())
    written, write = [], checkpoint.bytes_of

    def queue_again(tensor: Tensor) -> memoryview:
        if not written:
            toy_job.job(path, config())
            again._keeper.load()
        written.append(1)
        return write(tensor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "bytes_of", queue_again)
        finish(at_draw(job, 20, job.stop))
    assert not any("could not be written" in line for line in job.progress.log)
    assert job._keeper.path is not None
    assert checkpoint.read(job._keeper.path, job.run_hash).step == job.progress.step
    assert finish(toy_job.job(path, config())).path.read_bytes() == whole


# --- a step that does not end -----------------------------------------------------------------


def test_a_run_saved_within_a_step_goes_on_as_if_it_had_not(tmp_path: Path, whole: bytes):
    """In the second batch of a step; the process lives on, and the step does not count."""
    path = tmp_path / NAME
    saved: list[bool] = []
    job = toy_job.job(path, config())

    def save() -> None:
        job.stop()
        thread = threading.Thread(target=lambda: saved.append(job.save_last_step(5)))
        thread.start()
        thread.join()
        kept = checkpoint.read(path.parent / "checkpoints" / f"{job.run_hash}.safetensors", run)
        assert (kept.step, lora_file.load(path).metadata["ss_steps"]) == (4, "4")

    run = job.run_hash
    finish(at_draw(job, 10, save))
    assert saved == [True] and job.progress.step == 4 and job.progress.state == "stopped"
    assert not job.save_last_step(0), "it is over"
    again = finish(toy_job.job(path, config()))
    assert "Going on after step 4" in again.progress.message
    assert again.path == path and path.read_bytes() == whole
