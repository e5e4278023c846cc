"""The adapters of one model: which layers, their ν, their ranks, and how those change.

The network knows torch modules, and nothing of ComfyUI or of optimizers. It replaces the chosen
layers of the model it is given by adapters around them; give it a private copy. What it may take
stands in :mod:`.budget`, one adapter in :mod:`.layers`, which of them compute together in
:mod:`.grouping`, and what others must know of new ranks in :mod:`.rank_change`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import adaptive_rank
from ..config.ranks import RankConfig
from ..files.component import Component
from .budget import RankBudget, expected_bytes, plan_budget
from .frozen import computes_in
from .grouping import ATTENDED, ProjectionGroup, joined
from .layers import AdaptiveLoRA, wrap
from .rank_change import RankChange
from .stacks import WeightStack
from .swapping import computes_on
from .targets import Target

_COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST_STACK = 1 << 26  # numbers of an A or a B, 256 MB: what a resize needs once more


class AdaptiveRankNetwork(nn.Module):
    """Adapters on ``targets`` of ``model`` (or of several, by root), all ν in one fp32 tensor.

    ``log_nu``: (L,) parameter; ``ranks``: the L ranks in use now. ν is learnt as its logarithm
    (ours; the paper is silent): 500 Adam steps then span rank 512 to 1, which a plain ν at
    5e-5 a step cannot. A step is :meth:`refresh`, forward and backward, an optimizer's
    step, :meth:`clamp_nu` and :meth:`resize`; what is saved is :meth:`components`, and what goes
    on in another process :meth:`state`. ``budget``: where it has been planned already.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        targets: Sequence[Target],
        config: RankConfig,
        seed: int = 0,
        budget: RankBudget | None = None,
    ):
        super().__init__()
        self.targets = tuple(targets)
        self.config = config
        self._generator = torch.Generator().manual_seed(seed)
        self.budget = plan_budget(self.targets, config) if budget is None else budget
        roots = {"unet": model} if isinstance(model, nn.Module) else model
        bases = [roots[target.root].get_submodule(target.name) for target in self.targets]
        self._device = computes_on(bases[0])
        self.rank_weights = self.budget.weights.to(self._device)  # (G, L)
        self.target_ranks = torch.tensor(self.budget.targets, device=self._device)  # (G,)
        nu = self.budget.start_nu(config)
        ranks = self._ranks_for(nu)
        self.log_nu = nn.Parameter(nu.log().to(self._device))
        low, high = self.budget.log_nu_bounds(config.quantile)
        self._log_nu_bounds = low.to(self._device), high.to(self._device)
        adapters = [wrap(base) for base in bases]
        self.adapters = nn.ModuleList(adapters)
        self._groups: list[list[ProjectionGroup]] = []  # of each stack
        self._strength = 1.0  # of all components, see at_strength
        self.stacks = nn.ModuleList(self._stacks(ranks.tolist()))
        self._init_weights(nu, ranks)
        for target, adapter in zip(self.targets, adapters, strict=True):
            parent, _, child = target.name.rpartition(".")
            setattr(roots[target.root].get_submodule(parent), child, adapter)
        self._begin()

    def _stacks(self, ranks: Sequence[int]) -> Iterator[WeightStack]:
        """Stacks for all components: one for each pair of widths, or several where it is huge."""
        for places in self._shelves(ranks):
            components = [component for group in places for component in group]
            first = self.layers[components[0]]
            widths, dtype = (first.in_features, first.out_features), _computes_in(first.base)
            own = [ranks[component] for component in components]
            stack = WeightStack(components, *widths, own, dtype, self._device, len(places[0]))
            groups, begin = [], 0
            for group in places:
                members = [self.layers[component] for component in group]
                for place, layer in enumerate(members, begin):
                    layer.hold(stack, place)
                held = range(begin, begin + len(group))
                names = [self.targets[component].name.rpartition(".")[2] for component in group]
                groups.append(ProjectionGroup(members, stack, held, ATTENDED.issuperset(names)))
                for place, layer in enumerate(members):
                    layer.group = groups[-1], place
                begin += len(group)
            self._groups.append(groups)
            yield stack

    def _shelves(self, ranks: Sequence[int]) -> list[list[list[int]]]:
        """Groups of components, by the stack that they belong to."""
        shelves: dict[tuple, list[list[list[int]]]] = {}
        for group in joined(self._names(), self.layers, ranks):
            layer, text = self.layers[group[0]], self.targets[group[0]].root != "unet"
            widths = layer.in_features, layer.out_features
            kind = text, *widths, len(group), _computes_in(layer.base)
            alike = shelves.setdefault(kind, [[]])
            rows = sum(ranks[component] for part in (*alike[-1], group) for component in part)
            if alike[-1] and rows * max(widths) > _LARGEST_STACK:
                alike.append([])
            alike[-1].append(group)
        return [shelf for alike in shelves.values() for shelf in alike]

    @property
    def layers(self) -> list[AdaptiveLoRA]:
        return list(self.adapters)  # type: ignore[arg-type]

    @property
    def ranks(self) -> list[int]:
        return list(self._ranks)

    @property
    def max_ranks(self) -> Tensor:
        """The largest rank of every component, (L,) int64."""
        return self.budget.max_ranks

    @property
    def nu(self) -> Tensor:
        """ν of every component, (L,), with gradient to ``log_nu``."""
        return self.log_nu.exp()

    def weights(self, text: bool | None = None) -> list[nn.Parameter]:
        """The stacks' A, then their B; only the text encoders' or only the U-Net's."""
        stacks = [
            stack
            for stack in self.all_stacks
            if text is None or text == (self.targets[stack.components[0]].root != "unet")
        ]
        return [stack.down for stack in stacks] + [stack.up for stack in stacks]

    @property
    def all_stacks(self) -> list[WeightStack]:
        return list(self.stacks)  # type: ignore[arg-type]

    def keep_apart(self, numbers: int) -> None:
        """Let no block of so many numbers of a weight belong to two components; before training.

        8-bit moments share one scale a block: a component that grows must not move those of
        another. Makes new parameters where rows have to move.
        """
        if any([stack.keep_apart(numbers) for stack in self.all_stacks]):
            self._begin()

    def refresh(self) -> None:
        """Recompute every Λ (eq. 10), and what layers compute with, for the step to come."""
        self._renew_importance()
        rooms: list[Tensor] = []
        copies: list[Tensor] = []
        for stack, groups in zip(self.all_stacks, self._groups, strict=True):
            plain = self.config.mode == "fixed" and not stack.padded and self._strength == 1
            down, up = stack.folded(None if plain else stack.importance)
            rows = [group.rows for group in groups]
            for group, *sides in zip(groups, down.split(rows), up.split(rows), strict=True):
                group.compute_with(*sides)
                if (room := group.room_for(sides[0])) is not None:
                    rooms.append(room)
                    copies.append(sides[0].detach())
        if rooms:
            torch._foreach_copy_(rooms, copies)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """Inside, every ΔW is ``strength`` times what it is: in what is computed with, and in
        :meth:`components`. :meth:`refresh` makes it so, there and afterwards."""
        before, self._strength = self._strength, strength
        try:
            yield
        finally:
            self._strength = before

    def _renew_importance(self) -> None:
        """One call for every Λ, in the order of the stacks' rows; 0 in rows that are nobody's."""
        flat = adaptive_rank.importance_at(
            self.nu[self._component], self._position, self.config.mode
        )  # (Σ rows,)
        if self._used is not None:
            flat = flat * self._used
        if self._strength != 1:
            flat = flat * self._strength
        rows = [stack.rows for stack in self.all_stacks]
        for stack, importance in zip(self.all_stacks, flat.split(rows), strict=True):
            stack.importance = importance

    def folded(self) -> list[Tensor]:
        """What layers compute with in this step: ΛA and B, views of one tensor a stack and side."""
        return [part for groups in self._groups for group in groups for part in group.computes_with]

    def let_go(self) -> None:
        """Forget what layers compute with. Until :meth:`refresh` each folds its own anew."""
        for groups in self._groups:
            for group in groups:
                group.compute_with()

    def mean_rank(self) -> tuple[float, ...]:
        """Mean of the ranks in use of every group, (G,), weighted as its budget is."""
        return self.budget.mean_ranks(self._ranks)

    def expected_bytes(self) -> int:
        """Size of the file to expect, see :func:`.budget.expected_bytes`."""
        return expected_bytes(self.targets, self.budget, self.config, self.ranks)

    @torch.no_grad()
    def clamp_nu(self) -> None:
        """Keep ν where it still decides a rank, so that a component can always come back."""
        self.log_nu.clamp_(*self._log_nu_bounds)

    @torch.no_grad()
    def resize(self, nu: Tensor) -> RankChange:
        """Grow or shrink every component to the rank its ν asks for.

        ``nu``: (L,) on the CPU. Rows that stay keep their weights; new rows of A are drawn, new
        columns of B are zero or drawn as configured (section 3.3). Optimizers and averages of the
        replaced parameters must follow the change.
        """
        current = torch.tensor(self._ranks)
        wanted = self._ranks_for(nu)
        if self.config.hysteresis:
            wanted = adaptive_rank.hysteresis(current, wanted)
        changed = (wanted != current).nonzero().flatten().tolist()
        if not changed:
            return RankChange()
        stds = adaptive_rank.init_std(nu, wanted)[changed]
        ranks, touched = wanted.tolist(), set(changed)
        stacks = [stack for stack in self.all_stacks if not touched.isdisjoint(stack.components)]
        # All are made before one is put to use, so that a lack of memory changes none.
        moved = [stack.move_to([ranks[c] for c in stack.components]) for stack in stacks]
        for stack, sides in zip(stacks, moved, strict=True):
            stack.take(*sides)
        for component, std in zip(changed, stds, strict=True):
            old, new = self._ranks[component], ranks[component]
            if new > old:
                self._draw_rows(self.layers[component], slice(old, new), std)
        self._index_ranks()
        self._renew_importance()
        self.let_go()  # the next step folds what there is then
        downs, ups = zip(*moved, strict=True)
        return RankChange((*downs, *ups), len(changed))

    @torch.no_grad()
    def components(self) -> list[Component]:
        """Every component as it is now, detached, on the CPU, convolutions in their own shape."""
        self.refresh()
        nus = self.nu.tolist()
        return [
            _component(target, layer, nu)
            for target, layer, nu in zip(self.targets, self.layers, nus, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """Copies of all that training changes: A, B, ν, ranks, and the generator of new rows."""
        return {
            "log_nu": self.log_nu.detach().clone(),
            "ranks": self.ranks,
            "generator": self._generator.get_state(),
            "layers": {
                name: {
                    "down": layer.lora_down.detach().clone(),
                    "up": _laid_out(layer.lora_up),
                }
                for name, layer in zip(self._names(), self.layers, strict=True)
            },
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Become, bit by bit, the network that ``state`` was taken from.

        A and B become new parameters of the saved ranks; ν stays the parameter it is. Optimizers
        and averages of the old parameters are void: make them after this. Raises ValueError, and
        changes nothing, when the state is that of other layers or is damaged.
        """
        saved = [state["layers"].get(name, {}) for name in self._names()]
        fits = len(saved) == len(state["layers"]) and state["log_nu"].shape == self.log_nu.shape
        for layer, rank, sides in zip(self.layers, state["ranks"], saved, strict=False):
            shapes = [tuple(sides[side].shape) for side in ("down", "up") if side in sides]
            fits &= shapes == [(rank, layer.in_features), (layer.out_features, rank)]
        if not fits or len(state["ranks"]) != len(saved):
            raise ValueError(
                "The saved state belongs to other layers than this network adapts: use the "
                "targets, the model and the settings that it was saved with, or start anew."
            )
        for stack in self.all_stacks:
            own = [saved[component] for component in stack.components]
            stack.become([sides["down"] for sides in own], [sides["up"] for sides in own])
        self.log_nu.copy_(state["log_nu"])
        self.log_nu.grad = None
        self._generator.set_state(state["generator"])
        self._begin()

    def _names(self) -> list[str]:
        return [f"{target.root}.{target.name}" for target in self.targets]

    def _ranks_for(self, nu: Tensor) -> Tensor:
        return self.budget.ranks_for(nu, self.config.quantile)

    def _init_weights(self, nu: Tensor, ranks: Tensor) -> None:
        stds = adaptive_rank.init_std(nu, ranks)
        for layer, std in zip(self.layers, stds, strict=True):
            layer.init_down(self._down_std(std), slice(0, layer.rank), self._generator)

    def _down_std(self, std: Tensor) -> float | None:
        # None: the usual Kaiming initialisation, better with f/f₁ (measured .156 against .173).
        return float(std) if self.config.mode == "paper" else None

    def _draw_rows(self, layer: AdaptiveLoRA, rows: slice, std: Tensor) -> None:
        layer.init_down(self._down_std(std), rows, self._generator)
        if self.config.growth == "random":
            layer.init_up(self.config.growth_std, rows, self._generator)

    def _begin(self) -> None:
        """Be ready to compute with rows as they lie now."""
        self._index_ranks()
        with torch.no_grad():
            self.refresh()

    def _index_ranks(self) -> None:
        """Which component and which 1-based position each row of the stacks belongs to."""
        self._ranks = [layer.rank for layer in self.layers]
        pairs = [
            (component, slot)
            for stack in self.all_stacks
            for component, slot in zip(stack.components, stack.slots, strict=True)
        ]
        counts = torch.tensor([slot.capacity for _, slot in pairs])
        component = torch.repeat_interleave(torch.tensor([c for c, _ in pairs]), counts)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)  # (Σ rows,)
        position = torch.arange(1, len(first) + 1) - first
        self._component, self._position = component.to(self._device), position.to(self._device)
        used = position <= torch.tensor(self._ranks)[component]
        self._used = None if bool(used.all()) else used.to(self._device)  # else rows of zeros


def _computes_in(base: nn.Module) -> torch.dtype:
    """What a layer is expected to be asked in: its own type, unless nothing is computed in that."""
    found = computes_in(base)
    return found if found in _COMPUTED_IN else torch.float32


def _laid_out(view: Tensor) -> Tensor:
    return view.detach().clone(memory_format=torch.contiguous_format)


def _component(target: Target, layer: AdaptiveLoRA, nu: float) -> Component:
    down = layer.lora_down.detach().cpu().clone()  # (rank, in)
    up = _laid_out(layer.lora_up.cpu())  # (out, rank)
    kernel = getattr(layer, "kernel", None)
    if kernel is not None:
        down, up = down.view(-1, *kernel), up[:, :, None, None]
    importance = layer.importance.detach().cpu().clone()
    return Component(target.name, down, up, importance, nu, target.root)
