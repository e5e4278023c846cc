"""Requests to the REST interface, at random: an answer or a sentence, never ComfyUI's own 500."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from lora2_pack.lora2_core.jobs.checkpoints import CheckpointFolder
from lora2_pack.lora2_core.jobs.queue import JobQueue
from lora2_pack.lora2_core.jobs.store import INTERRUPTED, JobStore, Kept
from lora2_pack.nodes.screen.routes import Api
from lora2_pack.tests.core.tries import TRIES, in_memory

ID, RUN = "interrupted-0001", "a" * 64
PIECES = (
    ID, "no-such-training", "..", "%2e%2e%2f", "%00", "%ff%fe", "a" * 5000, "💣", "%ED%A0%80", "",
    "-1", "0", "99999999999999999999", "1e999", "nan", "%0a", "x y", "C%3A%5Cx", "?", "{id}",
)  # fmt: skip
BODIES = (
    b"", b"{}", b"[]", b"null", b"7", b'"x"', b"{", b"[" * 9000, b'{"a":' * 1500, b"\xff",
    b'{"client_id": 7}', b'{"client_id": "page-1"}', b'{"client_id": "\\ud800"}', b"NaN",
    b'{"client_id": "\\u202e\\n"}', b'{"client_id": "' + b"x" * 9000 + b'"}', b"x" * 10_001,
    b'{"client_id": {}}', b'{"client_id": [1e999]}', b"1" * 9000, b'{"client_id": null}',
)  # fmt: skip
TYPES = (
    "application/json",
    "text/plain; charset=nothing",
    "text/html; charset=utf-16",
    "",
    "x/\xff",
)


def _served(folder: Path, checkpoints: Path | None = None) -> tuple[web.Application, list[str]]:
    """The interface on a queue of its own, with one interrupted training; and who asked for it."""
    store = JobStore(folder)
    prompt = {"3": {"class_type": "LoRA2Train", "inputs": {}}}
    kept = Kept(ID, "cat", "3", time.time(), "running", 1, 9, prompt, None, None, run=RUN)
    store.put(lambda: kept)
    manifest = json.loads((folder / f"{ID}.json").read_text())
    (folder / f"{ID}.json").write_text(json.dumps(manifest | {"process": "an earlier one"}))
    assert [kept.state for kept in store.all()] == [INTERRUPTED]
    clients: list[str] = []

    async def queue_prompt(_prompt: dict[str, Any], client: str, _headers: Any) -> str:
        clients.append(client)
        return "prompt"

    table = web.RouteTableDef()
    queue = JobQueue(store, None if checkpoints is None else CheckpointFolder(checkpoints))
    Api(queue, queue_prompt, lambda _id: False).add_to(table)
    app = web.Application(client_max_size=100 * 2**20)  # as large as ComfyUI's
    app.add_routes(table)
    return app, clients


def _path(chance: random.Random) -> str:
    one, two, three = (chance.choice(PIECES) for _ in range(3))
    return chance.choice((
        "/lora2/jobs", f"/lora2/jobs/{one}", f"/lora2/jobs/{ID}/samples/{two}/{three}",
        f"/lora2/jobs/{one}/report", f"/lora2/inspect?name={one}", f"/lora2/inspect?{one}={two}",
        f"/lora2/jobs/{one}/{two}", f"/lora2/jobs/{ID}/resume", f"/lora2/jobs/{ID}/resume",
        f"/lora2/jobs/{ID}/cancel", f"/lora2/jobs/{one}/pause",
    ))  # fmt: skip


async def _asked(client: TestClient[Any, Any], chance: random.Random) -> int:
    async def in_parts(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 4000):
            yield body[start : start + 4000]

    method, body = chance.choice(("GET", "POST", "POST")), chance.choice(BODIES)
    data: Any = in_parts(body) if chance.random() < 0.5 and body else body
    headers = {"Content-Type": chance.choice(TYPES)}
    async with client.request(
        method, _path(chance), data=data if method == "POST" else None, headers=headers
    ) as reply:
        text = await reply.read()
        if reply.content_type == "application/json" and reply.status >= 400:
            said = json.loads(text)["error"]
            assert "\n" not in said and "Traceback" not in said and len(said) < 6000
        return reply.status


def test_requests_at_random(tmp_path: Path) -> None:
    app, clients = _served(tmp_path)
    chance, seen = random.Random(2), Counter[int]()

    async def ask_all() -> None:
        async with TestClient(TestServer(app)) as client:
            for number in range(TRIES):
                status = await asyncio.wait_for(_asked(client, chance), 5)
                assert status < 500, number
                seen[status] += 1

    with in_memory():
        asyncio.run(ask_all())
    assert seen.keys() <= {200, 400, 404, 405, 409}
    assert seen[200] > TRIES // 50
    assert set(clients) <= {"", "page-1", "x" * 100} and "page-1" in clients
    assert [one.name for one in tmp_path.iterdir()] == [f"{ID}.json"]


def test_checkpoints_are_cleared_but_for_those_that_are_needed(tmp_path: Path) -> None:
    jobs, folder = tmp_path / "jobs", tmp_path / "checkpoints"
    jobs.mkdir(), folder.mkdir()
    app, _ = _served(jobs, folder)
    for run in (RUN, "b" * 64, "c" * 64):
        (folder / f"{run}.safetensors").write_bytes(bytes(1000))

    async def ask() -> list[Any]:
        async with TestClient(TestServer(app)) as client:
            before = await (await client.get("/lora2/jobs")).json()
            cleared = await (await client.post("/lora2/checkpoints/clear")).json()
            headers = {"Origin": "http://evil.example"}
            foreign = await client.post("/lora2/checkpoints/clear", headers=headers)
            return [before["checkpoints"], cleared, foreign.status]

    assert asyncio.run(ask()) == [{"count": 2, "bytes": 2000}, {"count": 0, "bytes": 0}, 403]
    assert [one.name for one in folder.iterdir()] == [f"{RUN}.safetensors"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_ninety_megabytes(tmp_path: Path, chunked: bool) -> None:
    app, clients = _served(tmp_path)
    sent = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(90):
            sent += 1
            yield bytes(1_000_000)

    async def ask() -> tuple[int, str]:
        async with TestClient(TestServer(app)) as client:
            data = parts() if chunked else bytes(90_000_000)
            async with client.post(f"/lora2/jobs/{ID}/resume", data=data) as reply:
                return reply.status, (await reply.json())["error"]

    assert asyncio.run(ask()) == (400, "The body is too large; {} will do.")
    assert not clients and sent < 90
