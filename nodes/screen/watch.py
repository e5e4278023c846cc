"""What a screen shows of a job: its curves, and where every component stands in the heat map.

The order of the map is that of the picture in the report: attention in the order the network runs
it, and below it everything else by kind. See :mod:`lora2_core.files.places`.
"""

from __future__ import annotations

import math
import statistics
import threading
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...lora2_core.adapters.budget import file_bytes
from ...lora2_core.adapters.network import AdaptiveRankNetwork
from ...lora2_core.adapters.targets import Target
from ...lora2_core.files.encode import kohya_key
from ...lora2_core.files.places import PROJECTIONS, group_label, sort_components
from ...lora2_core.files.read import ComponentInfo
from ...lora2_core.jobs.job import TrainingJob
from ...lora2_core.jobs.progress import ENDED, Snapshot
from ...lora2_core.jobs.queue import Entry
from ...lora2_core.jobs.saving import TrainedLoRA
from ...lora2_core.training.trainer import StepEvent
from .curves import Smoother, decay_for, keep_peaks

COLUMNS = tuple(f"attn{kind}.{name}" for kind in (1, 2) for name in PROJECTIONS)


@dataclass(frozen=True)
class MapCell:
    """One cell of the map."""

    key: str  # kohya key, as in the file
    label: str  # for people: "down 4.1 · 0 · attn1.q"
    row: str  # "down 4.1 · 0", or a kind such as "Feed-forward"
    column: str  # of COLUMNS, or the running number within the kind
    in_features: int
    out_features: int

    @property
    def parameters_per_rank(self) -> int:
        return self.in_features + self.out_features


def map_cells(components: Sequence[ComponentInfo]) -> list[MapCell]:
    """Every component once, rows in forward order."""
    grid, kinds = sort_components(components)
    cells: list[MapCell] = []
    for (group, block), by_column in grid.items():
        row = f"{group_label(group)} · {block}"
        cells += [_place(by_column[n], row, COLUMNS[n]) for n in sorted(by_column)]
    for kind, members in kinds.items():
        cells += [_place(component, kind, str(n)) for n, component in enumerate(members)]
    return cells


def infos_of_targets(targets: Sequence[Target]) -> list[ComponentInfo]:
    """Targets as the file will name them, at rank 0."""
    return [
        ComponentInfo(kohya_key(t.name, t.root), 0, t.in_features, t.out_features, None, 0)
        for t in targets
    ]


def _place(component: ComponentInfo, row: str, column: str) -> MapCell:
    label = f"{row} · {column}"
    return MapCell(component.key, label, row, column, component.in_features, component.out_features)


_POINTS = 2000  # of a curve of a run that is over
_PACE = 50  # steps from whose mean the time that is left is told


@dataclass
class Curves:
    """One value a step, and the probes."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    loss: array[float] = field(default_factory=lambda: array("d"))
    smoothed: array[float] = field(default_factory=lambda: array("d"))
    mean_rank: array[float] = field(default_factory=lambda: array("d"))
    probe_steps: array[int] = field(default_factory=lambda: array("q"))
    probe_loss: array[float] = field(default_factory=lambda: array("d"))

    def after(self, step: float) -> Curves:
        """A copy of what came after ``step``."""
        first, first_probe = bisect_right(self.steps, step), bisect_right(self.probe_steps, step)
        return Curves(
            self.steps[first:],
            self.loss[first:],
            self.smoothed[first:],
            self.mean_rank[first:],
            self.probe_steps[first_probe:],
            self.probe_loss[first_probe:],
        )

    def thinned(self, limit: int) -> Curves:
        """At most ``limit`` steps and as many probes, every peak of the loss among them."""
        kept, probes = keep_peaks(self.loss, limit), keep_peaks(self.probe_loss, limit)
        return Curves(
            array("q", [self.steps[n] for n in kept]),
            array("d", [self.loss[n] for n in kept]),
            array("d", [self.smoothed[n] for n in kept]),
            array("d", [self.mean_rank[n] for n in kept]),
            array("q", [self.probe_steps[n] for n in probes]),
            array("d", [self.probe_loss[n] for n in probes]),
        )


@dataclass(frozen=True)
class Plan:
    """The components of a job and what their ranks cost; in the order of the screen."""

    places: tuple[MapCell, ...]
    order: tuple[int, ...]  # the place of each in the network's own order
    max_ranks: tuple[int | None, ...]
    frame: int  # bytes of the file beside its ranks

    def sort(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Ranks of an event, which has them in the network's order."""
        return tuple(ranks[index] for index in self.order)


@dataclass(frozen=True)
class Glance:
    """The figures of the newest step; ranks in the order of the plan, empty before a plan."""

    step: int = 0
    loss: float = math.nan
    smoothed: float = math.nan
    mean_rank: float = math.nan
    pace: float = math.nan  # seconds a step
    ranks: tuple[int, ...] = ()
    nbytes: int | None = None  # of the file if it were written now


@dataclass(frozen=True)
class Look:
    """A job at one moment: whatever is told of it at once is told from one of these."""

    run: Snapshot
    glance: Glance
    curves: Curves
    plan: Plan | None  # None where the model was gone without a file before anybody looked

    def nbytes(self) -> list[int]:
        """Bytes of every place's tensors, in fp16 as long as nothing is saved."""
        if self.plan is None:
            return []
        if self.run.result is not None:
            saved = {c.key: c.nbytes for c in self.run.result.components}
            return [saved.get(place.key, 0) for place in self.plan.places]
        ranks = self.glance.ranks or (0,) * len(self.plan.places)
        pairs = zip(self.plan.places, ranks, strict=True)
        return [2 * place.parameters_per_rank * rank for place, rank in pairs]


class JobWatch:
    """Looks at one job from any thread."""

    def __init__(self, job: TrainingJob):
        self.job = job
        self._lock = threading.RLock()
        self._curves = Curves()
        self._plan: Plan | None = None
        self._smoother = Smoother(decay_for(job.config.steps))
        self._pace: deque[float] = deque(maxlen=_PACE)
        self._glance = Glance()
        self._ranks: tuple[int, ...] = ()  # of the newest event, as it has them
        self._seen: tuple[int, ...] | None = None  # those that the glance shows
        self._saved: tuple[int, ...] = ()  # the ranks of the file, once it is written
        self._nbytes: int | None = None  # and its size

    def look(self, after: float = math.inf) -> Look:
        """The job now, and its curves after step ``after``.

        Costs little more than the steps since the last look.
        """
        with self._lock:
            self._plan_run()  # first: ranks before any step must not be those of a later one
            run = self.job.progress.snapshot()
            self._plan_file(run.result)
            self._read(run.events)
            if run.state in ENDED and len(self._curves.steps) > _POINTS:
                self._curves = self._curves.thinned(_POINTS)
            if self._curves.loss:
                self._glance = self._newest()
            glance = self._final(run.result) or self._glance
            return Look(run, glance, self._curves.after(after), self._plan)

    def nus(self, look: Look) -> list[float | None]:
        """ν of every place: as trained by now, or as saved; None where nothing is known."""
        plan, result, setup = look.plan, look.run.result, self.job.setup
        if plan is None:
            return []
        if result is not None:
            saved = {c.key: c.nu for c in result.components}
            return [saved.get(place.key) for place in plan.places]
        if setup is None:
            return [None] * len(plan.places)
        values: list[float] = setup.network.log_nu.detach().float().exp().cpu().tolist()
        return [values[index] for index in plan.order]

    def _plan_run(self) -> None:
        """The plan of the network, as long as there is one."""
        setup = self.job.setup
        if self._plan is None and setup is not None:
            self._plan = _plan_of(setup.network)
            ranks = self._plan.sort(setup.network.ranks)
            self._glance = replace(self._glance, ranks=ranks, nbytes=self._size(ranks))

    def _plan_file(self, result: TrainedLoRA | None) -> None:
        """The plan of the file that the network left, if nobody looked before."""
        if self._plan is None and result is not None:
            cells = map_cells(result.components)
            place_of = {c.key: n for n, c in enumerate(result.components)}
            order = tuple(place_of[cell.key] for cell in cells)
            self._plan = Plan(tuple(cells), order, (None,) * len(cells), 0)

    def _read(self, events: Sequence[StepEvent]) -> None:
        """Take over the steps that are new; found by number, as a run that is over forgets some."""
        curves = self._curves
        last = curves.steps[-1] if curves.steps else 0
        for index in range(bisect_right(events, last, key=lambda e: e.step), len(events)):
            event = events[index]
            curves.steps.append(event.step)
            curves.loss.append(event.loss)
            curves.smoothed.append(self._smoother.add(event.loss))
            curves.mean_rank.append(event.mean_rank)
            self._pace.append(event.seconds)
            if event.probe is not None:
                curves.probe_steps.append(event.step)
                curves.probe_loss.append(event.probe)
            self._ranks = event.ranks or self._ranks

    def _newest(self) -> Glance:
        """The glance at the newest step."""
        curves, glance, ranks, plan = self._curves, self._glance, self._ranks, self._plan
        if plan is not None and len(ranks) == len(plan.order) and ranks is not self._seen:
            self._seen = ranks
            ordered = plan.sort(ranks)
            glance = replace(glance, ranks=ordered, nbytes=self._size(ordered))
        return replace(
            glance,
            step=curves.steps[-1],
            loss=curves.loss[-1],
            smoothed=curves.smoothed[-1],
            mean_rank=curves.mean_rank[-1],
            pace=statistics.fmean(self._pace),
        )

    def _size(self, ranks: Sequence[int]) -> int | None:
        """The file at these ranks: what was learnt beyond a size is cut when it is saved."""
        plan = self._plan
        if plan is None or not plan.frame:
            return None
        pairs = zip(plan.places, ranks, strict=True)
        size = plan.frame + 2 * sum(place.parameters_per_rank * rank for place, rank in pairs)
        megabytes = self.job.config.rank.target_megabytes
        return size if megabytes is None else min(size, int(megabytes * 1e6))

    def _final(self, result: TrainedLoRA | None) -> Glance | None:
        """The glance at a job whose file is written: the file's own ranks and size."""
        plan = self._plan
        if result is None or plan is None:
            return None
        if not self._saved:
            saved = {c.key: c.rank for c in result.components}
            self._saved = tuple(saved.get(place.key, 0) for place in plan.places)
            self._nbytes = size_of(result.path)
        mean = statistics.fmean(self._saved)
        return replace(self._glance, ranks=self._saved, mean_rank=mean, nbytes=self._nbytes)


class Watches:
    """The watch of every job that is asked for, for as long as the job is listed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: dict[str, JobWatch] = {}

    def of(self, entry: Entry) -> JobWatch:
        with self._lock:
            watch = self._watches.get(entry.id)
            if watch is None:
                watch = self._watches[entry.id] = JobWatch(entry.job)
            return watch

    def keep_only(self, ids: set[str]) -> None:
        """Forget jobs that are no longer listed."""
        with self._lock:
            for gone in self._watches.keys() - ids:
                del self._watches[gone]


def size_of(path: Path) -> int | None:
    """Bytes of a file; None where it is not there any more."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _plan_of(network: AdaptiveRankNetwork) -> Plan:
    targets = network.targets
    components = infos_of_targets(targets)
    place_of = {component.key: n for n, component in enumerate(components)}
    cells = map_cells(components)
    order = tuple(place_of[cell.key] for cell in cells)
    limits = network.max_ranks.tolist()
    tensors = 2 * sum(target.parameters_per_rank for target in targets)
    frame = file_bytes(targets, [1] * len(targets)) - tensors
    return Plan(tuple(cells), order, tuple(limits[index] for index in order), frame)
