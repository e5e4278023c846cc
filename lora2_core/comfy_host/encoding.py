"""Photos and texts through the user's VAE and CLIP: each once, and kept on disk by content."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.model_base
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.cache import TensorCache, content_key, named_weights_hash
from ..data.cropping import Crop
from ..data.samples import Sample, Text
from .copies.weights import Weights
from .errors import HostError

SIZES = 1536  # numbers of SDXL's embedding of original size, offset and trained size


class Encoder:
    """What ``vae`` and ``clip`` make of pictures and texts for the U-Net of ``base``.

    Raises HostError when one of them is of another family. Results are plain tensors on the CPU,
    made outside of inference mode, which a backward pass may use.
    """

    def __init__(self, base: comfy.model_base.BaseModel, clip: Any, vae: Any, cache: TensorCache):
        _check_parts(clip, vae)
        self.base, self.clip, self.vae, self.cache = base, clip, vae, cache
        self._vae_hash = named_weights_hash(Weights(vae.patcher, "vae").items())
        # With patches in them the hash is the same tomorrow, which the id of the patches is not.
        patched = Weights(clip.patcher, "clip").items()
        self._clip_hash = named_weights_hash(patched) + str(clip.layer_idx)
        self.texts: dict[str, Text] = {}  # all that were asked for

    @property
    def identity(self) -> str:
        """Changes with the VAE and with the CLIP."""
        return content_key(self._vae_hash, self._clip_hash)

    def text(self, text: str) -> Text:
        """The embedding of a caption; each is computed once."""
        if text not in self.texts:
            tokens = self.clip.tokenize(text)
            key = content_key("text", self._clip_hash, *_flat(tokens))
            found = _usable(self.cache.get_or_make(key, lambda: self._encode_text(tokens)))
            self.texts[text] = Text(found["context"], found["pooled"])
        return self.texts[text]

    @torch.inference_mode(False)
    def sample(self, crop: Crop, captions: tuple[str, ...]) -> Sample:
        """A cut of a photo as the U-Net is trained on it."""
        key = content_key("vae", self._vae_hash, crop.pixels)
        found = _usable(self.cache.get_or_make(key, lambda: self._encode_image(crop.pixels)))
        # Scaled after the cache, which may be read for a model that scales otherwise.
        latent = self.base.process_latent_in(found["latent"][None])[0]  # (4, h, w)
        mask = crop.mask
        if mask is not None:
            height, width = latent.shape[1:]
            mask = F.adaptive_avg_pool2d(mask[None, None].float(), (height, width))[0]  # (1, h, w)
        return Sample(latent, self._sizes(crop), captions, mask)

    def _sizes(self, crop: Crop) -> Tensor:
        height, width = crop.pixels.shape[:2]
        config = self.base.model_config.unet_config
        vector: Any = self.base.encode_adm(
            pooled_output=torch.zeros(1, config["adm_in_channels"] - SIZES),
            width=crop.original_size[0],
            height=crop.original_size[1],
            crop_w=crop.offset[0],
            crop_h=crop.offset[1],
            target_width=width,
            target_height=height,
        )
        return _plain(vector)[0, -SIZES:].clone()

    @torch.inference_mode()
    def _encode_text(self, tokens: dict[str, Any]) -> dict[str, Tensor]:
        context, pooled = self.clip.encode_from_tokens(tokens, return_pooled=True)
        config = self.base.model_config.unet_config
        widths = context.shape[-1], 0 if pooled is None else pooled.shape[-1]
        wanted = config["context_dim"], config["adm_in_channels"] - SIZES
        if pooled is None or widths != wanted:
            raise HostError(
                f"clip gives text embeddings of width {widths[0]} and {widths[1]} where the model "
                f"takes {wanted[0]} and {wanted[1]}; connect the CLIP of the same checkpoint."
            )
        return {"context": _plain(context)[0], "pooled": _plain(pooled)[0]}

    @torch.inference_mode()
    def _encode_image(self, pixels: Tensor) -> dict[str, Tensor]:
        latent = self.vae.encode(pixels[None])
        if latent.ndim != 4 or latent.shape[1] != 4:
            raise HostError(
                f"vae gives latents of shape {tuple(latent.shape)} where SDXL takes 4 channels; "
                "connect the VAE of the same checkpoint."
            )
        plain = _plain(latent)[0]
        if not plain.isfinite().all():
            raise HostError(
                "vae gave latents that are not finite; SDXL's own VAE overflows in fp16: start "
                "ComfyUI with --fp32-vae or load the fp16-fix VAE."
            )
        return {"latent": plain}


def _check_parts(clip: Any, vae: Any) -> None:
    """What can be told of them before anything is encoded. A checkpoint without a CLIP or a VAE
    gives None, or a VAE without a network."""
    if clip is None:
        raise HostError("clip is empty, as its checkpoint holds none; connect the CLIP of another.")
    if vae is None or getattr(vae, "first_stage_model", vae) is None:
        raise HostError("vae is empty, as its file holds none; connect the VAE of SDXL.")
    channels, sides = getattr(vae, "latent_channels", 4), getattr(vae, "latent_dim", 2)
    if (channels, sides) != (4, 2):
        raise HostError(
            f"vae makes latents of {channels} channels in {sides} dimensions where SDXL takes 4 in "
            "2; connect the VAE of the same checkpoint."
        )


def _flat(tokens: dict[str, Any]) -> Iterator[str | int | float | Tensor]:
    """What ComfyUI's tokenizer made of a text, in a row.

    A learnt embedding is in it as its tensor: another file of the same name is another text.
    """
    for name in sorted(tokens):
        yield name
        for window in tokens[name]:
            yield len(window)
            for token, weight in window:
                yield token
                yield float(weight)


def _usable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clones: a tensor made in inference mode cannot take part in a backward pass."""
    with torch.inference_mode(False):
        return {name: tensor.clone() for name, tensor in tensors.items()}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float().cpu()
