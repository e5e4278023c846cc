"""A job on a graphics card draws the next batch while the card computes: the file is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lora2_pack.lora2_core.jobs import run
from lora2_pack.lora2_core.training.trainer import Trainer
from lora2_pack.tests.core import toy_job
from lora2_pack.tests.core.jobs.test_job import (
    NAME,
    check_same_end,
    checkpoints,
    settings,
    stopped,
)
from lora2_pack.tests.core.toy_job import at_draw, finish


class DrawingAhead(Trainer):
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.draws_ahead = True


def test_jobs_that_draw_ahead_end_as_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while they do it, in both batches of a step, and taken up by one that does not."""
    wanted, path = settings(), tmp_path / NAME
    reference = finish(toy_job.job(tmp_path / "plain" / NAME, wanted))
    with monkeypatch.context() as patch:
        patch.setattr(run, "Trainer", DrawingAhead)
        for draw in (9, 14):  # ahead, while step 4 computes; and in its own step
            stopped(path, wanted, draw)
        check_same_end(finish(toy_job.job(path, wanted)), reference)
        path = tmp_path / "other" / NAME
        stopped(path, wanted, 9)
    check_same_end(finish(toy_job.job(path, wanted)), reference)
    assert not checkpoints(path)


def test_an_error_of_a_draw_that_was_made_ahead_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once only: it is drawn again in its own step."""
    wanted = settings()
    reference = finish(toy_job.job(tmp_path / "plain" / NAME, wanted))
    monkeypatch.setattr(run, "Trainer", DrawingAhead)
    job, met = toy_job.job(tmp_path / NAME, wanted), []

    def fail() -> None:
        met.append(True)
        raise OSError("the disk is busy")

    check_same_end(finish(at_draw(job, 9, fail)), reference)
    assert met
