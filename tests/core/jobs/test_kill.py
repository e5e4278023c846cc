"""Trainings in processes that are killed, asked to end, or interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.files import checkpoint

SCRIPT = Path(__file__).resolve().parents[1] / "killing.py"
KILLS = 9  # and one of the demo model, tests/host/test_resume.py

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has neither kill nor fork")


def _command(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def test_killed_at_random_moments_every_run_ends_the_same(tmp_path: Path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    done = subprocess.run(_command(tmp_path, seed, KILLS), capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(run["killed"] for run in runs) >= KILLS
    assert all(run["same"] for run in runs)
    assert not any(run["left"] for run in runs), "no checkpoint, no half file is left"
    assert any(run["kept"] for run in runs), "some kill must have come after a checkpoint"


@contextmanager
def _training(folder: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        _command(folder, name), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        while "ready" not in (line := process.stdout.readline()):
            assert line or process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.wait()


def check_saved(folder: Path) -> None:
    file = lora_file.load(folder / "cat_00001_.safetensors")
    assert file.state and int(file.metadata["ss_steps"]) >= 5
    assert len(list((folder / "checkpoints").glob("*.safetensors"))) == 1


def test_sigterm_saves_and_then_ends_the_process(tmp_path: Path):
    with _training(tmp_path, "SIGTERM") as process:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGTERM, "it must still die of the signal"
    check_saved(tmp_path)


def test_ctrl_c_saves_and_then_interrupts_as_ever(tmp_path: Path):
    with _training(tmp_path, "SIGINT") as process:
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
        told = json.loads(out.splitlines()[-1])
        assert told == {"interrupted": True, "state": "stopped"}, "saved before the interruption"
        assert "KeyboardInterrupt" in errors
    check_saved(tmp_path)


def test_a_second_ctrl_c_waits_for_nothing(tmp_path: Path):
    with _training(tmp_path, "slow") as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "the training stops after its step" in process.stderr.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)  # the first one waits for the step
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=15)  # less than shutdown.WAIT_SECONDS
        assert json.loads(out.splitlines()[-1]) == {"interrupted": True, "state": "running"}


def test_an_earlier_handler_is_called_afterwards_and_may_go_on(tmp_path: Path):
    with _training(tmp_path, "SIGUSR1") as process:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert [json.loads(line) for line in out.splitlines()] == [
            {"own": True},
            {"state": "stopped"},
        ]
        assert process.returncode == 0
    check_saved(tmp_path)


def test_sigterm_saves_the_last_step_when_the_next_one_does_not_end(tmp_path: Path):
    """A step of five minutes: nobody waits for it, and nothing before it is lost."""
    with _training(tmp_path, "slow") as process:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=25)
        assert process.returncode == -signal.SIGTERM
    assert "Step 6 takes too long to wait for; step 5 is saved" in errors
    check_saved(tmp_path)
    (kept,) = (tmp_path / "checkpoints").glob("*.safetensors")
    assert checkpoint.read(kept, kept.stem).step == 5
    assert lora_file.load(tmp_path / "cat_00001_.safetensors").metadata["ss_steps"] == "5"
