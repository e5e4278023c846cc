"""What lies in stacks, by component; and adapters with a stack of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lora2_pack.lora2_core.adapters.grouping import ProjectionGroup
from lora2_pack.lora2_core.adapters.layers import AdaptiveLoRA, wrap
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.rank_change import RowMove, slots_of
from lora2_pack.lora2_core.adapters.stacks import WeightStack
from torch import Tensor, nn

SIDES = ("down", "up")


def own(weight: nn.Parameter) -> Tensor:
    return weight.detach()


def grad_of(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def places(net: AdaptiveRankNetwork) -> list[tuple[WeightStack, int]]:
    """The stack of every component and its place there, in the network's order."""
    found = {
        component: (stack, place)
        for stack in net.all_stacks
        for place, component in enumerate(stack.components)
    }
    return [found[component] for component in range(len(net.targets))]


def by_component(
    net: AdaptiveRankNetwork, of: Callable[[nn.Parameter], Tensor] = own
) -> list[Tensor]:
    """A and B of each component in turn, or what ``of`` makes of their stack's: views whose rows
    are ranks."""
    return [
        of(weight).view_as(weight)[stack.slots[place].rows]
        for stack, place in places(net)
        for weight in (stack.down, stack.up)
    ]


def move(old: Sequence[int], new: Sequence[int], multiple: int = 1) -> RowMove:
    """From ranks to ranks, each slot padded to a multiple."""
    return RowMove(slots_of(old, multiple), slots_of(new, multiple))


def held(
    layers: Sequence[AdaptiveLoRA],
    ranks: Sequence[int],
    dtype: torch.dtype = torch.float32,
    attended: bool = False,
) -> WeightStack:
    """Have adapters of equal widths in one stack, one group of them all."""
    widths, count = (layers[0].in_features, layers[0].out_features), len(layers)
    stack = WeightStack(range(count), *widths, ranks, dtype, torch.device("cpu"), count)
    for place, layer in enumerate(layers):
        layer.hold(stack, place)
    group = ProjectionGroup(layers, stack, range(count), attended)
    for place, layer in enumerate(layers):
        layer.group = group, place
    return stack


def begin_step(layers: Sequence[AdaptiveLoRA]) -> None:
    """Fold the stack of :func:`held` for a step, as the network does it."""
    stack, group = layers[0]._held[0], layers[0].group[0]
    down, up = stack.folded(stack.importance)
    group.compute_with(down, up)
    if (room := group.room_for(down)) is not None:
        room.copy_(down.detach())


def alone(base: nn.Module, rank: int) -> AdaptiveLoRA:
    """An adapter with random A, B and Λ in a stack of its own, folded."""
    layer = wrap(base)
    stack = held([layer], [rank], next(base.parameters()).dtype)
    randomise([layer])
    stack.importance = torch.exp(-0.3 * torch.arange(stack.rows))
    begin_step([layer])
    return layer


@torch.no_grad()
def randomise(layers: Sequence[AdaptiveLoRA], std: float = 1.0) -> None:
    """Draw A and B of layers. Nothing computes with them before the next step begins."""
    for n, layer in enumerate(layers):
        generator = torch.Generator().manual_seed(5 + n)
        layer.lora_down.normal_(0, std, generator=generator)
        layer.lora_up.normal_(0, std, generator=generator)
