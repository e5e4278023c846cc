"""The benchmark as people start it: killed with SIGKILL, it goes on without redoing anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lora2_pack.bench.paper import app

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [sys.executable, str(ROOT / "bench" / "paper" / "__main__.py")]
SMALL = ["--plan=steps=1,prompts=1", "--only=mug-23", "--seeds=1"]


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [*COMMAND, f"--out={out}", *SMALL, "--methods=fixed-64,balanced,svd-64", *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path):
    out, kept = tmp_path / "out", tmp_path / "kept.jsonl"
    run = start(out, "--processes=2", "--threads=1")
    until = time.monotonic() + 240
    while len(list(out.glob("records/*/*.json"))) < 2 and time.monotonic() < until:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    done = {file: file.stat().st_mtime_ns for file in out.glob("records/*/*.json")}
    assert 2 <= len(done) < 5, "it was killed in the middle"
    again = start(out, "--processes=1", "--threads=1", f"--archive={kept}")
    told = again.communicate(timeout=240)[0]
    assert again.returncode == 0, told
    assert all(file.stat().st_mtime_ns == when for file, when in done.items())
    records = list(out.glob("records/*/*.json"))
    assert len(records) == 5  # without a LoRA, the subject itself, three methods
    assert told.count(" s)\n") == len(records) - len(done), "each of the rest once"
    assert (out / "report" / "index.html").is_file()
    assert "| ≈ likeness " in told and "(one subject)" in told, "which is no proof of anything"
    assert len(kept.read_text("utf-8").splitlines()) == 1 + len(records)


@pytest.mark.timeout(600)
def test_a_run_that_is_told_to_end_keeps_what_is_done(tmp_path: Path):
    out, kept = tmp_path / "out", tmp_path / "kept.jsonl"
    run = start(out, "--processes=2", "--threads=1", f"--archive={kept}")
    until = time.monotonic() + 240
    while not list(out.glob("records/*/*.json")) and time.monotonic() < until:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    run.terminate()
    told = run.communicate(timeout=120)[0]  # ends when the last of its processes does
    assert run.returncode == 128 + signal.SIGTERM, told
    assert len(kept.read_text("utf-8").splitlines()) == 1 + len(list(out.glob("records/*/*.json")))


def test_a_wrong_name_is_told(runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In this process: a wrong name needs no process of its own."""
    asked = [f"--out={tmp_path}", "--worker", "--processes=1", "--threads=1", "--methods=fixed-3"]
    monkeypatch.setattr(sys, "argv", ["bench.paper", *asked])
    with pytest.raises(SystemExit, match="fixed-3 is no method; choose among fixed-1,"):
        app.main()
