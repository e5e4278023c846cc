"""Checkpoints of the real models' shapes with seeded weights, to try the command without any.

Nothing is learnt from them; what loads and trains with these loads and trains with the real ones.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

_COMMON: dict[str, Any] = {
    "use_checkpoint": False, "image_size": 32, "in_channels": 4, "out_channels": 4,
    "use_spatial_transformer": True, "legacy": False, "num_classes": "sequential",
    "adm_in_channels": 2816, "model_channels": 320, "channel_mult": [1, 2, 4],
    "use_linear_in_transformer": True, "context_dim": 2048, "num_head_channels": 64,
    "use_temporal_attention": False,
}  # fmt: skip
# Class in ComfyUI, and depths of the transformers going down, in the middle and going up.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl": ("SDXL", {
        "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    }),
    "koala-700m": ("KOALA_700M", {
        "num_res_blocks": [1, 1, 1], "transformer_depth": [0, 2, 5],
        "transformer_depth_middle": -2, "transformer_depth_output": [0, 0, 2, 2, 5, 5],
    }),
}  # fmt: skip
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
    kind, depths = SHAPES[shape]
    supported: Any = importlib.import_module("comfy.supported_models")
    autoencoder: Any = importlib.import_module("comfy.ldm.models.autoencoder")
    config = getattr(supported, kind)({**_COMMON, **depths})
    config.set_inference_dtype(torch.float16, None)
    base = config.get_model({}, "", torch.device("meta"))
    with torch.device("meta"):
        vae = autoencoder.AutoencoderKL(ddconfig=_VAE, embed_dim=4).state_dict()
        texts = config.clip_target().clip(device="meta", dtype=torch.float16)
    return base.state_dict_for_saving(texts.state_dict(), vae)


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
