"""The base as ComfyUI's nodes hold it, and who judges it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....lora2_core import comfy_host, lora_file
from ....lora2_core.config.train import TrainConfig
from ....lora2_core.data.cache import weights_hash
from ....lora2_core.data.photos import Photo
from ....lora2_core.reports.vision import JudgeError
from ....lora2_core.tiny_sdxl import model as demo_model
from ....lora2_core.tiny_sdxl.judge_networks import NETWORKS
from ....lora2_core.tiny_sdxl.judges import WEIGHTS, Judge
from ....lora2_core.tiny_sdxl.judges import load_judges as load_judge
from ....lora2_core.training.setup import TrainingSetup
from ..pictures import to_pixels
from ..world.subjects import View
from .painting import Painter, Sampling

VAE_AT_ONCE = 16  # pictures
# What all trainings on the base share, of a TrainConfig.
DEMO_SETTINGS: Mapping[str, Any] = {"schedule": "cosine", "probes": 0}


@dataclass(frozen=True)
class Parts:
    """What is trained, painted with and judged."""

    model: Any  # MODEL
    clip: Any
    vae: Any
    judges: Mapping[str, Judge]
    sampling: Sampling = field(default_factory=Sampling)

    def painter(self) -> Painter:
        """Return what paints with the base as it is."""
        return Painter(self.model, self.clip, self.vae, self.sampling)

    def with_lora(self, file: Path) -> tuple[Any, Any]:
        """Return MODEL and CLIP with a LoRA applied as the loader's node does it."""
        state = lora_file.load(file).state
        return comfy_host.apply_state(self.model, self.clip, state, 1.0, 1.0, file.name)

    def prepared(self, views: Sequence[View], config: TrainConfig) -> TrainingSetup:
        """Return what trains on pictures and their captions."""
        photos = [
            Photo(to_pixels([view.image])[0].permute(1, 2, 0).contiguous(), view.caption)
            for view in views  # each may be of another size
        ]
        return comfy_host.prepare_training(self.model, self.clip, self.vae, photos, config)

    def fingerprint(self) -> str:
        """Return a name for the weights of the base, the same as long as they are."""
        import comfy.model_management

        # The weights of a clone with a LoRA are in the model until another one is asked for.
        comfy.model_management.load_models_gpu([self.model], force_full_load=True)
        modules = (
            self.model.model.diffusion_model,
            self.clip.cond_stage_model,
            self.vae.first_stage_model,
        )
        return "-".join(weights_hash(module)[:12] for module in modules)

    @torch.inference_mode()
    def through_vae(self, images: Tensor) -> Tensor:
        """Return pictures (n, 3, h, w) in 0 to 1 encoded and decoded, as users' are."""
        parts = []
        for some in images.split(VAE_AT_ONCE):
            latents = self.vae.encode(some.permute(0, 2, 3, 1))  # (n, 4, h/8, w/8)
            parts.append(self.vae.decode(latents).permute(0, 3, 1, 2).float().clamp(0, 1))
        return torch.cat(parts)


def load_parts(judged: bool = True) -> Parts:
    """Return the trained base as the demo's node gives it, with the judges if they are needed.

    Raises SystemExit when weights of either are missing.
    """
    judges = load_judges() if judged else {}
    try:
        model, clip = comfy_host.build_sdxl(
            demo_model.UNET_CONFIG, demo_model.text_configs(), demo_model.fill_trained
        )
        vae = comfy_host.build_autoencoder(demo_model.autoencoder_weights())
    except demo_model.DemoModelError as error:
        raise SystemExit(str(error)) from error
    return Parts(model, clip, vae, judges)


def load_judges(folder: Path = WEIGHTS) -> dict[str, Judge]:
    """Return all judges by name. Raises SystemExit when the weights of one are missing."""
    try:
        return {name: load_judge(name, folder) for name in NETWORKS}
    except JudgeError as error:
        raise SystemExit(str(error)) from error
