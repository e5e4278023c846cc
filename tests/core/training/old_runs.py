"""The runs whose checkpoints lie in old_checkpoints/, and how those were written.

What is here is the same for the code that wrote them and for today's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.config.ranks import Prior, RankConfig
from lora2_pack.lora2_core.config.train import OptimizerConfig, TextConfig, TrainConfig
from lora2_pack.lora2_core.files import checkpoint
from lora2_pack.lora2_core.training.objective import Prediction
from lora2_pack.lora2_core.training.trainer import Trainer
from lora2_pack.tests.core import toy
from torch import Tensor, nn

torch.set_num_threads(1)

STEPS, CUT = 24, 12
START = {"adamw": 6.0, "adamw8bit": 6.5, "prodigy": 5.0}  # mean ranks
NAMES = tuple(START)
FOLDER = Path(__file__).parent / "old_checkpoints"
# Every rank grows by 3 % a step until ν is held, whatever the loss says.
GROWING = {
    "rank_learning_rate": 0.03,
    "nu_prior": Prior(weight=1.0, mean=0.01, std=0.1),
    "hysteresis": False,
}


class Wide(nn.Module):
    """Two layers; of the first, A and B are large enough for 8-bit moments at rank 10."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 410), nn.Linear(410, 16)
        self.layers = nn.ModuleList([nn.Linear(410, 410), nn.Linear(16, 16)])
        toy.freeze(self, seed=6)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        hidden = torch.tanh(self.layers[0](torch.tanh(self.first(x))))
        return self.layers[1](self.last(hidden))


class WithText(toy.TransformerTask):
    """Two models that learn at once; the second reads what the first does."""

    def __init__(self, model: nn.Module, text: nn.Module | None):
        super().__init__(toy.Transformer(blocks=1))
        self.model, self.text = model, text  # type: ignore[assignment]

    def predict(self, batch: Any) -> Prediction:
        said = super().predict(batch)
        if self.text is None:
            return said
        read = self.text(batch[0][:, :2]).mean(1, keepdim=True)
        return Prediction(said.value + 0.3 * read, said.target)


def fresh(name: str) -> Trainer:
    """The run of an optimizer before its first step."""
    rank = RankConfig.balanced(target_rank=START[name], **GROWING)
    if name == "adamw8bit":
        roots: dict[str, nn.Module] = {"unet": Wide()}
        targets = find_targets(roots["unet"], "layers")
    else:
        roots = {"unet": toy.Transformer(blocks=1), "te1": toy.Parallel(2, 16)}
        # With the cross-attention layers of other widths lie between those of one.
        pattern = "attn|ff" if name == "adamw" else "attn1|ff"
        targets = find_targets(roots["unet"], pattern)
        targets += find_targets(roots["te1"], "layers", "te1")
    rate = 1.0 if name == "prodigy" else 1e-2
    config = TrainConfig(
        steps=STEPS,
        entropy_weight=0.0,
        probes=0,
        learning_rate=rate,
        batch_size=2,
        rank=rank,
        optimizer=OptimizerConfig(name=name, weight_decay=0.01, ema=0.9),
        text=TextConfig(learning_rate=rate),
    )
    network = AdaptiveRankNetwork(roots, targets, rank, seed=3)
    with torch.no_grad():  # so that ranks differ
        network.log_nu += torch.linspace(-0.1, 1.0, len(targets))
    return Trainer(network, WithText(roots["unet"], roots.get("te1")), config)


def factors(run: Trainer) -> dict[str, dict[str, Tensor]]:
    """ΛA, (rank, in), and B, (out, rank), of every component as the run saves it."""
    with run.averaged():
        components = run.network.components()
    return {
        f"{c.root}.{c.name}": {"down": c.importance[:, None] * c.lora_down, "up": c.lora_up}
        for c in components
    }


def deltas(found: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """ΔW of every component, (out, in) fp64."""
    return {name: sides["up"].double() @ sides["down"].double() for name, sides in found.items()}


def write(folder: Path) -> None:
    """A checkpoint of each run in its middle, and beside it what the run ended with."""
    for name in NAMES:
        run = fresh(name)
        list(run.run(lambda run=run: run.step >= CUT))
        kept = checkpoint.Checkpoint(name, CUT, name, run.state())
        checkpoint.write(folder / f"{name}.safetensors", kept)
        list(run.run())
        end = {"ranks": run.network.ranks, "factors": factors(run)}
        end_of = checkpoint.Checkpoint(name, STEPS, name, end)
        checkpoint.write(folder / f"{name}.end.safetensors", end_of)
