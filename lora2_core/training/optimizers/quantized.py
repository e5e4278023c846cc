"""bitsandbytes' 8-bit moments: codes of 256 values, and one scale for each block of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

NUMBERS = 256  # that share one scale
SMALLEST = 4096  # numbers below which bitsandbytes keeps fp32


def opened(state: Mapping[str, Tensor], number: int) -> Tensor:
    """A moment in fp32."""
    moment = state[f"state{number}"]
    if moment.dtype != torch.uint8:
        return moment
    values = state[f"qmap{number}"].index_select(0, moment.flatten().int())
    scales = state[f"absmax{number}"].repeat_interleave(NUMBERS)[: values.numel()]
    return values.mul_(scales).view_as(moment)


def closed(moment: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """A moment in 8 bits, as large, and the scale of each block: the nearest codes.

    Not bitsandbytes' own function: on the CPU that makes 2e-5 of a 0, and it scales by the
    largest size although the smallest code is -0.993. Here a block that has not changed stays
    to the bit, so that moments do not wear out (17 % off after 40 changes of rank otherwise).
    """
    count = moment.numel()
    padded = torch.nn.functional.pad(moment.flatten(), (0, -count % NUMBERS))
    blocks = padded.view(-1, NUMBERS)
    scales = blocks.amax(1).clamp_min_(0) / code[-1]  # (blocks,)
    if code[0] < 0:
        scales = torch.maximum(scales, blocks.amin(1) / code[0])
    scaled = blocks / scales.where(scales > 0, 1)[:, None]
    places = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)
    if code[0] == 0:
        places.clamp_min_((scaled > 0).long())  # Adam divides by it: nothing may become 0
    return places.to(torch.uint8).flatten()[:count].view_as(moment), scales


def zero_of(code: Tensor) -> int:
    """The number that stands for 0."""
    return int(code.abs().argmin())


def code_of(optimizer: Any, number: int, parameter: nn.Parameter) -> Tensor:
    """The 256 values that a moment's 8 bits stand for; the same tensor for all parameters."""
    if "dynamic" not in optimizer.name2qmap:
        optimizer.fill_qmap()
    name = {1: "dynamic", 2: "udynamic"}[number]
    optimizer.name2qmap[name] = optimizer.name2qmap[name].to(parameter.device)
    return optimizer.name2qmap[name]
