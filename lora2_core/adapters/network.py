"""The adapters of one model: which layers, their ν, their ranks, and how those change.

The network knows torch modules, and nothing of ComfyUI or of optimizers. It replaces the chosen
layers of the model it is given by adapters around them; give it a private copy. What it may take
stands in :mod:`.budget`, one adapter in :mod:`.layers`, which of them compute together in
:mod:`.grouping`, and what others must know of new ranks in :mod:`.rank_change`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import adaptive_rank
from ..config.ranks import RankConfig
from ..files.component import Component
from .budget import RankBudget, expected_bytes, plan_budget
from .grouping import join_projections
from .layers import AdaptiveLoRA, wrap
from .rank_change import RankChange, ResizedWeight
from .targets import Target


class AdaptiveRankNetwork(nn.Module):
    """Adapters on ``targets`` of ``model`` (or of several, by root), all ν in one fp32 tensor.

    ``log_nu``: (L,) parameter; ``ranks``: the L ranks in use now. ν is learnt as its logarithm
    (ours; the paper is silent): 500 Adam steps then span rank 512 to 1, which a plain ν at
    5e-5 a step cannot. A step is :meth:`refresh_importance`, forward and backward, an optimizer's
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
        layers = [roots[target.root].get_submodule(target.name) for target in self.targets]
        self._device = next(layers[0].parameters()).device
        self.rank_weights = self.budget.weights.to(self._device)  # (G, L)
        self.target_ranks = torch.tensor(self.budget.targets, device=self._device)  # (G,)
        nu = self.budget.start_nu(config)
        ranks = self._ranks_for(nu)
        self.log_nu = nn.Parameter(nu.log().to(self._device))
        low, high = self.budget.log_nu_bounds(config.quantile)
        self._log_nu_bounds = low.to(self._device), high.to(self._device)
        adapters = [wrap(base, rank) for base, rank in zip(layers, ranks.tolist(), strict=True)]
        self.adapters = nn.ModuleList(adapters)
        self._init_weights(nu, ranks)
        for target, adapter in zip(self.targets, adapters, strict=True):
            parent, _, child = target.name.rpartition(".")
            setattr(roots[target.root].get_submodule(parent), child, adapter)
        join_projections([f"{t.root}.{t.name}" for t in self.targets], adapters)
        self._index_ranks()

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
        """A and B of every component, A first; only the text encoders' or only the U-Net's."""
        pairs = zip(self.targets, self.layers, strict=True)
        layers = [layer for t, layer in pairs if text is None or text == (t.root != "unet")]
        return [layer.lora_down for layer in layers] + [layer.lora_up for layer in layers]

    def refresh_importance(self) -> None:
        """Recompute every Λ (eq. 10) for the step to come: one call for the whole network."""
        flat = adaptive_rank.importance_at(
            self.nu[self._component], self._position, self.config.mode
        )  # (Σ rank,)
        for layer, values in zip(self.adapters, flat.split(self._ranks), strict=True):
            vars(layer)["importance"] = values  # past nn.Module's checks: hundreds of them a step

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
        layers = [self.layers[index] for index in changed]
        sizes = list(zip(layers, wanted[changed].tolist(), strict=True))
        # All are made before one is put to use, so that a lack of memory changes none.
        downs = [ResizedWeight.of(layer.lora_down, 0, rank) for layer, rank in sizes]
        ups = [ResizedWeight.of(layer.lora_up, 1, rank) for layer, rank in sizes]
        for layer, down, up, std in zip(layers, downs, ups, stds, strict=True):
            rows = slice(layer.rank, None)
            layer.lora_down, layer.lora_up = down.new, up.new
            if down.grew:
                self._draw_rows(layer, rows, std)
        self._index_ranks()
        return RankChange((*downs, *ups))

    @torch.no_grad()
    def components(self) -> list[Component]:
        """Every component as it is now, detached, on the CPU, convolutions in their own shape."""
        self.refresh_importance()
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
                    "up": layer.lora_up.detach().clone(),
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
        for layer, sides in zip(self.layers, saved, strict=True):
            layer.lora_down = nn.Parameter(sides["down"].to(self._device, copy=True))
            layer.lora_up = nn.Parameter(sides["up"].to(self._device, copy=True))
        self.log_nu.copy_(state["log_nu"])
        self.log_nu.grad = None
        self._generator.set_state(state["generator"])
        self._index_ranks()

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

    def _index_ranks(self) -> None:
        """Which component and which 1-based position each entry of the flat Λ belongs to."""
        self._ranks = [layer.rank for layer in self.layers]
        ranks = torch.tensor(self._ranks)
        first = ranks.cumsum(0) - ranks  # (L,)
        component = torch.repeat_interleave(torch.arange(len(ranks)), ranks)  # (Σ rank,)
        self._component = component.to(self._device)
        self._position = (torch.arange(1, len(component) + 1) - first[component]).to(self._device)
        with torch.no_grad():
            self.refresh_importance()


def _component(target: Target, layer: AdaptiveLoRA, nu: float) -> Component:
    down = layer.lora_down.detach().cpu().clone()  # (rank, in)
    up = layer.lora_up.detach().cpu().clone()  # (out, rank)
    kernel = getattr(layer, "kernel", None)
    if kernel is not None:
        down, up = down.view(-1, *kernel), up[:, :, None, None]
    importance = layer.importance.detach().cpu().clone()
    return Component(target.name, down, up, importance, nu, target.root)
