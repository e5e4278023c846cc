"""A LoRA in memory made smaller: fewer columns a component, nothing else changed.

What :mod:`.resize` writes to a file, :func:`shrink` does to tensors that are to be applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..config.load import Limits
from ..files.component import Component, decompose_quickly, within_bounds
from ..files.decode import component_of, put_component, stored_magnitudes
from ..files.header import LoRAFileError, TensorShape
from ..files.keys import DORA_SCALE, Pair, counted
from ..files.kohya_names import kohya_name
from ..files.metadata import VERSION
from ..files.raw.tensors import shape_in_file
from ..files.read import LoRAFile, learnt_nus
from .beside import kept_keys, kinds_of, magnitudes_alone
from .choice import NoRoom, Part, part_to_cut
from .frame import Frame, frame_of_one, last_byte


def shrink(file: LoRAFile, limits: Limits) -> LoRAFile:
    """``file`` within ``limits``, under the same keys.

    Of LoRAs of two factors a component, by any trainer; what else the file holds stays as it is.
    A component may go altogether. Ranks are those of the file that :func:`.resize.resize_file`
    would write, whose whole size is what is limited.
    Raises LoRAFileError where the size has no room for anything.
    """
    if limits.nothing:
        return file
    state, pairs = file.state, file.parsed.pairs
    cut = [p for p in pairs if not magnitudes_alone(p, state[p.down], state[p.up])]
    svd, nu = limits.order == "svd", learnt_nus(file.metadata)
    end = last_byte(file.nbytes or sum(tensor.nbytes for tensor in state.values()))
    parts = [
        part_to_cut(_component(state, pair, nu.get(pair.name)), svd, end, _magnitudes(state, pair))
        for pair in cut
    ]
    whole = [pair for pair in pairs if pair not in cut]
    frame = frame_of_one(file.metadata, file.name, limits, _beside(file, whole))
    ranks = _chosen(file, parts, frame) if parts else []
    out = dict(state)
    for pair, part, rank in zip(cut, parts, ranks, strict=True):
        if rank < state[pair.down].shape[0] or svd or limits.megabytes is not None:
            component = _component(state, pair)
            component = decompose_quickly(component) if svd else component
            put_component(out, pair, component.first(rank), not rank or part.half[rank - 1])
    if pairs and not file.parsed.others and not any(pair.down in out for pair in pairs):
        one = pairs[0]  # of rank 0: whoever loads it knows why there is nothing to patch
        out |= {one.down: state[one.down][:0], one.up: state[one.up][:, :0]}
    return file.with_state(out)


def _component(state: Mapping[str, Tensor], pair: Pair, nu: float | None = None) -> Component:
    """As it is cut; its name is that of a file of ours."""
    component = component_of(state, pair, kohya_name(pair.name))
    return within_bounds(replace(component, nu=nu))


def left_whole(file: LoRAFile, limits: Limits) -> str:
    """For a person: what ``limits`` do not reach in ``file``, by kind and number; empty where
    there is nothing of that kind, or nothing is limited."""
    options = {
        "max_rank": limits.max_rank,
        "keep_energy": None if limits.energy == 1 else limits.energy,
        "megabytes": limits.megabytes,
    }
    asked = [name for name, value in options.items() if value is not None]
    kinds = kinds_of(file.parsed, {key: tuple(t.shape) for key, t in file.state.items()})
    kinds.pop("ia3", None)
    if limits.nothing or not kinds:
        return ""
    told = " and ".join(counted(count, kind) for kind, count in kinds.items())
    verb = "is" if sum(kinds.values()) == 1 else "are"
    cut = "cuts" if len(asked) == 1 else "cut"
    return f"{told} {verb} loaded whole: {' and '.join(asked)} {cut} pairs of factors alone."


def _chosen(file: LoRAFile, parts: Sequence[Part], frame: Frame) -> list[int]:
    """The ranks of the file that :mod:`.resize` would write. Raises LoRAFileError."""
    own = file.nbytes if file.nbytes and VERSION in file.metadata else None
    try:
        return frame.choose(parts, own)
    except NoRoom as lack:
        uncut = f" beside the {lack.held / 1e6:.4g} MB that have no ranks to cut"
        raise LoRAFileError(
            f"megabytes is {lack.limit / 1e6:g}, which has no room for a single component of this "
            f"LoRA{uncut if lack.held else ''} and its metadata; choose at least {lack.least:.4g}."
        ) from None


def _beside(file: LoRAFile, whole: Sequence[Pair]) -> dict[str, TensorShape]:
    """What stays as it is, and goes into a smaller file."""
    keys = [*kept_keys(file.parsed), *file.parsed.lonely, *(k for pair in whole for k in pair.keys)]
    return {key: shape_in_file(file.state[key]) for key in keys}


def _magnitudes(state: Mapping[str, Tensor], pair: Pair) -> dict[str, Tensor]:
    """What goes with the factors of a DoRA."""
    key = pair.dora_scale
    return {} if key is None else {DORA_SCALE: stored_magnitudes(key, state[key])}
