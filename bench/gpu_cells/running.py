"""Measures cells: each contestant alone, then all of a shape in turns."""

from __future__ import annotations

import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch

from ...lora2_core.config.train import TrainConfig
from ...lora2_core.files.header import first_line
from ...lora2_core.training.estimate import Estimate
from ...lora2_core.training.memory import SDXL, Memory, scaled
from ...lora2_core.training.out_of_memory import is_out_of_memory
from . import contestants, plan
from .contestants import Contestant, Missing
from .meters import Meter, Peak, Profile
from .rows import FAILED, MEASURED, MISSING, NO_ROOM, NOT_REACHED, Row, share
from .weights import Frozen

_MOST_WARM_UP = 12  # steps, where the scaler of fp16 skips so many
_FULL = 0.92  # of the card, above which contestants are not put side by side
_LITTLE = 0.1  # of the weights, what PyTorch and the libraries of a card may keep for themselves
ALONE = "timed alone: side by side they would fill the card"
_FEWEST = 3  # rounds, below which the times of a contestant alone are the better ones


@dataclass(frozen=True)
class Rounds:
    """How many steps there are of each kind. The defaults are those of a card."""

    warm_up: int = 2
    alone: int = 3
    together: int = 10

    def __post_init__(self) -> None:
        if min(self.warm_up, self.alone, self.together) < 1:
            raise ValueError(f"{self} has less than 1 step of a kind; take 1 or more.")


TINY = Rounds(warm_up=1, alone=1, together=3)


class OutOfTime(Exception):
    """The budget of minutes is spent."""


@dataclass
class _Alone:
    """What a contestant took by itself. ``own``: bytes that it holds between two steps."""

    times: list[float] = field(default_factory=list)
    peak: Peak | None = None
    profile: Profile = field(default_factory=Profile)
    own: int = 0
    told: Estimate | None = None
    note: str = ""


class Bench:
    """``until``: when the budget ends, on ``clock``. ``say``: is told every row once known."""

    def __init__(
        self,
        meter: Meter,
        rounds: Rounds,
        until: float,
        tiny: bool = False,
        say: Callable[[Row], None] = lambda _: None,
        make: Callable[..., Contestant] = contestants.make,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.meter, self.rounds, self.until, self.tiny = meter, rounds, until, tiny
        self.say, self.make, self.clock = say, make, clock
        self._frozen: Frozen | None = None
        self._counted: dict[str, tuple[Memory, TrainConfig]] = {"SDXL": (SDXL, TrainConfig())}
        if tiny:
            self._counted = {}

    def run(self, cells: Sequence[plan.Cell]) -> Iterator[list[Row]]:
        """The rows of one shape after the other."""
        for _, group in itertools.groupby(cells, key=lambda cell: cell.shape):
            rows = self._shape(list(group))
            for row in rows:
                self.say(row)
            yield rows

    def _shape(self, cells: list[plan.Cell]) -> list[Row]:
        rows: dict[plan.Cell, Row] = {}
        found: dict[plan.Cell, _Alone] = {}
        for cell in cells:
            try:
                found[cell] = self._alone(cell)
                rows[cell] = self._row(cell, found[cell])
            except OutOfTime as error:
                rows[cell] = Row.of(cell, *said_of(error))
                continue
            except Exception as error:
                rows[cell] = Row.of(cell, *said_of(error))
                _forget(error)
            self.meter.release()
        times, said = self._together(found)
        if times or said:
            self.meter.release()
        for cell, alone in found.items():
            if cell in times:
                found[cell] = replace(alone, times=times[cell])
            rows[cell] = replace(self._row(cell, found[cell], said), in_turns=cell in times)
        floor = next((r.step_ms for r in rows.values() if r.contestant == plan.FLOOR), None)
        return [replace(row, of_floor=share(row.step_ms, floor)) for row in rows.values()]

    def _weights(self, shape: plan.Shape) -> Frozen:
        old = self._frozen
        if old is None or (old.model, old.precision) != (shape.model, shape.precision):
            self._frozen = old = None  # before the next one: no card has room for two
            self.meter.release()
            self._frozen = Frozen(shape.model, shape.precision, self.meter.device, self.tiny)
        assert self._frozen is not None
        return self._frozen

    def _check_time(self) -> None:
        if self.clock() >= self.until:
            raise OutOfTime

    def _alone(self, cell: plan.Cell) -> _Alone:
        self._check_time()
        frozen = self._weights(cell.shape)
        with frozen.set_aside() if plan.keeps_its_own(cell) else nullcontext():
            self.meter.release()
            return self._measured(cell, frozen)

    def _measured(self, cell: plan.Cell, frozen: Frozen) -> _Alone:
        before = self.meter.held() or 0
        contestant = self.make(cell, frozen)
        found = _Alone(told=contestant.estimate, note=contestant.note)
        left = before - frozen.held
        if left > _LITTLE * frozen.nbytes:
            others = f"{left / 1e6:,.0f} MB of others were still on the card"
            found.note = "; ".join(filter(None, (found.note, others)))
        contestant.drive(self._watching(contestant, found))
        found.own -= before
        return found

    def _watching(self, contestant: Contestant, found: _Alone) -> Iterator[None]:
        """One step for each item; what lies between two is measured."""
        for _ in self._warming([contestant]):
            self._check_time()
            yield
        self.meter.begin()
        yield  # gets back from the driver what begin() gave away
        for _ in range(self.rounds.alone):
            self._check_time()
            started = self.meter.now()
            yield
            found.times.append(self.meter.now() - started)
        found.peak, found.own = self.meter.peak(), self.meter.held() or 0
        self._check_time()
        with self.meter.profiling() as profile:
            yield
        found.profile = profile

    def _warming(self, taking_part: Iterable[Contestant]) -> Iterator[None]:
        taking_part = list(taking_part)
        for number in range(_MOST_WARM_UP):
            if number >= self.rounds.warm_up and all(one.ready() for one in taking_part):
                return
            yield

    def _together(self, found: dict[plan.Cell, _Alone]) -> tuple[dict[plan.Cell, list[float]], str]:
        """Seconds of steps taken in turns, and what is to be said; nothing of a contestant who
        has no such times."""
        if len(found) < 2:
            return {}, ""
        if not self._fit(list(found.values())):
            return {}, ALONE
        times: dict[plan.Cell, list[float]] = {cell: [] for cell in found}
        said = ""
        try:
            self._check_time()
            frozen = self._weights(next(iter(found)).shape)
            made = {cell: self.make(cell, frozen, alone.told) for cell, alone in found.items()}
            # Who has a loop of its own leads, and lets the others run between two of its steps.
            led = sorted(made, key=lambda cell: made[cell].step is not None)
            made[led[0]].drive(self._in_turns(led, made, times))
        except Exception as error:
            said = f"timed alone: {said_of(error)[1]}"
            _forget(error)
        if min(map(len, times.values())) < min(_FEWEST, self.rounds.together):
            return {}, said
        return times, ""

    def _in_turns(
        self,
        led: list[plan.Cell],
        made: dict[plan.Cell, Contestant],
        times: dict[plan.Cell, list[float]],
    ) -> Iterator[None]:
        for _ in self._warming(made.values()):
            yield from self._round(led, made, {})
        for _ in range(self.rounds.together):
            taken: dict[plan.Cell, float] = {}
            yield from self._round(led, made, taken)
            for cell, seconds in taken.items():
                times[cell].append(seconds)

    def _round(
        self,
        led: list[plan.Cell],
        made: dict[plan.Cell, Contestant],
        taken: dict[plan.Cell, float],
    ) -> Iterator[None]:
        """One step each; ``led[0]`` takes its own where this yields."""
        leader, *others = led
        with torch.inference_mode(False), torch.enable_grad():
            for cell in others:
                step = made[cell].step
                assert step is not None, f"{cell.contestant} and {leader.contestant} both lead"
                self._check_time()
                started = self.meter.now()
                step()
                taken[cell] = self.meter.now() - started
        self._check_time()
        started = self.meter.now()
        yield
        taken[leader] = self.meter.now() - started

    def _fit(self, found: list[_Alone]) -> bool:
        """Whether all of them fit side by side, as far as the device tells."""
        room, held = self.meter.room(), self.meter.held()
        if room is None or held is None:
            return True
        passing = max(one.peak.allocated - one.own - held for one in found if one.peak)
        return held + sum(one.own for one in found) + max(0, passing) <= _FULL * room

    def _row(self, cell: plan.Cell, found: _Alone, note: str = "") -> Row:
        """What was found, in the units of a row."""
        seconds = statistics.median(found.times)
        row = Row.of(
            cell,
            MEASURED,
            "; ".join(filter(None, (found.note, note))),
            step_ms=1e3 * seconds,
            steps_timed=len(found.times),
            kernels=found.profile.kernels,
        )
        if found.profile.busy is not None:
            row = replace(row, idle=max(0.0, 1 - found.profile.busy / seconds))
        if found.peak is not None:
            allocated, reserved = found.peak.allocated / 1e6, found.peak.reserved / 1e6
            row = replace(row, peak_allocated_mb=allocated, peak_reserved_mb=reserved)
        return row if found.told is None else self._told(row, cell, found.told)

    def _told(self, row: Row, cell: plan.Cell, told: Estimate) -> Row:
        """With what the pack says of a run before it."""
        memory = told.memory.total / 1e6
        known = self._counted.setdefault(cell.shape.model, (told.memory, cell.config))
        return replace(
            row,
            told_ms=1e3 * told.seconds / cell.config.steps,
            told_mb=memory,
            scaled_mb=scaled(*known, cell.config).total / 1e6,
            told_of_taken=share(memory, row.peak_allocated_mb),
        )


def said_of(error: BaseException) -> tuple[str, str]:
    """The status of a cell that ended with ``error``, and a sentence."""
    if isinstance(error, OutOfTime):
        return NOT_REACHED, "the minutes were over"
    if isinstance(error, Missing):
        return MISSING, str(error)
    if any(is_out_of_memory(each) for each in _chain(error)):
        return NO_ROOM, f"out of memory: {first_line(error)[:200]}"
    return FAILED, f"{type(error).__name__}: {first_line(error)[:300]}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _forget(error: BaseException) -> None:
    """Let go of the tensors that the frames of ``error`` hold."""
    for each in _chain(error):
        traceback.clear_frames(each.__traceback__)
        each.__traceback__ = None
