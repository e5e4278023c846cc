"""Checkpoints of the real models' shapes with seeded weights, to try the command without any.

Nothing is learnt from them; what loads and trains with these loads and trains with the real ones.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from . import family

SHAPES = {"sdxl": "SDXL", "koala-700m": "KOALA_700M"}  # → class in ComfyUI
_VAE: dict[str, Any] = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
PHOTOGRAPHS = {"cat": ("chelsea", 3), "vase": ("coffee", 3)}  # subject → (of scikit-image, photos)


def checkpoint(shape: str, file: Path) -> Path:
    """Write an fp16 checkpoint with U-Net, both text encoders and VAE; 7 GB for SDXL."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        state = {name: _seeded(name, weight, generator) for name, weight in _on_meta(shape).items()}
        temporary = file.with_suffix(".tmp")
        save_file(state, temporary)
        temporary.replace(file)
    return file


def _on_meta(shape: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint without their data, by the names that loaders know."""
    autoencoder: Any = importlib.import_module("comfy.ldm.models.autoencoder")
    base = family.on_meta(SHAPES[shape], torch.float16)
    with torch.device("meta"):
        vae = autoencoder.AutoencoderKL(ddconfig=_VAE, embed_dim=4).state_dict()
        texts = base.model_config.clip_target().clip(device="meta", dtype=torch.float16)
    saving: Any = base.state_dict_for_saving
    newer = "unet_state_dict" in inspect.signature(saving).parameters  # from 0.12.0
    unet = [base.diffusion_model.state_dict()] if newer else []
    return saving(*unet, texts.state_dict(), vae)


def _seeded(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    if not weight.is_floating_point():
        return torch.arange(weight.numel()).reshape(weight.shape)
    shape = tuple(weight.shape)
    if len(shape) < 2:  # norms and biases
        filled = torch.full(shape, float(name.endswith("weight") or name.endswith("scale")))
    else:
        filled = torch.randn(shape, generator=generator) * 0.02
    return filled.half().contiguous()


def dino(folder: Path) -> Path:
    """ViT-S/16."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    """CLIP ViT-B/32 with the tokens that ComfyUI brings."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    torch.manual_seed(1)
    CLIPModel(CLIPConfig(vision_config={"patch_size": 32})).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    comfy: Any = importlib.import_module("comfy.sd1_clip")
    CLIPTokenizer.from_pretrained(Path(comfy.__file__).parent / "sd1_tokenizer").save_pretrained(
        folder
    )
    return folder


def photographs(folder: Path) -> Path:
    """Some of scikit-image's photographs laid out as DreamBooth's data set is."""
    import skimage.data

    for subject, (name, count) in PHOTOGRAPHS.items():
        picture = Image.fromarray(getattr(skimage.data, name)())
        target = folder / "dataset" / subject
        target.mkdir(parents=True, exist_ok=True)
        for number in range(count):  # sizes of their own, as photos have
            picture.crop((20 * number, 0, *picture.size)).save(target / f"{number:02}.jpg")
    return folder
