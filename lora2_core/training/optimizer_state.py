"""What optimizers remember: through a change of rank, and through an end of the process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.rank_change import RankChange, ResizedWeight

_BLOCK = 256  # numbers that share one scale in bitsandbytes' blockwise states
_SMALLEST_EIGHT_BIT = 4096  # numbers below which bitsandbytes keeps fp32
_QUANTIZED = (1, 2)  # its two moments: state1 with qmap1 and absmax1, and so on
_NOT_KEPT = ("params", "lr")  # of a group; the schedule sets the rate before every step
_FLAT, _ORIGIN = "s", "p0"  # of Prodigy: as many numbers as the parameter, in one row


@torch.no_grad()
def follow(optimizer: torch.optim.Optimizer, change: RankChange) -> None:
    """Let ``optimizer`` hold the new weights of ``change`` in place of the old ones.

    Each state tensor of a weight's size (the moments of Adam) is resized as it was, so a surviving
    row trains on as if nothing had happened. Measured on a toy transformer with known true ranks:
    keeping the moments ends at FVU .173, dropping them at .191. 8-bit states are opened, resized
    and closed again, which moves them by a quantization step at most.
    """
    new_of = {weight.old: weight.new for weight in change.weights}
    for group in optimizer.param_groups:
        group["params"] = [new_of.get(p, p) for p in group["params"]]
    for weight in change.weights:
        state = optimizer.state.pop(weight.old, None)
        if state:
            optimizer.state[weight.new] = _resized(optimizer, state, weight)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that ``optimizer`` remembers, parameters by their place; a tree of tensors and
    plain values. Learning rates are not part of it. The tensors are the optimizer's own, since
    copies might not fit beside them: write or copy them before its next step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "parameters": {
            str(place): {k: v for k, v in optimizer.state[p].items() if not k.startswith("qmap")}
            for place, p in enumerate(parameters)
            if p in optimizer.state
        },
        "groups": [
            {k: v for k, v in group.items() if k not in _NOT_KEPT and _is_plain(v)}
            for group in optimizer.param_groups
        ],
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put a state of :func:`optimizer_state` into a fresh optimizer over equal parameters.

    Unlike ``Optimizer.load_state_dict`` it keeps every dtype: that casts states to the weight's.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for place, values in state["parameters"].items():
        parameter = parameters[int(place)]
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
    """bitsandbytes' moments, opened, resized, and closed again unless the tensor is too small."""
    out = {"step": state["step"]}
    for number in _QUANTIZED:
        out[f"state{number}"] = weight.resized(_opened(state, number))
    if weight.new.numel() < _SMALLEST_EIGHT_BIT:
        return out
    for number in _QUANTIZED:
        code = _map(optimizer, number, weight.new)
        closed, scales = _closed(out[f"state{number}"], code)
        out |= {f"state{number}": closed, f"absmax{number}": scales, f"qmap{number}": code}
    return out


def _opened(state: Mapping[str, Tensor], number: int) -> Tensor:
    """A moment in fp32."""
    moment = state[f"state{number}"]
    if moment.dtype != torch.uint8:
        return moment
    values = state[f"qmap{number}"].index_select(0, moment.flatten().int())
    scales = state[f"absmax{number}"].repeat_interleave(_BLOCK)[: values.numel()]
    return values.mul_(scales).view_as(moment)


def _closed(moment: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """A moment in 8 bits, as large, and the scale of each block: the nearest codes.

    Not bitsandbytes' own function: on the CPU that makes 2e-5 of a 0, and it scales by the
    largest size although the smallest code is -0.993. Here a block that has not changed stays
    to the bit, so that moments do not wear out (17 % off after 40 changes of rank otherwise).
    """
    count = moment.numel()
    padded = torch.nn.functional.pad(moment.flatten(), (0, -count % _BLOCK))
    blocks = padded.view(-1, _BLOCK)
    scales = blocks.amax(1).clamp_min_(0) / code[-1]  # (blocks,)
    if code[0] < 0:
        scales = torch.maximum(scales, blocks.amin(1) / code[0])
    scaled = blocks / scales.where(scales > 0, 1)[:, None]
    places = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)
    if code[0] == 0:
        places.clamp_min_((scaled > 0).long())  # Adam divides by it: nothing may become 0
    return places.to(torch.uint8).flatten()[:count].view_as(moment), scales


def _add_maps(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], parameter: nn.Parameter
) -> None:
    for number in _QUANTIZED:
        if f"absmax{number}" in state:
            state[f"qmap{number}"] = _map(optimizer, number, parameter)


def _map(optimizer: Any, number: int, parameter: nn.Parameter) -> Tensor:
    """The 256 values that a moment's 8 bits stand for; the same tensor for all parameters."""
    if "dynamic" not in optimizer.name2qmap:
        optimizer.fill_qmap()
    name = {1: "dynamic", 2: "udynamic"}[number]
    optimizer.name2qmap[name] = optimizer.name2qmap[name].to(parameter.device)
    return optimizer.name2qmap[name]
