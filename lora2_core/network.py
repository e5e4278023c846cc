"""The adapters of one model: which layers, their ν, their ranks, and how those change.

The network knows torch modules and nothing of ComfyUI. It replaces the chosen layers of the
model it is given by adapters around them; give it a private copy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from . import adaptive_rank
from .layers import AdaptiveLoRA, wrap
from .optimizers import replace_parameters
from .rank_config import RankConfig
from .targets import Target

# Below half a rank, Λ of a rank-1 component only fades; ν need not go further.
_SMALLEST_EXPECTED_RANK = 0.5


@dataclass(frozen=True)
class Component:
    """One trained component, on the CPU: what a file needs."""

    name: str
    lora_down: Tensor  # (rank, in, …), fp32
    lora_up: Tensor  # (out, rank, …), fp32
    importance: Tensor  # (rank,), fp32
    nu: float


class AdaptiveRankNetwork(nn.Module):
    """Adapters on ``targets`` of ``model``, with all ν in one fp32 tensor.

    ``log_nu``: (L,) parameter; ``ranks``: the L ranks in use now. ν is learnt as its logarithm
    (ours; the paper is silent): 500 Adam steps then span rank 512 to 1, which a plain ν at
    5e-5 a step cannot.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], config: RankConfig, seed: int = 0
    ):
        super().__init__()
        self.targets = tuple(targets)
        self.config = config
        self._generator = torch.Generator().manual_seed(seed)
        self.max_ranks = _max_ranks(self.targets, config)  # (L,)
        # Components may differ in size: a budget in bytes weighs them by what a rank costs.
        cost = torch.tensor([float(t.parameters_per_rank) for t in self.targets])
        self.rank_weight = torch.ones_like(cost)
        self.target_rank = config.target_rank
        if config.target_megabytes is not None:
            self.rank_weight = cost / cost.mean()
            self.target_rank = config.target_megabytes * 1e6 / (2 * float(cost.sum()))
            self._check_budget(config.target_megabytes, cost)
        else:
            self._check_target()
        layers = [model.get_submodule(target.name) for target in self.targets]
        self._device = next(layers[0].parameters()).device
        self._weights: list[float] = self.rank_weight.tolist()
        self.rank_weight = self.rank_weight.to(self._device)
        nu = self._start_nu()
        ranks = adaptive_rank.effective_rank(nu, config.quantile, self.max_ranks)
        self.log_nu = nn.Parameter(nu.log().to(self._device))
        self._log_nu_bounds = self._bounds()
        adapters = [wrap(base, rank) for base, rank in zip(layers, ranks.tolist(), strict=True)]
        self.adapters = nn.ModuleList(adapters)
        self._init_weights(nu, ranks)
        for target, adapter in zip(self.targets, adapters, strict=True):
            parent, _, child = target.name.rpartition(".")
            setattr(model.get_submodule(parent), child, adapter)
        self._index_ranks()

    @property
    def layers(self) -> list[AdaptiveLoRA]:
        return list(self.adapters)  # type: ignore[arg-type]

    @property
    def ranks(self) -> list[int]:
        return [layer.rank for layer in self.layers]

    @property
    def nu(self) -> Tensor:
        """ν of every component, (L,), with gradient to ``log_nu``."""
        return self.log_nu.exp()

    def weights(self) -> list[nn.Parameter]:
        """A and B of every component, A first."""
        downs = [layer.lora_down for layer in self.layers]
        return downs + [layer.lora_up for layer in self.layers]

    def refresh_importance(self) -> None:
        """Recompute every Λ (eq. 10) for the step to come: one call for the whole network."""
        flat = adaptive_rank.importance_at(
            self.nu[self._component], self._position, self.config.mode
        )  # (Σ rank,)
        for layer, values in zip(self.layers, flat.split(self.ranks), strict=True):
            layer.importance = values

    def set_enabled(self, enabled: bool) -> None:
        """Switch all adapters on or off; off leaves exactly the frozen model."""
        for layer in self.layers:
            layer.enabled = enabled

    def mean_rank(self) -> float:
        """Mean of the ranks in use, weighted as the budget is."""
        weighted = sum(w * r for w, r in zip(self._weights, self.ranks, strict=True))
        return weighted / sum(self._weights)

    def expected_bytes(self) -> int:
        """Size of the fp16 file to expect, without its header: at the target, or, where the
        target is a pull and not a budget, as large as now."""
        costs = [target.parameters_per_rank for target in self.targets]
        ranks = [self.target_rank] * len(costs)
        if self.config.mode != "balanced":
            ranks = [float(rank) for rank in self.ranks]
        return int(2 * sum(cost * rank for cost, rank in zip(costs, ranks, strict=True)))

    @torch.no_grad()
    def clamp_nu(self) -> None:
        """Keep ν where it still decides a rank, so that a component can always come back."""
        self.log_nu.clamp_(*self._log_nu_bounds)

    @torch.no_grad()
    def resize(self, nu: Tensor, optimizer: torch.optim.Optimizer) -> int:
        """Grow or shrink every component to the rank its ν asks for; returns how many changed.

        ``nu``: (L,) on the CPU. Rows that stay keep their weights and their optimizer state; new
        columns of B are zero or random as configured (section 3.3).
        """
        current = torch.tensor(self.ranks)
        wanted = adaptive_rank.effective_rank(nu, self.config.quantile, self.max_ranks)
        if self.config.hysteresis:
            wanted = adaptive_rank.hysteresis(current, wanted)
        changed = (wanted != current).nonzero().flatten().tolist()
        if not changed:
            return 0
        stds = adaptive_rank.init_std(nu, wanted)
        layers = [self.layers[index] for index in changed]
        sizes = [int(wanted[index]) for index in changed]
        old_ranks = [layer.rank for layer in layers]
        self._replace(layers, sizes, optimizer)
        for layer, old, std in zip(layers, old_ranks, stds[changed], strict=True):
            self._init_new_rows(layer, old, std)
        self._index_ranks()
        return len(changed)

    @torch.no_grad()
    def components(self) -> list[Component]:
        """Every component as it is now, detached, on the CPU, convolutions in their own shape."""
        self.refresh_importance()
        nus = self.nu.tolist()
        return [
            _component(target, layer, nu)
            for target, layer, nu in zip(self.targets, self.layers, nus, strict=True)
        ]

    def _start_nu(self) -> Tensor:
        target = torch.full((len(self.targets),), float(self.target_rank))
        start = target if self.config.start == "target" else self.max_ranks.float()
        # A small layer starts at its own limit, not beyond.
        start = torch.minimum(start, self.max_ranks.float())
        if self.config.mode == "fixed":
            start = start.floor().clamp(min=1)  # ranks round up; this one must not pass a budget
        return adaptive_rank.nu_for_rank(1.0, self.config.quantile) / start

    def _check_target(self) -> None:
        reachable = float(self.max_ranks.double().mean())
        if self.config.mode != "fixed" and self.target_rank > reachable:
            raise ValueError(
                f"target_rank is {self.target_rank:g}; this model can reach a mean rank of "
                f"{reachable:.4g} at most: lower it."
            )

    def _check_budget(self, megabytes: float, cost: Tensor) -> None:
        low = float(cost.sum()) * 2e-6
        high = float((cost * self.max_ranks).sum()) * 2e-6
        if not low <= megabytes <= high:
            raise ValueError(
                f"target_megabytes is {megabytes:g}; {len(self.targets)} components of this model "
                f"at ranks 1 to {self.config.rank_limit} give {low:.3g} to {high:.3g} MB: choose a "
                "size in between, or another max_rank."
            )

    def _bounds(self) -> tuple[Tensor, Tensor]:
        quantile = self.config.quantile
        one = adaptive_rank.nu_for_rank(1.0, quantile)
        low = (one / self.max_ranks.float()).log().to(self._device)
        high = torch.full_like(low, math.log(one / _SMALLEST_EXPECTED_RANK))
        return low, high

    def _init_weights(self, nu: Tensor, ranks: Tensor) -> None:
        stds = adaptive_rank.init_std(nu, ranks)
        for layer, std in zip(self.layers, stds, strict=True):
            layer.init_down(self._down_std(std), slice(0, layer.rank), self._generator)

    def _down_std(self, std: Tensor) -> float | None:
        # None: the usual Kaiming initialisation, better with f/f₁ (measured .156 against .173).
        return float(std) if self.config.mode == "paper" else None

    def _replace(
        self, layers: list[AdaptiveLoRA], sizes: list[int], optimizer: torch.optim.Optimizer
    ) -> None:
        downs = [
            (layer.lora_down, partial(_resized, dim=0, size=size))
            for layer, size in zip(layers, sizes, strict=True)
        ]
        ups = [
            (layer.lora_up, partial(_resized, dim=1, size=size))
            for layer, size in zip(layers, sizes, strict=True)
        ]
        new = replace_parameters(optimizer, downs + ups)
        for layer, down, up in zip(layers, new, new[len(layers) :], strict=False):
            layer.lora_down, layer.lora_up = down, up

    def _init_new_rows(self, layer: AdaptiveLoRA, old_rank: int, std: Tensor) -> None:
        if layer.rank <= old_rank:
            return
        rows = slice(old_rank, layer.rank)
        layer.init_down(self._down_std(std), rows, self._generator)
        if self.config.growth == "random":
            layer.init_up(self.config.growth_std, rows, self._generator)

    def _index_ranks(self) -> None:
        """Which component and which 1-based position each entry of the flat Λ belongs to."""
        ranks = torch.tensor(self.ranks)
        self._component = torch.repeat_interleave(torch.arange(len(ranks)), ranks).to(self._device)
        self._position = torch.cat([torch.arange(1, r + 1) for r in self.ranks]).to(self._device)
        with torch.no_grad():
            self.refresh_importance()


def _max_ranks(targets: Sequence[Target], config: RankConfig) -> Tensor:
    """Per component: the limit, or less where the layer itself is smaller; (L,)."""
    largest = max(target.largest_rank for target in targets)
    if config.max_rank is not None and config.max_rank > largest:
        raise ValueError(
            f"max_rank is {config.max_rank}; the largest layer of this model takes rank {largest}: "
            "lower it."
        )
    return torch.tensor([min(config.rank_limit, target.largest_rank) for target in targets])


def _resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """``tensor`` cut along ``dim``, or padded with zeros, to ``size`` entries."""
    keep = min(size, tensor.shape[dim])
    shape = list(tensor.shape)
    shape[dim] = size
    out = tensor.new_zeros(shape)
    out.narrow(dim, 0, keep).copy_(tensor.narrow(dim, 0, keep))
    return out


def _component(target: Target, layer: AdaptiveLoRA, nu: float) -> Component:
    down = layer.lora_down.detach().cpu().clone()  # (rank, in)
    up = layer.lora_up.detach().cpu().clone()  # (out, rank)
    kernel = getattr(layer, "kernel", None)
    if kernel is not None:
        down, up = down.view(-1, *kernel), up[:, :, None, None]
    return Component(target.name, down, up, layer.importance.detach().cpu().clone(), nu)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, shapes and a sample of every weight.

    A thousand values a tensor, so that SDXL takes well under a second. Not a file's hash, which a
    MODEL no longer knows, and another one for the same model in another precision.
    """
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        flat = weight.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // 1000)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
