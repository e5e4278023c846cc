"""Trainings in the background of a real server: beside prompts, after prompts, after its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora2_pack.tests.server.conftest import TESTING_NODES, _pack_names
from lora2_pack.tests.server.graphs import Workflow, changed, painting, training
from lora2_pack.tests.server.studio import Studio

LONG = 100_000  # steps; nobody waits for them
SECONDS = 240


def background(seed: int, **inputs: Any) -> Workflow:
    return training(seed, run="background", **inputs)


def manifests(server: Any) -> list[dict[str, Any]]:
    """What the process has noted of its trainings, the newest first."""
    found = (server.directory / "user" / "lora2" / "jobs").glob("*.json")
    read = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    return sorted(read, key=lambda kept: kept["created"], reverse=True)


def started(server: Any, workflow: Workflow) -> dict[str, Any]:
    """Send a prompt that starts a training in the background; its manifest."""
    before = {kept["id"] for kept in manifests(server)}
    server.run(workflow, timeout=SECONDS)
    [new] = [kept for kept in manifests(server) if kept["id"] not in before]
    return new


def job(server: Any, id: str) -> dict[str, Any]:
    return server.get(f"/lora2/jobs/{id}")


def until(server: Any, id: str, told: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Wait until it is true of a training; its summary then."""
    end = time.monotonic() + SECONDS
    while not told(found := job(server, id)):
        assert time.monotonic() < end, found
        assert server.alive()
        time.sleep(0.05)
    return found


def over(found: dict[str, Any]) -> bool:
    return found["state"] in ("finished", "stopped", "failed")


def stopped(server: Any, id: str) -> dict[str, Any]:
    server.post(f"/lora2/jobs/{id}/cancel")
    return until(server, id, over)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a training to the next one."""
    yield
    if "studio" not in request.fixturenames:
        return
    server = request.getfixturevalue("studio").server
    for found in server.get("/lora2/jobs")["jobs"]:
        if found["state"] in ("queued", "running", "paused"):
            stopped(server, found["id"])


def messages(history: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [data for name, data in history["status"]["messages"] if name == kind]


# --- beside prompts -------------------------------------------------------------------------------


def test_the_prompt_is_over_at_once_and_the_file_comes(studio: Studio):
    """What hangs on the node is left out, and nothing is said to have failed."""
    save = {"images": ["3", 4], "filename_prefix": "report"}
    show = {"lora_name": "(the connected LORA2)", "lora2": ["3", 2]}
    workflow = {
        **background(40, steps=30),
        "s": {"class_type": "SaveImage", "inputs": save},
        "i": {"class_type": "LoRA2InspectRanks", "inputs": show},
    }
    history = studio.run(workflow)
    assert history["status"]["completed"] and history["status"]["status_str"] == "success"
    assert not {"s", "i"} & set(history["outputs"])
    assert not messages(history, "execution_error")
    kept = manifests(studio.server)[0]
    assert kept["state"] in ("queued", "running")  # it has only just begun
    assert (kept["background"], kept["node_id"]) == (True, "3")
    assert set(kept["prompt"]) == {"1", "2", "3"}, "only what the training depends on"
    assert all(set(node) == {"class_type", "inputs"} for node in kept["prompt"].values())
    assert "tests/40_00001_.safetensors" not in studio.lora_files()
    found = until(studio.server, kept["id"], over)
    assert found["state"] == "finished" and found["step"] == 30
    assert "tests/40_00001_.safetensors" in studio.lora_files()
    assert manifests(studio.server)[0]["state"] == "finished"


def test_each_prompt_starts_one_and_no_file_is_overwritten(studio: Studio):
    """ComfyUI would serve an unchanged graph from its cache."""
    workflow = background(41, steps=4)
    ids = [started(studio.server, workflow)["id"] for _ in range(2)]
    kept = started(studio.server, manifests(studio.server)[0]["prompt"])
    for id in (*ids, kept["id"]):
        assert until(studio.server, id, over)["state"] == "finished"
    names = sorted(name for name in studio.lora_files() if name.startswith("tests/41_"))
    assert names == [f"tests/41_0000{number}_.safetensors" for number in (1, 2, 3)]


def test_a_prompt_that_waits_is_still_served_from_the_cache(studio: Studio):
    workflow = training(42)
    studio.run(workflow)
    before = len(manifests(studio.server))
    [cached] = messages(studio.run(workflow), "execution_cached")
    assert "3" in cached["nodes"]
    assert len(manifests(studio.server)) == before


@pytest.mark.parametrize("polite", [True, False])
def test_a_picture_is_the_same_beside_a_training(studio: Studio, polite: bool):
    seed = 43 + polite
    kept = started(studio.server, background(seed, steps=LONG, yield_to_prompts=polite))
    until(studio.server, kept["id"], lambda found: found["step"] >= 3)
    paint = changed(painting(seed, ["1", 0]), "k", steps=12)
    before = job(studio.server, kept["id"])["step"]
    beside = studio.picture(studio.run(paint), "p")
    until(studio.server, kept["id"], lambda found: found["step"] >= before + 3)
    assert stopped(studio.server, kept["id"])["state"] == "stopped"
    studio.server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1)
    history = studio.run(paint)
    [cached] = messages(history, "execution_cached")
    assert not cached["nodes"], "the old picture was shown again, so this proves nothing"
    np.testing.assert_array_equal(studio.picture(history, "p"), beside)


def test_training_waits_while_a_prompt_runs_and_goes_on(studio: Studio):
    kept = started(studio.server, background(45, steps=LONG))
    until(studio.server, kept["id"], lambda found: found["step"] >= 3)
    prompt = studio.server.submit(changed(painting(45, ["1", 0]), "k", steps=2000))
    waiting = until(studio.server, kept["id"], lambda found: found["waits"])
    assert waiting["state"] == "running"
    time.sleep(0.5)
    assert job(studio.server, kept["id"])["step"] == waiting["step"]
    studio.server.interrupt(prompt)
    found = until(studio.server, kept["id"], lambda found: found["step"] > waiting["step"])
    assert not found["waits"]


@pytest.mark.parametrize("polite", [True, False])
def test_cancel_of_a_prompt_never_reaches_the_training(studio: Studio, polite: bool):
    from lora2_tools.client import WorkflowInterrupted

    seed = 46 + polite
    kept = started(studio.server, background(seed, steps=LONG, yield_to_prompts=polite))
    for number in range(5):  # twice five: Cancel always hits the prompt
        workflow = changed(painting(seed, ["1", 0]), "k", steps=2000, seed=number)
        pressed = False

        def cancel(event: str, _data: dict[str, Any]) -> None:
            nonlocal pressed
            if event == "progress" and not pressed:
                pressed = True
                studio.server.interrupt()

        with pytest.raises(WorkflowInterrupted):
            studio.run(workflow, on_progress=cancel)
        step = job(studio.server, kept["id"])["step"]
        found = until(studio.server, kept["id"], lambda found: found["step"] >= step + 3)  # noqa: B023
        assert found["state"] == "running"
    studio.server.interrupt()  # with no prompt there at all
    time.sleep(0.2)
    assert job(studio.server, kept["id"])["state"] == "running"
    assert stopped(studio.server, kept["id"])["state"] == "stopped"
    assert f"tests/{seed}_00001_.safetensors" in studio.lora_files()


# --- behind one another ---------------------------------------------------------------------------


def test_a_prompt_waits_its_turn_and_gets_its_lora(studio: Studio):
    """The first one would wait for the prompt, and the prompt for the first one."""
    first = started(studio.server, background(48, steps=20))
    history = studio.run(training(49))
    assert history["status"]["completed"]
    order = [kept["id"] for kept in manifests(studio.server)]
    assert order[1] == first["id"]
    assert job(studio.server, first["id"])["state"] == "finished"
    assert {"tests/48_00001_.safetensors", "tests/49_00001_.safetensors"} <= studio.lora_files()


def test_cancel_takes_what_waits_its_turn_off_the_queue(studio: Studio):
    from lora2_tools.client import WorkflowInterrupted

    first = started(studio.server, background(50, steps=LONG))
    prompt = studio.server.submit(training(51))
    end = time.monotonic() + SECONDS
    while (second := manifests(studio.server)[0])["id"] == first["id"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    found = job(studio.server, second["id"])
    assert (found["state"], found["position"], found["background"]) == ("queued", 1, False)
    step = job(studio.server, first["id"])["step"]
    until(studio.server, first["id"], lambda found: found["step"] > step + 3)
    studio.server.interrupt(prompt)
    with pytest.raises(WorkflowInterrupted):
        studio.server.wait(prompt, timeout=30)
    assert job(studio.server, second["id"])["state"] == "stopped"
    assert not [name for name in studio.lora_files() if name.startswith("tests/51_")]
    found = job(studio.server, first["id"])
    assert found["state"] == "running", "only the prompt's own training"


async def _texts_until(server: Any, workflow: Workflow, wanted: str) -> list[str]:
    """Send a prompt; the texts shown in its node until one has ``wanted`` in it. Then cancel."""
    import aiohttp
    from lora2_tools.client import WorkflowInterrupted

    client, texts = uuid.uuid4().hex, list[str]()
    address = f"{server.url.replace('http', 'ws', 1)}/ws?clientId={client}"
    async with aiohttp.ClientSession() as session, session.ws_connect(address) as channel:
        prompt = server.submit(workflow, client)
        async with asyncio.timeout(SECONDS):
            async for message in channel:
                told = json.loads(message.data) if isinstance(message.data, str) else {}
                if told.get("type") == "lora2.note":
                    texts.append(told["data"]["text"])
                    if wanted in texts[-1]:
                        break
        server.interrupt(prompt)
    with contextlib.suppress(WorkflowInterrupted):
        server.wait(prompt, timeout=60)  # the next one must not be told what this one is
    return texts


def test_what_waits_its_turn_says_behind_whom(studio: Studio):
    first = started(studio.server, background(54, steps=LONG))
    until(studio.server, first["id"], lambda found: found["step"] >= 3)
    texts = asyncio.run(_texts_until(studio.server, training(55), "Waits its turn"))
    assert "Waits its turn: behind 54_00001_ (see the LoRA² tab)." in texts[-1]
    studio.server.post(f"/lora2/jobs/{first['id']}/pause")
    until(studio.server, first["id"], lambda found: found["state"] == "paused")
    texts = asyncio.run(_texts_until(studio.server, training(56), "Waits its turn"))
    assert "behind 54_00001_, which is paused" in texts[-1]
    texts = asyncio.run(_texts_until(studio.server, background(57), "in the background"))
    assert "This runs in the background; see the LoRA² tab." in texts[-1]


# --- after the end of the server ------------------------------------------------------------------


@contextlib.contextmanager
def _server(runtime: Any, directory: Path) -> Iterator[Any]:
    """A server of this test's own, with the nodes of the tests."""
    from lora2_tools.server import Server

    config = directory / "testing.yaml"
    config.write_text(json.dumps({"testing": {"custom_nodes": str(TESTING_NODES)}}))
    extra = ["--extra-model-paths-config", str(config)]
    if not runtime.packaged:
        extra += ["--whitelist-custom-nodes", *_pack_names(runtime.path), "lora2_testing"]
    with Server(runtime, directory, extra) as server:
        yield server


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def test_the_end_of_the_server_costs_nothing(runtime: Any, own_folder: Path):
    """SIGTERM in the middle; the same prompt again ends with the same bytes."""
    steps, name = 45, "tests/52_00001_.safetensors"
    workflow = background(52, steps=steps)
    file = own_folder / "output" / "loras" / name
    with _server(runtime, own_folder) as server:
        kept = started(server, workflow)
        assert until(server, kept["id"], over)["state"] == "finished"
        whole = file.read_bytes()
        file.unlink()  # so that the next one gets the same name
        kept = started(server, workflow)
        queued = started(server, background(53, steps=4))
        until(server, kept["id"], lambda found: found["step"] >= 10)
    states = {found["id"]: found["state"] for found in manifests(server)}
    assert states[kept["id"]] == "interrupted"
    assert states[queued["id"]] in ("queued", "interrupted")
    assert file.is_file(), "what was learnt is saved"
    assert file.read_bytes() != whole
    assert not (file.parent / "53_00001_.safetensors").exists()
    with _server(runtime, own_folder) as server:
        found = job(server, kept["id"])
        assert found["state"] == "interrupted" and 10 <= found["step"] < steps
        assert job(server, queued["id"])["state"] == "interrupted"
        again = started(server, workflow)
        found = until(server, again["id"], over)
        assert (found["state"], found["step"]) == ("finished", steps)
        assert [left["id"] for left in manifests(server)].count(kept["id"]) == 0, "listed once"
    assert file.read_bytes() == whole
