"""The tool that boots a ComfyUI server: what it runs, what it raises, what it leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lora2_tools.client import Client, ServerError, WorkflowError, WorkflowInterrupted
from lora2_tools.comfyui import Runtime
from lora2_tools.server import Server

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def picture(prefix: str = "picture", width: int = 64) -> dict[str, Any]:
    """Return a workflow that saves a small picture; a `width` of its own makes it new."""
    inputs = {"width": width, "height": 64, "batch_size": 1, "color": 255}
    return {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Wait until something holds, and return whether it does."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def runs(process_id: int) -> bool:
    """Whether a process runs."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_workflow_runs_and_tells_its_progress(server: Server) -> None:
    events = []
    history = server.run(picture(), on_progress=lambda event, data: events.append(event))
    (image,) = server.outputs(history, 2)["images"]
    assert (server.output / image["filename"]).is_file()
    assert server.outputs(history, 1) == {}
    assert {"execution_start", "executing", "executed", "execution_success"} <= set(events)


def test_submitted_workflow_can_be_waited_for(server: Server) -> None:
    history = server.wait(server.submit(picture(width=72)), timeout=60)
    assert history["status"]["completed"]


def test_refused_input_names_the_node(server: Server) -> None:
    with pytest.raises(WorkflowError, match="smaller than min") as caught:
        server.run(picture(width=-1))
    error = caught.value
    assert (error.node_id, error.node_type) == ("1", "EmptyImage")
    assert error.exception_type == "value_smaller_than_min"


def test_half_refused_workflow_is_refused(server: Server) -> None:
    bad = {"class_type": "SaveImage", "inputs": {"filename_prefix": "no picture"}}
    with pytest.raises(WorkflowError) as caught:
        server.run(picture() | {"3": bad})
    assert caught.value.node_id == "3"


def test_failing_node_is_named(server: Server) -> None:
    with pytest.raises(WorkflowError, match="outside the output folder") as caught:
        server.run(picture("../../outside"))
    assert (caught.value.node_id, caught.value.node_type) == ("2", "SaveImage")
    assert caught.value.exception_type == "Exception"


def test_cancel_is_told_apart_from_a_failure(server: Server) -> None:
    workflow = picture(width=1024)
    workflow["1"]["inputs"]["height"] = 1024
    blur = {"blur_radius": 15, "sigma": 3.0}
    for node_id, source in (("3", "1"), ("4", "3"), ("5", "4")):  # slow enough to be cancelled
        inputs = {"image": [source, 0], **blur}
        workflow[node_id] = {"class_type": "ImageBlur", "inputs": inputs}
    workflow["2"]["inputs"]["images"] = ["5", 0]

    def cancel(event: str, data: dict[str, Any]) -> None:
        if event == "executing" and data["node"] == "3":
            server.interrupt(data["prompt_id"])

    with pytest.raises(WorkflowInterrupted):
        server.run(workflow, on_progress=cancel)
    assert server.run(picture())["status"]["completed"]


def test_unknown_node_and_empty_workflow_are_refused(server: Server) -> None:
    with pytest.raises(WorkflowError, match="NoSuchNode"):
        server.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})
    with pytest.raises(WorkflowError, match="no outputs"):
        server.run({})


def test_time_limit_is_kept(server: Server) -> None:
    with pytest.raises(ServerError, match="did not end within 0 s"):
        server.wait("no-such-prompt", timeout=0)


def test_pack_is_loaded(server: Server) -> None:
    assert server.get("/object_info/LoRA2Train")
    assert "IMPORT FAILED" not in server.log_text()


def test_no_server_is_one_sentence() -> None:
    with pytest.raises(ServerError, match="No answer from"):
        Client("http://127.0.0.1:9").get("/system_stats")


def test_server_that_cannot_start_shows_its_log(runtime: Runtime, tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match=r"did not start(.|\n)*--no-such-option"),
        Server(runtime, tmp_path, ["--no-such-option"]),
    ):
        pytest.fail("it started")


def test_server_dies_with_the_process_that_started_it(runtime: Runtime, tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; import comfyui, server\n"
        "runtime = comfyui.Runtime(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == 'True')\n"
        "booted = server.Server(runtime, Path(sys.argv[5])); booted.start()\n"
        "print(booted._process.pid, flush=True); time.sleep(600)\n"
    )
    arguments = [runtime.path, runtime.python, runtime.packaged, tmp_path]
    with subprocess.Popen(
        [sys.executable, "-c", code, str(TOOLS), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert runs(child)
        parent.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    assert wait_for(lambda: not runs(child))


def test_users_comfyui_sees_the_pack_and_stays_as_it_is(comfyui: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "ComfyUI"
    unwanted = {"custom_nodes", "models", "output", "user", "temp", "input"}
    shutil.copytree(comfyui, foreign, ignore=lambda at, _: unwanted if Path(at) == comfyui else ())
    # A pack of the user's own, which must not be started.
    (foreign / "custom_nodes").mkdir()
    (foreign / "custom_nodes" / "other.py").write_text("raise SystemExit('started')\n")
    before = inventory(foreign)
    with Server(Runtime(foreign, Path(sys.executable), False), tmp_path / "run") as server:
        assert server.get("/object_info/LoRA2Train")
        assert server.run(picture())["status"]["completed"]
    assert inventory(foreign) == before


def inventory(folder: Path) -> list[tuple[str, int]]:
    """Return the files of a folder with their sizes, but for Python's own caches."""
    return sorted(
        (str(path.relative_to(folder)), path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
