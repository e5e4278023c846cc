"""What optimizers remember: through a change of rank, and through an end of the process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.rank_change import RankChange, ResizedWeight, apart
from ...adapters.stacks import WeightStack
from .quantized import NUMBERS, SMALLEST, closed, code_of, opened, zero_of

_QUANTIZED = (1, 2)  # bitsandbytes' two moments: state1 with qmap1 and absmax1, and so on
_NOT_KEPT = ("params", "lr")  # of a group; the schedule sets the rate before every step
_FLAT, _ORIGIN = "s", "p0"  # of Prodigy: as many numbers as the parameter, in one row


@torch.no_grad()
def follow(optimizer: torch.optim.Optimizer, change: RankChange) -> None:
    """Let ``optimizer`` hold the new weights of ``change`` in place of the old ones.

    Each state tensor of a weight's size (the moments of Adam) is resized as it was, so a surviving
    row trains on as if nothing had happened. Measured on a toy transformer with known true ranks:
    keeping the moments ends at FVU .173, dropping them at .191. 8-bit moments stay as they are,
    too, where a stack keeps the blocks of components apart.
    """
    new_of = {weight.old: weight.new for weight in change.weights}
    for group in optimizer.param_groups:
        group["params"] = [new_of.get(p, p) for p in group["params"]]
    for weight in change.weights:
        state = optimizer.state.pop(weight.old, None)
        if state:
            optimizer.state[weight.new] = _resized(optimizer, state, weight)


def optimizer_state(
    optimizer: torch.optim.Optimizer, stacks: Sequence[WeightStack] = ()
) -> dict[str, Any]:
    """Everything that ``optimizer`` remembers, a tree of tensors and plain values: of ``stacks``
    by component and side, of other parameters by their place. Learning rates are not part of it.
    The tensors are the optimizer's own, since copies might not fit beside them: write or copy them
    before its next step."""
    sides = [(stack, stack.down, "down") for stack in stacks]
    sides += [(stack, stack.up, "up") for stack in stacks]
    stacked = {weight for _, weight, _ in sides}
    others = [p for group in optimizer.param_groups for p in group["params"] if p not in stacked]
    return {
        "components": {
            f"{component}.{side}": _of_rows(optimizer.state[weight], weight, stack, place)
            for stack, weight, side in sides
            if weight in optimizer.state
            for place, component in enumerate(stack.components)
        },
        "parameters": {
            str(place): {k: v for k, v in optimizer.state[p].items() if not k.startswith("qmap")}
            for place, p in enumerate(others)
            if p in optimizer.state
        },
        "groups": [
            {k: v for k, v in group.items() if k not in _NOT_KEPT and _is_plain(v)}
            for group in optimizer.param_groups
        ],
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    stacks: Sequence[WeightStack] = (),
) -> None:
    """Put a state of :func:`optimizer_state` into a fresh optimizer over equal parameters.

    ``stacks`` may lay out their rows otherwise than those that the state is of. Unlike
    ``Optimizer.load_state_dict`` it keeps every dtype: that casts states to the weight's.
    """
    if stacks and "components" not in state:
        state = {**state, "components": _by_component(optimizer, state["parameters"], stacks)}
        state["parameters"] = {}
    for stack in stacks:
        for weight, side in ((stack.down, "down"), (stack.up, "up")):
            names = [f"{component}.{side}" for component in stack.components]
            kept = [state["components"].get(name) for name in names]
            if any(kept):
                optimizer.state[weight] = _stacked(optimizer, kept, weight, stack)
    stacked = {weight for stack in stacks for weight in (stack.down, stack.up)}
    others = [p for group in optimizer.param_groups for p in group["params"] if p not in stacked]
    for place, values in state["parameters"].items():
        parameter = others[int(place)]
        optimizer.state[parameter] = {
            name: _on_device(value, parameter) if torch.is_tensor(value) else value
            for name, value in values.items()
        }
        _add_maps(optimizer, optimizer.state[parameter], parameter)
    for group, values in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update(values)


def _on_device(value: Tensor, parameter: nn.Parameter) -> Tensor:
    return value.to(parameter.device).clone()


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _resized(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], weight: ResizedWeight
) -> dict[str, Any]:
    if "state1" in state:
        return _resized_blocks(optimizer, state, weight)
    shape = weight.old.shape
    out = {}
    for name, value in state.items():
        if name == _ORIGIN:
            out[name] = _resized_origin(value, weight)
        elif torch.is_tensor(value) and value.shape == shape:
            out[name] = weight.resized(value)
        elif name == _FLAT:
            out[name] = weight.resized(value.view(shape)).flatten()
        else:
            out[name] = value
    return out


def _resized_origin(origin: Tensor, weight: ResizedWeight) -> Tensor:
    """Where Prodigy saw a weight begin; new rows begin where they were drawn.

    It takes its step size from the way since then: from zeros, that draw would count as travelled.
    """
    if not origin.ndim:  # one 0 for all: the weight began at zeros
        if not weight.grew:
            return origin
        origin = origin.expand(weight.old.numel())
    return weight.begun(origin.view(weight.old.shape)).flatten()


def _resized_blocks(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], weight: ResizedWeight
) -> dict[str, Any]:
    """bitsandbytes' moments: codes that move with their blocks, or opened, resized and closed."""
    out = {"step": state["step"]}
    codes = all(state[f"state{number}"].dtype == torch.uint8 for number in _QUANTIZED)
    width, move = weight.old.shape[1], weight.move
    whole = all(apart(slots, width, NUMBERS) for slots in (move.old, move.new))
    if codes and whole and weight.new.numel() >= SMALLEST:
        for number in _QUANTIZED:
            code = code_of(optimizer, number, weight.new)
            out[f"state{number}"] = weight.resized(state[f"state{number}"], zero_of(code))
            out[f"absmax{number}"] = weight.blocks(state[f"absmax{number}"], NUMBERS)
            out[f"qmap{number}"] = code
        return out
    for number in _QUANTIZED:
        out |= _closed_if_large(
            optimizer, weight.resized(opened(state, number)), number, weight.new
        )
    return out


def _closed_if_large(
    optimizer: torch.optim.Optimizer, moment: Tensor, number: int, weight: nn.Parameter
) -> dict[str, Tensor]:
    """A moment as bitsandbytes keeps it, which is in fp32 where the weight is small."""
    if weight.numel() < SMALLEST:
        return {f"state{number}": moment}
    code = code_of(optimizer, number, weight)
    values, scales = closed(moment, code)
    return {f"state{number}": values, f"absmax{number}": scales, f"qmap{number}": code}


# --- a stack and its components ---------------------------------------------------------------


def _of_rows(
    state: Mapping[str, Any], weight: nn.Parameter, stack: WeightStack, place: int
) -> dict[str, Any]:
    """What is remembered of one component of a stack: views without rows of zeros."""
    slot, width = stack.slots[place], weight.shape[1]
    first, numbers = slot.start * width, slot.rank * width
    blocks = slice(first // NUMBERS, first // NUMBERS + -(-numbers // NUMBERS))
    if "absmax1" in state and not apart(stack.slots, width, NUMBERS):  # each gets its numbers
        whole = {f"state{n}": opened(state, n).view_as(weight) for n in _QUANTIZED}
        return {"step": state["step"], **{k: v[slot.rows] for k, v in whole.items()}}
    out = {}
    for name, value in state.items():
        if name.startswith("qmap"):
            continue
        if name.startswith("absmax"):
            out[name] = value[blocks]
        elif torch.is_tensor(value) and value.numel() == weight.numel():
            out[name] = value.view_as(weight)[slot.rows]
        else:
            out[name] = value
    return out


def _stacked(
    optimizer: torch.optim.Optimizer,
    kept: Sequence[Mapping[str, Any] | None],
    weight: nn.Parameter,
    stack: WeightStack,
) -> dict[str, Any]:
    """What :func:`_of_rows` gave of every component, for the whole stack; None: nothing yet."""
    found = [values for values in kept if values]
    out: dict[str, Any] = {}
    for name, value in found[0].items():
        if name.startswith(("absmax", "state")):
            continue
        if all(not torch.is_tensor(one[name]) or not one[name].ndim for one in found):
            out[name] = _on_device(value, weight) if torch.is_tensor(value) else value
            continue
        rows = weight.new_zeros(weight.shape)
        for one, slot in zip(kept, stack.slots, strict=True):
            if one is not None:
                part = one[name].to(weight.device)
                rows[slot.rows] = part.view(slot.rank, -1) if part.ndim else part
        out[name] = rows.flatten() if name in (_FLAT, _ORIGIN) else rows
    for number in _QUANTIZED:
        if f"state{number}" in found[0]:
            out |= _stacked_moment(optimizer, kept, number, weight, stack)
    return out


def _stacked_moment(
    optimizer: torch.optim.Optimizer,
    kept: Sequence[Mapping[str, Any] | None],
    number: int,
    weight: nn.Parameter,
    stack: WeightStack,
) -> dict[str, Tensor]:
    """One of bitsandbytes' moments: codes as they are where every block is one component's."""
    state, scales = f"state{number}", f"absmax{number}"
    code, width = code_of(optimizer, number, weight), weight.shape[1]
    codes = all(one is None or one[state].dtype == torch.uint8 for one in kept)
    if codes and weight.numel() >= SMALLEST and apart(stack.slots, width, NUMBERS):
        values = torch.full_like(weight, zero_of(code), dtype=torch.uint8)
        sizes = weight.new_zeros(-(-weight.numel() // NUMBERS))
        for one, slot in zip(kept, stack.slots, strict=True):
            if one is not None:
                values[slot.rows] = one[state].to(weight.device).view(slot.rank, width)
                first = slot.start * width // NUMBERS
                sizes[first : first + len(one[scales])] = one[scales].to(weight.device)
        return {state: values, scales: sizes, f"qmap{number}": code}
    moment = weight.new_zeros(weight.shape)
    for one, slot in zip(kept, stack.slots, strict=True):
        if one is not None:
            on_device = {k: v.to(weight.device) for k, v in one.items() if torch.is_tensor(v)}
            part = opened({**on_device, f"qmap{number}": code}, number)
            moment[slot.rows] = part.view(slot.rank, width)
    return _closed_if_large(optimizer, moment, number, weight)


def _by_component(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Mapping[str, Any]],
    stacks: Sequence[WeightStack],
) -> dict[str, dict[str, Any]]:
    """What a checkpoint from before stacks remembers, by component and side.

    It counts the A of a group's components, then their B, each (out, rank), then the next group.
    """
    found, place = {}, 0
    slots = {
        c: slot for stack in stacks for c, slot in zip(stack.components, stack.slots, strict=True)
    }
    for group in optimizer.param_groups:
        own = {id(weight) for weight in group["params"]}
        within = [stack for stack in stacks if id(stack.down) in own]
        components = sorted(component for stack in within for component in stack.components)
        for side in ("down", "up"):
            for component in components:
                if values := parameters.get(str(place)):
                    if side == "up":
                        values = _turned(optimizer, values, slots[component].rank, stacks[0].up)
                    found[f"{component}.{side}"] = values
                place += 1
    return found


def _turned(
    optimizer: torch.optim.Optimizer, values: Mapping[str, Any], rank: int, weight: nn.Parameter
) -> dict[str, Any]:
    """What is remembered of a B, (out, rank), as that of B transposed."""
    out = {}
    for name, value in values.items():
        if name.startswith("state"):
            number = int(name.removeprefix("state"))
            on_device = {k: v.to(weight.device) for k, v in values.items() if torch.is_tensor(v)}
            code = {f"qmap{number}": code_of(optimizer, number, weight)}
            out[name] = opened({**on_device, **code}, number).view(-1, rank).t()
        elif not name.startswith("absmax"):
            turns = torch.is_tensor(value) and value.ndim
            out[name] = value.view(-1, rank).t() if turns else value
    return out


def _add_maps(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], parameter: nn.Parameter
) -> None:
    for number in _QUANTIZED:
        if f"absmax{number}" in state:
            state[f"qmap{number}"] = code_of(optimizer, number, parameter)
