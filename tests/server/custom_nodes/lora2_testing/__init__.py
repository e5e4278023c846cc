"""Nodes for the tests alone: models of other families, bad images, faults on command.

Everything is of ComfyUI's real classes; only sizes are small. This folder is shown to the tests'
server and is no part of the pack.
"""

import dataclasses
import functools
import gc
import hashlib
import runpy
import threading
from pathlib import Path
from types import ModuleType

import comfy.ldm.flux.model
import comfy.model_management
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.taesd.taesd
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher

_ROOT = Path(__file__).resolve().parents[4]
_COMFYS_OWN_CANCEL = comfy.model_management.throw_exception_if_processing_interrupted


def _core() -> ModuleType:
    """The pack's core under a name of its own, whatever the pack is called here."""
    runpy.run_path(str(_ROOT / "tools" / "pack.py"))["register"]("lora2_for_testing")
    from lora2_for_testing import lora2_core  # type: ignore[import-not-found]
    from lora2_for_testing.lora2_core import comfy_host  # noqa: F401
    from lora2_for_testing.lora2_core.tiny_sdxl import model  # noqa: F401

    return lora2_core


_CORE = _core()
_DEMO = _CORE.tiny_sdxl.model
_FLUX = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
_DETECTED_BY = ("model_channels", "use_linear_in_transformer", "transformer_depth", "context_dim")


class _TinyTextEncoders(comfy.sdxl_clip.SDXLClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        options = {**_DEMO.text_configs(), **(model_options or {})}
        super().__init__(device=device, dtype=dtype, model_options=options)


class TinySDXL(comfy.supported_models.SDXL):
    """Lets CheckpointLoaderSimple read a checkpoint of the demo model's size."""

    unet_config = {  # noqa: RUF012 - ComfyUI's own shape
        **{name: _DEMO.UNET_CONFIG[name] for name in _DETECTED_BY},
        "adm_in_channels": _DEMO.UNET_CONFIG["adm_in_channels"],
        "use_temporal_attention": False,
    }

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(
            comfy.sdxl_clip.SDXLTokenizer, _TinyTextEncoders
        )


comfy.supported_models.models.append(TinySDXL)


def _fill(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)


def _other_family(kind: str) -> ModelPatcher:
    """A small model that LoRA² must refuse."""
    if kind == "Flux":
        config = comfy.supported_models.Flux(
            {
                "image_model": "flux",
                "in_channels": 16,
                "out_channels": 16,
                "vec_in_dim": 32,
                "context_in_dim": 32,
                "hidden_size": 64,
                "mlp_ratio": 2.0,
                "num_heads": 2,
                "depth": 1,
                "depth_single_blocks": 1,
                "axes_dim": [8, 12, 12],
                "theta": 10_000,
                "patch_size": 2,
                "qkv_bias": True,
                "guidance_embed": True,
                # Newer versions ask for it, older ones do not take it.
                **({"txt_ids_dims": []} if "txt_ids_dims" in _FLUX else {}),
            }
        )
    else:
        unet = {k: v for k, v in _DEMO.UNET_CONFIG.items() if k not in ("num_classes",)}
        unet |= {"adm_in_channels": None, "use_linear_in_transformer": False}
        channels = {"SD1.5 inpainting": 9}.get(kind, 4)
        config = comfy.supported_models.SD15({**unet, "in_channels": channels})
    if kind == "SDXL inpainting":
        config = comfy.supported_models.SDXL({**_DEMO.UNET_CONFIG, "in_channels": 9})
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, "", torch.device("cpu"))
    _fill(base.diffusion_model)
    return ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


class UntrainedModel:
    """A demo model of its own for each seed, which has learnt nothing."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1})}}

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "make"
    CATEGORY = "testing"

    def make(self, seed):
        fill = functools.partial(_DEMO.fill_untrained, seed=seed)
        model, clip = _CORE.comfy_host.build_sdxl(_DEMO.UNET_CONFIG, _DEMO.text_configs(), fill)
        return model, clip, _CORE.comfy_host.build_autoencoder(_DEMO.autoencoder_weights())


class OtherFamily:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (["SD1.5", "Flux", "SDXL inpainting"],)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    def make(self, kind):
        return (_other_family(kind),)


class OtherAutoencoder:
    """A VAE with sixteen latent channels, as Flux has, and a CLIP without a pooled half."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    RETURN_TYPES = ("VAE", "CLIP")
    FUNCTION = "make"
    CATEGORY = "testing"

    def make(self):
        state = comfy.taesd.taesd.TAESD(latent_channels=16).state_dict()
        state["vae_scale"] = torch.tensor(0.3611)
        small = {"clip_l_model_config": _DEMO.text_configs()["clip_l_model_config"]}
        target = comfy.supported_models.SD15({}).clip_target()
        target.params = {}
        clip = comfy.sd.CLIP(target, model_options={**small, "dtype": torch.float32})
        _fill(clip.cond_stage_model)
        return comfy.sd.VAE(sd=state), clip


class BadImages:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (["no image", "empty batch", "NaN", "infinite", "latent"],)}}

    RETURN_TYPES = ("IMAGE",)
    OUTPUT_IS_LIST = (True,)
    FUNCTION = "make"
    CATEGORY = "testing"

    def make(self, kind):
        image = torch.full((1, 128, 128, 3), 0.5)
        if kind == "no image":
            return ([],)
        if kind == "empty batch":
            return ([image[:0]],)
        if kind == "latent":
            return ([torch.zeros(1, 4, 16, 16)],)
        broken = image.clone()
        broken[0, 5, 5, 1] = float("nan") if kind == "NaN" else float("inf")
        return ([image, broken],)


class FailingModel:
    """The model, whose copy raises in the training thread after some passes, there alone."""

    @classmethod
    def INPUT_TYPES(cls):
        errors = ["RuntimeError", "OutOfMemoryError", "MemoryError", "NaN"]
        passes = ("INT", {"default": 0, "min": 0})
        return {"required": {"model": ("MODEL",), "error": (errors,), "passes": passes}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    def make(self, model, error, passes):
        left = [passes]

        def fail(_module, _args, output):
            if not threading.current_thread().name.startswith("LoRA²"):
                return output
            left[0] -= 1
            if left[0] >= 0:
                return output
            if error == "NaN":
                return output * float("nan")
            kinds = {"OutOfMemoryError": torch.OutOfMemoryError, "MemoryError": MemoryError}
            raise kinds.get(error, RuntimeError)("a fault made by the tests")

        model.model.diffusion_model.register_forward_hook(fail)
        return (model,)


def _diffusion_models() -> int:
    """How many U-Nets this process holds in memory."""
    gc.collect()
    return sum(isinstance(thing, UNetModel) for thing in gc.get_objects())


class Witness:
    """What LoRA² may have left behind: threads, a replaced Cancel, hooks, changed weights."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    @classmethod
    def IS_CHANGED(cls, **_inputs):
        return float("nan")

    RETURN_TYPES = ()
    FUNCTION = "look"
    CATEGORY = "testing"
    OUTPUT_NODE = True

    def look(self, model):
        management = comfy.model_management
        base = model.model
        digest = hashlib.sha256()
        for name, weight in sorted(base.state_dict().items()):
            digest.update(name.encode() + weight.detach().cpu().numpy().tobytes())
        hooks = [
            name
            for name, module in base.named_modules()
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        ]
        seen = {
            "threads": [thread.name for thread in threading.enumerate()],
            "cancel_is_comfys": management.throw_exception_if_processing_interrupted
            is _COMFYS_OWN_CANCEL,
            "hooks": hooks,
            "classes": sorted({type(module).__name__ for module in base.modules()}),
            "gradients": any(p.requires_grad and p.grad is not None for p in base.parameters()),
            "weights": digest.hexdigest(),
            "copies": _diffusion_models(),
        }
        return {"ui": {"seen": [seen]}}


NODE_CLASS_MAPPINGS = {
    "LoRA2TestModel": UntrainedModel,
    "LoRA2TestOtherFamily": OtherFamily,
    "LoRA2TestOtherParts": OtherAutoencoder,
    "LoRA2TestBadImages": BadImages,
    "LoRA2TestFailingModel": FailingModel,
    "LoRA2TestWitness": Witness,
}
