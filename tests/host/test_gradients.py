"""Gradients of every trained tensor against a plain fp32 reference, in every way of training.

The reference is written out here: the demo's U-Net with F.linear(x, W + B Λ A) and F.conv2d in
place of every adapted layer, the noise equations by hand, and torch's own autograd.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.supported_models
import pytest
import torch
import torch.nn.functional as F
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.comfy_host.checkpointing import is_checkpointed
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import OptimizerConfig
from lora2_pack.lora2_core.tiny_sdxl.model import UNET_CONFIG
from lora2_pack.lora2_core.training.denoising import Batch
from lora2_pack.lora2_core.training.setup import TrainingSetup
from lora2_pack.lora2_core.training.trainer import Trainer
from lora2_pack.tests.host import demo
from torch import Tensor, nn

# Errors are ‖found − reference‖ / ‖reference‖ of one tensor, or of all A, all B and log ν.
FP32 = 1e-4  # sums in another order through some 60 layers; measured 2e-5 of one tensor
BF16 = 0.06  # 8 bits of mantissa, 2⁻⁹ a rounding, through some 60 layers; measured 0.03
BF16_EACH = 0.5  # of one tensor: on a key of nearly equal tokens most cancels; measured 0.33
BF16_PLAIN = 1.25  # times the error of a plain bf16 implementation of the same layers
ACCUMULATED = 1e-5  # the same numbers summed in another order; measured 2e-6 of all
ONE_STEP = 1e-3  # in learning rates: Adam's first step is g/(|g| + ε) before states are rounded
EIGHT_STEPS = 0.05  # of the way that fp32 states went: 8 bits a state, blockwise; measured 0.016
SMALLEST = 1e-3  # of the largest gradient of a kind; what is smaller is compared with that

ENTROPY = 0.05  # λ_e: large, so that a wrong term would show
Grads = dict[str, list[Tensor]]  # "down", "up" and "nu"


@dataclass(frozen=True)
class Step:
    """One real step of the trainer: what it saw, its gradients, and the tensors before it."""

    setup: TrainingSetup
    trainer: Trainer
    batches: list[Batch]
    before: Grads
    grads: Grads
    loss: float


def _prepare(parts: Any, start: int = 2, **changes: Any) -> TrainingSetup:
    """A training whose B and ν are those of the seed ``start``."""
    settings = {"probes": 0, "batch_size": 2, "entropy_weight": ENTROPY, **changes}
    setup = comfy_host.prepare_training(*parts, demo.photos(), demo.settings(**settings))
    generator = torch.Generator().manual_seed(start)
    with torch.no_grad():  # at the start B is 0, and with it the gradients of A and ν
        for layer in setup.network.layers:
            values = torch.randn(layer.lora_up.shape, generator=generator)
            layer.lora_up.copy_(values / (10 * layer.rank))
        noise = torch.randn(setup.network.log_nu.shape, generator=generator)
        setup.network.log_nu += 0.05 * noise  # no two components alike
    return setup


def _tensors(network: Any) -> Grads:
    layers = network.layers
    return {
        "down": [layer.lora_down for layer in layers],
        "up": [layer.lora_up for layer in layers],
        "nu": [network.log_nu],
    }


def _gradients(network: Any) -> Grads:
    """Of every component, out of the stacks that they lie in."""
    rows: dict[int, tuple[Tensor, Tensor]] = {}
    for stack in network.all_stacks:
        for component, slot in zip(stack.components, stack.slots, strict=True):
            rows[component] = stack.down.grad[slot.rows], stack.up.grad[slot.rows].t()
    downs, ups = zip(*(rows[n] for n in range(len(rows))), strict=True)
    nu = network.log_nu
    return {
        "down": list(downs),
        "up": list(ups),
        "nu": [torch.zeros_like(nu) if nu.grad is None else nu.grad],
    }


def _copies(tensors: Grads) -> Grads:
    return {kind: [t.detach().clone() for t in part] for kind, part in tensors.items()}


def _step(parts: Any, batches: Sequence[Batch] | None = None, **changes: Any) -> Step:
    """Run one step; ``batches`` are used instead of draws where given."""
    setup = _prepare(parts, **changes)
    trainer = Trainer(setup.network, setup.task, setup.config, setup.entropy)
    seen, found, predict = [], {}, setup.task.predict
    setup.task.predict = lambda batch: (seen.append(batch), predict(batch))[1]
    if batches is not None:
        given = iter(batches)
        setup.task.draw = lambda generator, size: next(given)
    before = _copies(_tensors(setup.network))

    def keep(*_: Any) -> None:
        found.update(_copies(_gradients(setup.network)))

    trainer.optimizer.register_step_pre_hook(keep)
    event = next(trainer.run())
    return Step(setup, trainer, seen, before, found, event.loss)


# --- the reference ----------------------------------------------------------------------------


class Reference:
    """The demo's U-Net from ``weights``, all fp32, with merged weights W + B Λ A.

    ``computes``: bf16 makes it a plain implementation in bf16 instead, W x + B Λ A x.
    """

    def __init__(
        self, weights: dict[str, Tensor], step: Step, computes: torch.dtype = torch.float32
    ):
        config = comfy.supported_models.SDXL(dict(UNET_CONFIG))
        config.set_inference_dtype(torch.float32, None)
        self.base = config.get_model({}, "", torch.device("cpu"))
        self.unet = self.base.diffusion_model
        self.unet.load_state_dict({name: weight.float() for name, weight in weights.items()})
        self.unet.requires_grad_(False).to(computes)
        self.computes = self.unet.dtype = computes
        self.step, self.rank = step, step.setup.config.rank
        self.leaves = {
            kind: [t.clone().requires_grad_() for t in part] for kind, part in step.before.items()
        }
        for number, target in enumerate(step.setup.network.targets):
            layer = self.unet.get_submodule(target.name)
            make = self._merged if computes == torch.float32 else self._beside
            layer.forward = make(layer, number)
        self.entropies: list[Tensor] = []
        for name, module in self.unet.named_modules():
            if name.endswith(".attn2"):
                self._watch(module)

    def _importance(self, number: int, rank: int) -> Tensor:
        nu = self.leaves["nu"][0][number].exp()
        place = torch.arange(1, rank + 1)
        if self.rank.mode == "balanced":
            return (-nu * (place - 1)).exp()
        if self.rank.mode == "fixed":
            return torch.ones(rank)
        return (-nu * place).exp() - (-nu * (place + 1)).exp()  # f of section 3.2, as printed

    def _merged(self, layer: nn.Module, number: int) -> Any:
        weight, bias = layer.weight, layer.bias

        def forward(x: Tensor) -> Tensor:
            down, up = self.leaves["down"][number], self.leaves["up"][number]
            change = up @ torch.diag(self._importance(number, down.shape[0])) @ down
            merged = weight + change.view_as(weight)
            if isinstance(layer, nn.Linear):
                return F.linear(x, merged, bias)
            return F.conv2d(x, merged, bias, layer.stride, layer.padding)

        return forward

    def _beside(self, layer: Any, number: int) -> Any:
        def forward(x: Tensor) -> Tensor:
            down, up = self.leaves["down"][number], self.leaves["up"][number]
            scale = self._importance(number, down.shape[0])
            hidden = F.linear(x, down.to(x.dtype)) * scale.to(x.dtype)
            return F.linear(x, layer.weight, layer.bias) + F.linear(hidden, up.to(x.dtype))

        return forward

    def _watch(self, attention: Any) -> None:
        queries: list[Tensor] = []

        def entropy(_module: Any, _args: Any, key: Tensor) -> None:
            q, k = (
                part.float().unflatten(-1, (attention.heads, -1)).transpose(1, 2)
                for part in (queries.pop(), key)
            )
            p = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
            self.entropies.append(-(p * p.log()).sum(-1).mean())

        attention.to_q.register_forward_hook(lambda _m, _a, out: queries.append(out))
        attention.to_k.register_forward_hook(entropy)

    def _batch_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean squared error of the noise, and mean entropy."""
        self.entropies = []
        sigma = batch.sigma.view(-1, 1, 1, 1)
        latent = torch.stack([sample.latent for sample in batch.samples])
        context, pooled = self.step.setup.task.texts.read(batch.texts)
        sizes = torch.stack([sample.sizes for sample in batch.samples])
        seen = (latent + sigma * batch.noise) / (sigma.square() + 1).sqrt()
        steps = torch.searchsorted(self.base.model_sampling.sigmas, batch.sigma).float()
        vector = torch.cat([pooled, sizes], 1)
        seen, context, vector = (part.to(self.computes) for part in (seen, context, vector))
        said = self.unet(seen, steps, context=context, y=vector, transformer_options={}).float()
        return (said - batch.noise).square().mean(), torch.stack(self.entropies).mean()

    def _rank_term(self, loss: Tensor) -> Tensor | float:
        nu = self.leaves["nu"][0].exp()
        if self.rank.mode == "fixed":
            return 0.0
        if self.rank.mode == "paper":
            target = -math.log(1 - self.rank.quantile) / self.rank.target_rank
            return self.rank.rank_weight * (nu - target).abs().sum()
        ranks = -math.log(1 - self.rank.quantile) / nu
        return self.rank.rank_weight * loss.detach() * ranks.mean() / self.rank.target_rank

    def gradients(self) -> tuple[Grads, float]:
        parts = [self._batch_loss(batch) for batch in self.step.batches]
        loss = torch.stack([part for part, _ in parts]).mean()
        entropy = torch.stack([part for _, part in parts]).mean()
        total = loss + self.step.setup.config.entropy_weight * entropy + self._rank_term(loss)
        flat = [leaf for part in self.leaves.values() for leaf in part]
        found = iter(torch.autograd.grad(total, flat, allow_unused=True))
        grads = {
            kind: [torch.zeros_like(leaf) if (g := next(found)) is None else g for leaf in part]
            for kind, part in self.leaves.items()
        }
        return grads, float(loss.detach())


# --- comparing --------------------------------------------------------------------------------


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors])


def _errors(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[float, float]:
    """Of all tensors together, and the largest of one."""
    apart = _norms([a - b for a, b in zip(found, wanted, strict=True)])
    sizes = _norms(wanted)
    each = apart / sizes.clamp(min=SMALLEST * float(sizes.max()))
    return float(apart.norm() / sizes.norm()), float(each.max())


def check_near(found: Grads, wanted: Grads, overall: float, each: float) -> None:
    for kind, part in wanted.items():
        assert sum(bool(tensor.any()) for tensor in part) >= 0.9 * len(part), f"{kind} is blind"
        errors = _errors(found[kind], part)
        print(f"{kind}: {errors[0]:.1e} of all, {errors[1]:.1e} of one")
        assert errors[0] < overall and errors[1] < each, f"{kind}: {errors}"


def check_equal(found: Grads, wanted: Grads) -> None:
    for kind, part in wanted.items():
        pairs = zip(found[kind], part, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), kind


# --- the tests --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "rank"),
    [
        ("attention+ff+conv", RankConfig.balanced(target_rank=3.0, max_rank=8)),
        ("attention", RankConfig.paper(target_rank=2.0, max_rank=8)),
        ("attention", RankConfig.balanced(target_rank=24.0, max_rank=32)),  # merged weights
    ],
)
def test_fp32(parts: Any, model: Any, targets: str, rank: RankConfig):
    step = _step(parts, targets=targets, rank=rank)
    wanted, loss = Reference(demo.weights_of(model), step).gradients()
    assert step.loss == pytest.approx(loss, rel=1e-5)
    check_near(step.grads, wanted, FP32, FP32)


def test_gradient_checkpointing(parts: Any, model: Any):
    plain, step = _step(parts), _step(parts, gradient_checkpointing=True)
    unets = [found.setup.task.model.diffusion_model for found in (plain, step)]
    assert [is_checkpointed(unet) for unet in unets] == [False, True]
    wanted, loss = Reference(demo.weights_of(model), step).gradients()
    assert step.loss == pytest.approx(loss, rel=1e-5)
    check_near(step.grads, wanted, FP32, FP32)
    check_near(step.grads, plain.grads, ACCUMULATED, FP32)


def test_without_entropy(parts: Any, model: Any):
    step, other = _step(parts, entropy_weight=0.0), _step(parts)
    wanted, _ = Reference(demo.weights_of(model), step).gradients()
    check_near(step.grads, wanted, FP32, FP32)
    assert _errors(other.grads["nu"], wanted["nu"])[0] > 10 * FP32, "the entropy does not count"


def test_bf16_weights(parts: Any, model: Any):
    """No worse than plain bf16, over two draws: how roundings meet makes one differ by half."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for start in (2, 4):
        step = _step(parts, start=start, precision="bf16")
        base = step.setup.task.model.diffusion_model
        assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in step.setup.network.weights()} == {torch.float32}
        assert {g.dtype for part in step.grads.values() for g in part} == {torch.float32}
        wanted, loss = Reference(demo.weights_of(model, torch.bfloat16), step).gradients()
        assert step.loss == pytest.approx(loss, rel=0.02)
        check_near(step.grads, wanted, BF16, BF16_EACH)
        plain, _ = Reference(demo.weights_of(model), step, torch.bfloat16).gradients()
        for kind, part in wanted.items():
            both = (_errors(grads[kind], part)[0] for grads in (step.grads, plain))
            errors.setdefault(kind, []).append(tuple(both))
    for kind, found in errors.items():
        ours, theirs = (statistics.fmean(column) for column in zip(*found, strict=True))
        assert ours < BF16_PLAIN * theirs, f"{kind}: {ours} where plain bf16 has {theirs}"


@pytest.mark.parametrize(
    ("computes", "overall", "each"),
    [(torch.float32, FP32, FP32), (torch.bfloat16, BF16, BF16_EACH)],
)
def test_fp8_weights(parts: Any, model: Any, computes: torch.dtype, overall: float, each: float):
    stored = demo.stored(model, torch.float8_e4m3fn, computes)
    step = _step((stored, *parts[1:]))
    kept = {p.dtype for p in step.setup.task.model.diffusion_model.parameters()}
    assert kept == {computes}
    rounded = demo.weights_of(stored)
    assert not torch.equal(
        rounded["input_blocks.0.0.weight"], demo.weights_of(model)["input_blocks.0.0.weight"]
    )
    wanted, _ = Reference(rounded, step).gradients()
    check_near(step.grads, wanted, overall, each)


def _together(batches: Sequence[Batch]) -> Batch:
    return Batch(
        tuple(sample for batch in batches for sample in batch.samples),
        tuple(text for batch in batches for text in batch.texts),
        torch.cat([batch.sigma for batch in batches]),
        torch.cat([batch.noise for batch in batches]),
    )


def test_accumulation(parts: Any, model: Any):
    task = _prepare(parts).task
    generator = torch.Generator().manual_seed(9)
    batches = [task.draw(generator, 1) for _ in range(2)]
    two = _step(parts, batches, batch_size=1, optimizer=OptimizerConfig(accumulation=2))
    one = _step(parts, [_together(batches)], batch_size=2)
    assert (len(two.batches), len(one.batches)) == (2, 1)
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    check_near(two.grads, one.grads, ACCUMULATED, FP32)
    wanted, _ = Reference(demo.weights_of(model), two).gradients()
    check_near(two.grads, wanted, FP32, FP32)


def test_eight_bit_states(parts: Any, model: Any):
    rank = RankConfig.fixed(target_rank=32.0, max_rank=32)
    steps = {
        name: _step(parts, steps=8, rank=rank, optimizer=OptimizerConfig(name=name))
        for name in ("adamw", "adamw8bit")
    }
    plain, eight = steps["adamw"], steps["adamw8bit"]
    check_equal(eight.grads, plain.grads)
    states = [state["state1"].dtype for state in eight.trainer.optimizer.state.values()]
    assert states.count(torch.uint8) == len(states) >= 8
    rate = eight.setup.config.learning_rate
    for kind in ("down", "up"):
        pairs = zip(
            _tensors(eight.setup.network)[kind], _tensors(plain.setup.network)[kind], strict=True
        )
        apart = max(float((a - b).detach().abs().max()) for a, b in pairs)
        assert apart < ONE_STEP * rate, f"{kind}: {apart / rate} of a learning rate"
    for step in steps.values():
        assert len(list(step.trainer.run())) == 7
    moved = {name: _tensors(step.setup.network) for name, step in steps.items()}
    for kind in ("down", "up"):
        ways = {
            name: [a.detach() - b for a, b in zip(found[kind], plain.before[kind], strict=True)]
            for name, found in moved.items()
        }
        error = _errors(ways["adamw8bit"], ways["adamw"])[0]
        print(f"{kind}: {error:.3f} of the way after 8 steps")
        assert 0 < error < EIGHT_STEPS
