"""Questions to the REST interface of a booted server, and an ear for its events."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from lora2_pack.tests.server import api_schema
from lora2_pack.tests.server.graphs import Workflow, changed, training

SEED = 61
SECONDS = 120


def ask(
    server: Any, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, Any]:
    """The status, and the JSON or the bytes of a reply; ``path`` goes out exactly as it is."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    try:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, sent)
        reply = connection.getresponse()
        data = reply.read()
        is_json = reply.headers.get_content_type() == "application/json"
        return reply.status, json.loads(data) if is_json else data
    finally:
        connection.close()


def get(server: Any, path: str, schema: str) -> Any:
    status, found = ask(server, path)
    assert status == 200, found
    assert api_schema.complaints(found, schema) == []
    return found


def post(server: Any, id: str, what: str) -> Any:
    status, found = ask(server, f"/lora2/jobs/{id}/{what}", "POST")
    assert status == 200, found
    assert api_schema.complaints(found, "summary") == []
    return found


def check_error(answer: tuple[int, Any], status: int) -> str:
    assert answer[0] == status, answer
    assert api_schema.complaints(answer[1], "error") == []
    text = answer[1]["error"]
    assert "\n" not in text and "/tmp" not in text and "Traceback" not in text
    return text


def until(find: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What ``find`` gives, once that is something."""
    end = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)
    return found


def of_name(server: Any, name: str, *states: str) -> Any:
    """The newest training of a name, if it is in one of these states."""
    jobs = get(server, "/lora2/jobs", "jobs")["jobs"]
    fitting = [job for job in jobs if job["name"].startswith(name)]
    return fitting[0] if fitting and fitting[0]["state"] in states else None


def in_background(name: str, steps: int, model: dict[str, Any] | None = None) -> Workflow:
    """A training of ``steps`` in the background that paints, at node 3."""
    safety = {
        "gradient_checkpointing": "auto",
        "checkpoint_steps": 5,
        "checkpoint_minutes": 0.0,
        "resume": True,
        "sample_prompts": "a robot\na cat",
        "sample_every": 4,
        "sample_seed": 0,
        "sample_steps": 1,
        "sample_guidance": 1.0,
    }
    workflow = training(SEED, steps=steps, file_name=name, run="background", options=["s", 0])
    workflow["s"] = {"class_type": "LoRA2SafetyOptions", "inputs": safety}
    if model is not None:
        workflow["1"] = model
    return changed(workflow, "3", yield_to_prompts=False)


class Ear:
    """Every lora2.progress that a page would hear, with its time and size."""

    def __init__(self, server: Any):
        self.heard: list[tuple[float, int, dict[str, Any]]] = []
        self._url = server.url.replace("http", "ws", 1) + "/ws?clientId=ear"
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen()), daemon=True)

    def __enter__(self) -> Ear:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join(30)

    async def _listen(self) -> None:
        async with aiohttp.ClientSession() as session, session.ws_connect(self._url) as channel:
            self._ready.set()
            while not self._stop.is_set():
                try:
                    message = await channel.receive(timeout=0.2)
                except TimeoutError:
                    continue
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                content = json.loads(message.data)
                if content["type"] == "lora2.progress":
                    self.heard.append((time.monotonic(), len(message.data), content["data"]))

    def states(self, id: str) -> list[str]:
        found = [event["job"]["state"] for _, _, event in self.heard if event["job"]["id"] == id]
        return [s for n, s in enumerate(found) if n == 0 or s != found[n - 1]]
