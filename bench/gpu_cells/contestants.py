"""Who takes part: ours, a frozen floor, a plain LoRA, PEFT's, and ComfyUI's TrainLoraNode."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...lora2_core.adapters.network import AdaptiveRankNetwork
from ...lora2_core.adapters.targets import find_targets
from ...lora2_core.adaptive_rank import denoising_loss
from ...lora2_core.comfy_host.checkpointing import blocks_of, checkpoint_blocks
from ...lora2_core.comfy_host.models import DTYPES, keep_less
from ...lora2_core.config.presets import with_stand_in
from ...lora2_core.config.train import TrainConfig
from ...lora2_core.training.estimate import Estimate, estimate
from ...lora2_core.training.objective import CrossAttentionEntropy
from ...lora2_core.training.optimizers.make import (
    OptimizerError,
    check_optimizer,
    make_optimizer,
)
from ...lora2_core.training.trainer import Trainer
from ..peft_lora import inject
from . import plan
from .weights import Frozen

Drive = Callable[[Iterable[None]], None]
_FOREVER = 100_000  # steps: whoever drives says when it is enough


class Missing(RuntimeError):
    """A contestant cannot take part on this machine; the message says what it lacks."""


@dataclass(frozen=True)
class Contestant:
    """``drive``: takes one step for each item of what it is given. ``step``: one step; None of
    who cannot be asked for one, since its loop is its own. ``ready``: whether all memory of a step
    is taken by now, that of an optimizer which skips its first ones included."""

    drive: Drive
    step: Callable[[], Any] | None = None
    ready: Callable[[], bool] = lambda: True
    estimate: Estimate | None = None
    note: str = ""


def make(cell: plan.Cell, frozen: Frozen, told: Estimate | None = None) -> Contestant:
    """The contestant of ``cell`` on ``frozen``. ``told``: its estimate, if there is one by now.

    Raises Missing for one that lacks a package, and what PyTorch raises for one that lacks memory.
    """
    makers = {plan.FLOOR: _floor, plan.KOHYA: _kohya, plan.PEFT: _peft, plan.NODE: _node}
    found = _ours(cell, frozen, told) if cell.preset else makers[cell.contestant](cell, frozen)
    if found.step is None:
        return found
    return dataclasses.replace(found, drive=_driving(found.step))


def _driving(step: Callable[[], Any]) -> Drive:
    def drive(turns: Iterable[None]) -> None:
        for _ in turns:
            step()

    return drive


def _nobody(_: Iterable[None]) -> None:
    raise AssertionError("make() gives every contestant with a step its drive")


def _optimizer(cell: plan.Cell, device: torch.device) -> tuple[TrainConfig, str]:
    """The cell's configuration with an optimizer that works here, and what was to be said."""
    try:
        check_optimizer(cell.config, device)
        return cell.config, ""
    except OptimizerError as error:
        preset = cell.preset or next(name for name in plan.WANTED if name in plan.PRESETS)
        instead = with_stand_in(cell.config, preset)
        if instead is None:
            raise Missing(str(error)) from error
        return instead, f"{instead.optimizer.name} stands in: {error}"


def _ours(cell: plan.Cell, frozen: Frozen, told: Estimate | None) -> Contestant:
    """The pack's trainer, whole, prepared as ``comfy_host.prepare`` does."""
    config, note = _optimizer(cell, frozen.device)
    base = frozen.base_kept(config) if plan.keeps_its_own(cell) else frozen.base()
    keep_less(base)
    unet = base.diffusion_model
    roots = {"unet": unet}
    network = AdaptiveRankNetwork(roots, find_targets(unet, config.targets), config.rank)
    cross = CrossAttentionEntropy([m for n, m in unet.named_modules() if n.endswith(".attn2")])
    task = frozen.task(base, config)
    measured = cross if config.entropy_weight > 0 else None
    told = told or estimate(network, task, measured, roots, blocks_of(unet), config)
    if config.gradient_checkpointing or config.block_swap is True:
        checkpoint_blocks(unet, entropy=cross)
    trainer = Trainer(network, task, config, cross)
    run = trainer.run()

    def ready() -> bool:
        return bool(trainer.optimizer.state)

    return Contestant(_nobody, lambda: next(run), ready, told, note)


def _floor(cell: plan.Cell, frozen: Frozen) -> Contestant:
    """Forward and backward to the latents through the frozen model; nothing is learnt."""
    base = frozen.base()
    task = frozen.task(base, cell.config)
    if cell.config.gradient_checkpointing:
        checkpoint_blocks(base.diffusion_model)
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        batch = task.draw(generator, cell.config.batch_size)
        learning = [
            dataclasses.replace(sample, latent=sample.latent.clone().requires_grad_())
            for sample in batch.samples
        ]
        said = task.predict(dataclasses.replace(batch, samples=tuple(learning)))
        denoising_loss(said.value, said.target).backward()

    return Contestant(_nobody, step)


class PlainLora(nn.Module):
    """A LoRA of one linear layer by the method of kohya's script: A and B in fp32, a module a
    layer, which takes the place of its ``forward``; autocast chooses what is computed in."""

    def __init__(self, layer: Any, rank: int):  # of nn.Linear
        super().__init__()
        device = layer.weight.device
        self.down = nn.Linear(layer.in_features, rank, bias=False, device=device)
        self.up = nn.Linear(rank, layer.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.scale = 1.0  # alpha / rank
        self.original = layer.forward
        layer.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.original(x) + self.up(self.down(x)) * self.scale


def _kohya(cell: plan.Cell, frozen: Frozen) -> Contestant:
    base = frozen.base()
    unet = base.diffusion_model
    targets = find_targets(unet, cell.config.targets)
    layers: list[Any] = [unet.get_submodule(target.name) for target in targets]
    weights = [p for layer in layers for p in PlainLora(layer, plan.RANK).parameters()]
    return _rival(cell, frozen, base, weights)


def _peft(cell: plan.Cell, frozen: Frozen) -> Contestant:
    """PEFT in the same U-Net, its weights in fp32 as diffusers' training script has them."""
    base = frozen.base()
    try:
        weights = inject(base.diffusion_model, plan.RANK, cell.config.targets)
    except ImportError as error:
        raise Missing(f"PEFT is missing ({error}): pip install peft") from error
    for weight in weights:
        weight.data = weight.data.float()
    return _rival(cell, frozen, base, weights)


def _rival(cell: plan.Cell, frozen: Frozen, base: Any, weights: list[nn.Parameter]) -> Contestant:
    """The step of a usual script: autocast, a scaled loss in fp16, the optimizer of the cell."""
    config, note = _optimizer(cell, frozen.device)
    task, kind = frozen.task(base, config), frozen.device.type
    if config.gradient_checkpointing:
        checkpoint_blocks(base.diffusion_model)
    optimizer = make_optimizer(config.optimizer, [(weights, config.learning_rate)])
    scaler = torch.amp.GradScaler(kind, enabled=config.precision == "fp16")
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        batch = task.draw(generator, config.batch_size)
        with torch.autocast(kind, DTYPES[config.precision]):
            said = task.predict(batch)
            loss = denoising_loss(said.value, said.target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return Contestant(_nobody, step, lambda: bool(optimizer.state), None, note)


def _node(cell: plan.Cell, frozen: Frozen) -> Contestant:
    """ComfyUI's node, which has its own AdamW, adapts every layer, and runs its own loop."""
    try:
        node: Any = importlib.import_module("comfy_extras.nodes_train")
        schema = node.TrainLoraNode.define_schema()
        patcher: Any = importlib.import_module("comfy.model_patcher")
        management: Any = importlib.import_module("comfy.model_management")
    except (ImportError, AttributeError) as error:
        raise Missing(f"this ComfyUI has no TrainLoraNode that can be loaded ({error})") from error
    if not hasattr(node, "trange"):
        raise Missing("the loop of this ComfyUI's TrainLoraNode is not one that can be timed")

    def anew(**_: bool) -> Any:
        return patcher.ModelPatcher(frozen.base(), frozen.device, frozen.device)

    model = anew()
    model.cached_patcher_init = (anew, ())  # newer nodes train a model of their own
    settings = _node_settings(cell, frozen, schema)

    def drive(turns: Iterable[None]) -> None:
        try:
            with _counting(node, turns), torch.inference_mode():  # as ComfyUI runs every node
                node.TrainLoraNode.execute(model=[model], **settings)
        finally:
            management.unload_all_models()

    return Contestant(drive, note="its own AdamW; adapters on every layer")


def _node_settings(cell: plan.Cell, frozen: Frozen, schema: Any) -> dict[str, Any]:
    config = cell.config
    samples, texts = frozen.data(config.resolution)
    positive = []
    for sample in samples:
        text = texts[sample.captions[0]]
        positive.append([text.context[None], {"pooled_output": text.pooled[None]}])
    settings: dict[str, Any] = {
        "batch_size": config.batch_size,
        "grad_accumulation_steps": 1,
        "steps": _FOREVER,
        "learning_rate": config.learning_rate,
        "rank": plan.RANK,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": config.precision,
        "lora_dtype": "fp32",
        "algorithm": "LoRA",
        "gradient_checkpointing": config.gradient_checkpointing,
        "existing_lora": "[None]",
    }
    # What newer versions ask for too (buckets, offloading, depth of checkpoints, ...).
    given = {*settings, "model", "latents", "positive"}
    settings |= {more.id: more.default for more in schema.inputs if more.id not in given}
    lists = {name: [value] for name, value in settings.items()}
    latents = [{"samples": sample.latent[None]} for sample in samples]
    return {"latents": latents, "positive": [positive], **lists}


@contextmanager
def _counting(node: Any, turns: Iterable[None]) -> Iterator[None]:
    """Inside, the node's loop is over ``turns``; nothing else of it is touched."""
    original = node.trange
    node.trange = lambda *_, **__: _Turns(turns)
    try:
        yield
    finally:
        node.trange = original


class _Turns:
    """Counts as tqdm's trange does."""

    def __init__(self, turns: Iterable[None]):
        self.turns = turns

    def __iter__(self) -> Iterator[int]:
        for number, _ in enumerate(self.turns):
            yield number

    def set_postfix(self, *_: Any) -> None:
        """What the progress bar would show."""
