"""Fifty steps of the toy transformer are those of the method written out by component."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.config.ranks import Prior
from lora2_pack.lora2_core.config.train import TrainConfig
from lora2_pack.lora2_core.training.optimizers.make import schedule_factor
from lora2_pack.lora2_core.training.trainer import train
from lora2_pack.tests.core import toy
from torch import Tensor
from torch.func import functional_call

torch.set_num_threads(1)

STEPS, SEED = 50, 7
MODES: dict[str, dict[str, Any]] = {
    "balanced": {"target_rank": 6.0, "rank_weight": 0.02, "growth": "random"},
    "paper": {"mode": "paper", "start": "target", "target_rank": 6.0, "max_rank": 10},
}
COMMON: dict[str, Any] = {
    "hysteresis": False,
    "rank_learning_rate": 0.05,
    "growth_std": 0.05,
    "nu_prior": Prior(weight=0.02, mean=0.2, std=0.5),
    "weight_prior": Prior(weight=1e-4, std=2.0),
}
TAIL = math.log(10)  # −ln(1 − 0.9)


class Written:
    """A, (rank, in), and B, (out, rank), of each component with an optimizer each, in fp64.

    Nothing of the product computes here but the schedule; it is drawn from the same generators.
    """

    def __init__(self, model: toy.Transformer, net: AdaptiveRankNetwork, config: TrainConfig):
        self.model, self.config, self.rank = model.double(), config, config.rank
        self.names = [f"{target.name}.weight" for target in net.targets]
        self.shapes = [(t.out_features, t.in_features) for t in net.targets]
        self.limits = [min(self.rank.rank_limit, *shape) for shape in self.shapes]
        self.generator = torch.Generator().manual_seed(SEED)
        start = [min(self.rank.target_rank, limit) for limit in self.limits]
        self.log_nu = torch.tensor([math.log(TAIL / r) for r in start]).double().requires_grad_()
        self.ranks = [math.ceil(r) for r in start]
        self.downs, self.ups, self.optimizers = [], [], []
        for n, rank in enumerate(self.ranks):
            self.downs.append(self._drawn(n, rank, self._nu(n)).requires_grad_())
            self.ups.append(torch.zeros(self.shapes[n][0], rank).double().requires_grad_())
            self.optimizers.append(self._adam(n))
        self.nu_optimizer = torch.optim.Adam([self.log_nu], self.rank.rank_learning_rate)
        self.level = self.kappa = self.rank.rank_weight
        self.memory: float | None = None
        self.resizes = 0

    def _nu(self, n: int) -> float:
        return math.exp(float(self.log_nu.detach()[n]))

    def _adam(self, n: int) -> torch.optim.AdamW:
        decay = self.config.optimizer.weight_decay
        return torch.optim.AdamW([self.downs[n], self.ups[n]], weight_decay=decay)

    def _drawn(self, n: int, rows: int, nu: float, rank: int | None = None) -> Tensor:
        """Rows of A: Kaiming-uniform, or in paper mode as of section 3.3.1 for a rank."""
        values = torch.empty(rows, self.shapes[n][1])
        if self.rank.mode != "paper":
            bound = 1 / math.sqrt(self.shapes[n][1])
            return values.uniform_(-bound, bound, generator=self.generator).double()
        f = self._importance(torch.tensor(nu).double(), rank or rows)
        std = math.sqrt(2 / float(f.square().sum()))
        return values.normal_(0, std, generator=self.generator).double()

    def _importance(self, nu: Tensor, rank: int) -> Tensor:
        """Eq. 10, and in balanced mode by its first entry."""
        x = torch.arange(1, rank + 1).double()
        f = (1 - torch.exp(-nu * (x + 1))) - (1 - torch.exp(-nu * x))
        return f if self.rank.mode == "paper" else f / f[0]

    def step(self, number: int, x: Tensor, context: Tensor, target: Tensor) -> float:
        weights = dict(self.model.named_parameters())
        nu = self.log_nu.exp()
        for n, name in enumerate(self.names):
            scale = torch.diag(self._importance(nu[n], self.ranks[n]))
            weights[name] = weights[name] + self.ups[n] @ scale @ self.downs[n]
        said = functional_call(self.model, weights, (x.double(), context.double()))
        loss = (said - target.double()).square().mean()
        value = float(loss.detach())
        total = loss + self._rank_term(nu, value) + self._priors(nu)
        held = number > STEPS - int(STEPS * self.rank.freeze_fraction)
        grads = torch.autograd.grad(total, [*self.downs, *self.ups, self.log_nu])
        for n, optimizer in enumerate(self.optimizers):
            self.downs[n].grad, self.ups[n].grad = grads[n], grads[len(self.ranks) + n]
            rate = self.config.learning_rate * schedule_factor(self.config, number)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        if not held:
            before = nu.detach().tolist()
            self.log_nu.grad = grads[-1]
            self.nu_optimizer.step()
            self._clamp()
            self._resize(before)
            self._observe(value)
        return value

    def _rank_term(self, nu: Tensor, loss: float) -> Tensor:
        if self.rank.mode == "paper":
            return self.rank.rank_weight * (nu - TAIL / self.rank.target_rank).abs().sum()
        size = loss if self.memory is None else self.memory
        return self.kappa * size * (TAIL / nu).mean() / self.rank.target_rank

    def _priors(self, nu: Tensor) -> Tensor:
        prior = self.rank.nu_prior
        total = prior.weight * ((nu - prior.mean) ** 2 / (2 * prior.std**2)).sum()
        prior = self.rank.weight_prior
        for weight in (*self.downs, *self.ups):
            total = total + prior.weight * (weight**2 / (2 * prior.std**2)).sum()
        return total

    @torch.no_grad()
    def _clamp(self) -> None:
        for n, limit in enumerate(self.limits):
            self.log_nu[n].clamp_(math.log(TAIL / limit), math.log(TAIL / 0.5))

    @torch.no_grad()
    def _resize(self, nus: list[float]) -> None:
        for n, (nu, old) in enumerate(zip(nus, self.ranks, strict=True)):
            new = max(1, min(self.limits[n], math.ceil(TAIL / nu - 1e-5)))
            if new == old:
                continue
            self.resizes += 1
            keep, state = min(old, new), self.optimizers[n].state
            moments = [state[weight] for weight in (self.downs[n], self.ups[n])]
            down = torch.zeros(new, self.shapes[n][1]).double()
            up = torch.zeros(self.shapes[n][0], new).double()
            down[:keep], up[:, :keep] = self.downs[n][:keep], self.ups[n][:, :keep]
            if new > old:
                down[old:] = self._drawn(n, new - old, nu, new)
                drawn = torch.empty(self.shapes[n][0], new - old)
                up[:, old:] = drawn.normal_(0, self.rank.growth_std, generator=self.generator)
            self.downs[n], self.ups[n] = down.requires_grad_(), up.requires_grad_()
            self.optimizers[n], self.ranks[n] = self._adam(n), new
            for weight, kept in zip((self.downs[n], self.ups[n]), moments, strict=True):
                own = self.optimizers[n].state[weight] = {"step": kept["step"]}
                rows = slice(keep) if weight is self.downs[n] else (slice(None), slice(keep))
                for name in ("exp_avg", "exp_avg_sq"):
                    own[name] = torch.zeros_like(weight)
                    own[name][rows] = kept[name][rows]

    def _observe(self, loss: float) -> None:
        self.memory = loss if self.memory is None else 0.98 * self.memory + 0.02 * loss
        mean = sum(self.ranks) / len(self.ranks)
        excess = max(-1.0, min(1.0, mean / self.rank.target_rank - 1))
        first, factor = self.rank.rank_weight, 1 + 30 * excess
        if factor > -3:
            self.level *= math.exp(self.rank.controller_gain / STEPS * excess)
            self.level = max(first / 1e3, min(first * 1e3, self.level))
        self.kappa = self.level * max(-3.0, min(3.0, factor))


@pytest.mark.parametrize("keep_apart", [1, 256])
@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_run_is_the_method_written_out(mode: str, keep_apart: int) -> None:
    """Ranks to the last one, and losses, A, B and ν to fp32 rounding, which steps carry on."""
    model, plain = toy.Transformer(), toy.Transformer()
    net = toy.adapt(model, "attn", seed=SEED, **COMMON, **MODES[mode])
    net.keep_apart(keep_apart)
    config = TrainConfig(
        steps=STEPS,
        rank=net.config,
        entropy_weight=0.0,
        probes=0,
        learning_rate=1e-2,
        schedule="cosine",
        batch_size=2,
    )
    written, task = Written(plain, net, config), toy.TransformerTask(model)
    draws = torch.Generator().manual_seed(config.seed ^ 0x5EED)
    for event in train(net, task, config):
        x, context = task.draw(draws, 2)
        loss = written.step(event.step, x, context, x @ task.matrix)
        assert list(event.ranks) == written.ranks
        assert event.loss == pytest.approx(loss, rel=1e-5)
    print(f"{mode}: {written.resizes} resizes, ranks {net.ranks}")
    assert written.resizes > 20 and len(set(net.ranks)) > 3
    torch.testing.assert_close(
        net.log_nu.detach().double(), written.log_nu.detach(), rtol=1e-5, atol=1e-5
    )
    for layer, down, up in zip(net.layers, written.downs, written.ups, strict=True):
        for found, wanted in ((layer.lora_down, down), (layer.lora_up, up)):
            apart = float(((found - wanted).norm() / wanted.norm()).detach())
            print(f"{apart:.1e}", end=" ")
            assert apart < 2e-5
