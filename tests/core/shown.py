"""What the tests of screens share: a host, a look at schemas, a job that waits at a step."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora2_pack.lora2_core.jobs.queue import JobQueue
from lora2_pack.lora2_core.jobs.store import JobStore
from lora2_pack.nodes.screen.views import Host
from lora2_pack.tests.core import toy_job
from lora2_pack.tests.server import api_schema

HOST = Host(lambda path: path.name if path.is_file() else None, lambda text: text)


def check(value: Any, name: str) -> Any:
    """``value`` as JSON gives it back, after a look at its schema."""
    again = json.loads(json.dumps(value, allow_nan=False))
    assert api_schema.complaints(again, name) == []
    return again


class Held:
    """A job that stops before the draw of a step until it is let go."""

    def __init__(self, folder: Path, draw: int, **settings: Any):
        self.there, self.go = threading.Event(), threading.Event()
        self.job = toy_job.job(folder / "cat_00001_.safetensors", toy_job.config(**settings))
        toy_job.at_draw(self.job, draw, self._hold)

    def _hold(self) -> None:
        self.there.set()
        assert self.go.wait(60)


@contextmanager
def a_queue(folder: Path) -> Iterator[JobQueue]:
    """A queue with a store; at its end nothing of it runs."""
    found = JobQueue(JobStore(folder / "jobs"))
    yield found
    for entry in found.entries():
        if not entry.over.is_set():
            found.stop(entry.id)
            assert found.wait(entry.id, 60)
