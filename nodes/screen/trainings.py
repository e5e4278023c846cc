"""All trainings that a screen may show: those of this process, and what earlier ones have left.

Answers are plain values or the bytes of a picture. Nothing here is quick enough for an event loop.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...lora2_core.files.header import LoRAFileError
from ...lora2_core.jobs.queue import Entry, JobQueue, UnknownJob, WrongState
from ...lora2_core.jobs.store import INTERRUPTED, Kept
from . import views
from .views import Host
from .watch import JobWatch, Watches, size_of

# Another ComfyUI may write into the same folder. Not often: beside a training that keeps Python
# busy, reading a hundred small files takes a second.
_KEPT_SECONDS = 600.0
_REPORTS = 32  # pictures of earlier questions that are kept
_WRONG = {
    "pause": "Only a training that runs can be paused; this one is {state}.",
    "cancel": "This training is over already ({state}).",
    "resume": "Only a paused or interrupted training can go on; this one is {state}.",
}


class JobList:
    """Answers questions about the trainings of ``queue`` and of its store, from any thread."""

    def __init__(self, queue: JobQueue, host: Host):
        self.queue, self.host = queue, host
        self.watches = Watches()
        self._lock = threading.Lock()
        self._told: dict[str, Told] = {}
        self._kept: list[Kept] = []
        self._kept_until = 0.0
        self._sizes: dict[str, int | None] = {}
        self._reports: dict[tuple[str, float], bytes] = {}

    def summaries(self) -> list[dict[str, Any]]:
        """The short form of every training, the newest first."""
        jobs = [self._summary(entry) for entry in self.queue.entries()]
        jobs += [self._kept_summary(kept) for kept in self.kept()]
        return sorted(jobs, key=lambda job: job["created"] or 0, reverse=True)

    def checkpoints(self) -> dict[str, int]:
        """Those of trainings that are over: how many, and the bytes that they take."""
        folder = self.queue.checkpoints
        if folder is None:
            return {"count": 0, "bytes": 0}
        unused = folder.measure(self._in_use())
        return {"count": unused.count, "bytes": unused.nbytes}

    def clear_checkpoints(self) -> dict[str, int]:
        """Delete those; what is left of them."""
        if self.queue.checkpoints is not None:
            self.queue.checkpoints.clear(self._in_use())
        return self.checkpoints()

    def _in_use(self) -> set[str]:
        return self.queue.runs_in_use(self.kept())

    def details(self, id: str) -> dict[str, Any]:
        """Everything about one training. Raises UnknownJob."""
        found = self.find(id)
        if isinstance(found, Kept):
            return views.kept_details(found, self.host, self._sizes.get(id))
        watch = self.watches.of(found)
        return views.details(found, watch, self._position(found), self.host)

    def summary(self, id: str) -> dict[str, Any]:
        """The short form of one training. Raises UnknownJob."""
        found = self.find(id)
        if isinstance(found, Kept):
            return self._kept_summary(found)
        return self._summary(found)

    def sample(self, id: str, step: int, n: int) -> bytes:
        """A PNG. Raises UnknownJob, also where there is no such picture."""
        found = self.find(id)
        samples = () if isinstance(found, Kept) else tuple(found.job.progress.samples)
        data = views.sample_png(samples, step, n)
        if data is None:
            raise UnknownJob(f"This training has no picture {n} of step {step} any more.")
        return data

    def report(self, id: str) -> bytes:
        """A PNG. Raises UnknownJob, also where nothing is written yet."""
        found = self.find(id)
        path = self._file_of(found)
        if path is None:
            raise UnknownJob("This training has no file to report on; wait until it has ended.")
        try:
            key = found.id, path.stat().st_mtime
            if key not in self._reports:
                self._keep_report(key, self._draw(found, path))
            return self._reports[key]
        except (OSError, LoRAFileError):
            raise UnknownJob("The file of this training cannot be read any more.") from None

    def act(self, id: str, what: str) -> dict[str, Any] | None:
        """ "cancel", "pause" or "resume" a training.

        None: it was interrupted, and its prompt (:meth:`prompt`) has to be queued again. Raises
        UnknownJob and WrongState.
        """
        found = self.find(id)
        if isinstance(found, Kept):
            if what == "resume" and found.state == INTERRUPTED:
                return None
            raise WrongState(_WRONG[what].format(state=found.state))
        {"cancel": self.queue.stop, "pause": self.queue.pause, "resume": self.queue.resume}[what](
            id
        )
        return self._summary(found)

    def prompt(self, id: str) -> dict[str, Any]:
        """The prompt of an interrupted training. Raises UnknownJob and WrongState."""
        found = self.find(id)
        if not isinstance(found, Kept) or found.state != INTERRUPTED:
            raise WrongState(_WRONG["resume"].format(state=found.state))
        if not found.prompt or found.node_id not in found.prompt:
            raise WrongState(
                "The workflow of this training was not kept; open it and queue it again, and it "
                "goes on from its checkpoint."
            )
        return found.prompt

    def find(self, id: str) -> Entry | Kept:
        """Raises UnknownJob."""
        try:
            return self.queue.find(id)
        except UnknownJob:
            for kept in self.kept():
                if kept.id == id:
                    return kept
            raise

    def kept(self) -> list[Kept]:
        """Manifests of trainings that are not in the queue, nor gone on with by one of it."""
        store, entries = self.queue.store, self.queue.entries()
        if store is None:
            return []
        ids, runs = {entry.id for entry in entries}, {entry.job.run_hash for entry in entries}
        with self._lock:
            if time.monotonic() >= self._kept_until:
                # First, so that what changes meanwhile counts.
                self._kept_until = time.monotonic() + _KEPT_SECONDS
                self._kept = store.all()
                self._sizes = {k.id: size_of(Path(k.file)) for k in self._kept if k.file}
            return [
                kept
                for kept in self._kept
                if kept.id not in ids and not (kept.state == INTERRUPTED and kept.run in runs)
            ]

    def news(self, entry: Entry) -> dict[str, Any]:
        """The event to send of a training; what it tells counts as told."""
        told = self._told.get(entry.id, Told())
        watch = self.watches.of(entry)
        event, told = news_of(entry, watch, self._position(entry), self.host, told)
        self._told[entry.id] = told
        self._forget()
        return event

    def _summary(self, entry: Entry) -> dict[str, Any]:
        position = self._position(entry)
        return views.summary(entry, self.watches.of(entry).look(), position, self.host)

    def _kept_summary(self, kept: Kept) -> dict[str, Any]:
        return views.kept_summary(kept, self.host, self._sizes.get(kept.id))

    def _position(self, entry: Entry) -> int | None:
        try:
            return self.queue.position(entry.id)
        except UnknownJob:  # the oldest of many, forgotten meanwhile
            return None

    def _file_of(self, found: Entry | Kept) -> Path | None:
        """The file, if ComfyUI lists it: a manifest may name anything."""
        if isinstance(found, Kept):
            path = Path(found.file) if found.file else None
            return path if path is not None and self.host.file_name(path) else None
        trained = found.job.result
        return None if trained is None else trained.path

    def _draw(self, found: Entry | Kept, path: Path) -> bytes:
        trained = None if isinstance(found, Kept) else found.job.result
        if trained is None:
            return views.file_report_png(path)
        return views.report_png(trained, self.host)

    def _keep_report(self, key: tuple[str, float], data: bytes) -> None:
        with self._lock:
            self._reports[key] = data
            while len(self._reports) > _REPORTS:
                self._reports.pop(next(iter(self._reports)))

    def _forget(self) -> None:
        """Let go of trainings that the queue no longer lists: from here on the store tells."""
        listed = {entry.id for entry in self.queue.entries()}
        self.watches.keep_only(listed)
        for gone in self._told.keys() - listed:
            self._told.pop(gone, None)
            self._kept_until = 0.0


EVENT = "lora2.progress"


@dataclass(frozen=True)
class Told:
    """What the screens know of a job by now."""

    step: int = 0
    ranks: tuple[int, ...] = ()
    sample: int = 0  # the step of the newest pictures


def news_of(
    entry: Entry, watch: JobWatch, position: int | None, host: Host, told: Told
) -> tuple[dict[str, Any], Told]:
    """The event of a job, and what is told with it."""
    look = watch.look(after=told.step)
    ranks, steps, samples = look.glance.ranks, look.curves.steps, look.run.samples
    event: dict[str, Any] = {
        "job": views.summary(entry, look, position, host),
        "points": views.points(look.curves),
        "sample": samples[-1].step if samples and samples[-1].step > told.sample else None,
    }
    if ranks and ranks != told.ranks:
        event["ranks"] = list(ranks)
    step = steps[-1] if steps else told.step
    return event, Told(step, ranks or told.ranks, event["sample"] or told.sample)
