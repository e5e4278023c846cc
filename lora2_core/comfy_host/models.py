"""MODEL, CLIP and VAE: checked, copied for training, or built."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sd
import comfy.supported_models
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.frozen import hold_a_little, in_eight_bits, keep_no_inputs
from ..adapters.swapping import BlockSwap
from ..config.train import AS_PRECISION, TrainConfig
from ..files.header import first_line
from ..training.out_of_memory import is_out_of_memory
from . import surface
from .copies.structure import casting, free_of_holders, new_unet, plain, put_objects
from .copies.weights import Weights
from .errors import HostError
from .loading import bypass
from .running import raise_if_cancelled

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_model(model: ModelPatcher) -> None:
    """Raises HostError unless ``model`` is of the SDXL family and predicts noise or v."""
    base = getattr(model, "model", None)  # a loader may give None where a file holds none
    kind = type(base).__name__
    if not isinstance(base, comfy.model_base.SDXL):
        raise HostError(
            f"model is of the {kind} family; LoRA² trains SDXL and its relatives (KOALA, SSD-1B, "
            "Vega). Load an SDXL checkpoint."
        )
    if base.concat_keys or base.model_config.unet_config.get("in_channels") != 4:
        raise HostError("model is an inpainting or edit variant; load the plain SDXL checkpoint.")
    prediction_of(model)


def prediction_of(model: ModelPatcher) -> str:
    """``EPS`` or ``V_PREDICTION``, as the model is sampled: a node may have changed its sampling.

    Raises HostError for anything else.
    """
    if prediction := _prediction(_sampling_of(model)):
        return prediction
    raise HostError(
        "model is sampled neither as noise (EPS) nor as v (V_PREDICTION) prediction, but as models "
        "for a few steps are (LCM, Lightning in one step). Train on the undistilled checkpoint, "
        "without a change of its sampling; its LoRA can be loaded on the distilled one."
    )


def private_copy(model: ModelPatcher, precision: str = "auto") -> comfy.model_base.BaseModel:
    """A frozen copy of the model with its weight and object patches, not its attention patches.

    Everything is a copy that training may touch; config and small helpers are shared. ComfyUI
    does not know the copy, so neither a prompt nor its memory management can move or patch it.
    """
    private = copy_in_ram(model, precision)
    make_room(model)
    put_in_place(private, model.load_device)
    return private


def copy_in_ram(model: ModelPatcher, precision: str = "auto") -> comfy.model_base.BaseModel:
    """A :func:`private_copy` whose U-Net is still in RAM, so that nothing of the card is taken."""
    base, weights = model.model, Weights(model, "model")
    dtype = DTYPES.get(precision) or _training_dtype(model)
    private = base.__class__.__new__(base.__class__)
    private.__dict__ = free_of_holders(base.__dict__)
    # copy.deepcopy of a BaseModel fails from ComfyUI 0.8.0 on.
    private._modules = dict(base._modules)
    private._modules["diffusion_model"] = new_unet(base, weights, dtype)
    put_objects(private, model, dtype)
    bypass.merge_into(private, model)  # adapters look at weights; this copy has room for it
    sampling = copy.deepcopy(_sampling_of(model, say=True))
    private._modules["model_sampling"] = sampling.to(model.load_device)
    private.current_patcher = None  # type: ignore[assignment]
    private.manual_cast_dtype = None
    if weights.quantised:
        kinds = ", ".join(sorted(set(weights.quantised.values())))
        logging.info("LoRA²: model is quantised (%s); its copy to train on is in %s.", kinds, dtype)
    return private


def make_room(model: ModelPatcher) -> None:
    """Before a copy of ``model`` is put in place. Only the copy is needed from here on: the model
    itself, CLIP and VAE leave the GPU (unless ComfyUI was told to keep everything there)."""
    if model.load_device.type != "cpu":
        comfy.model_management.unload_all_models()


def put_in_place(
    private: comfy.model_base.BaseModel,
    device: torch.device,
    in_ram: Sequence[nn.Module] = (),
) -> BlockSwap | None:
    """Move a copy to the ``device`` where it is trained; what of the blocks ``in_ram`` does not
    learn comes when it is used."""
    unet = private.diffusion_model
    if not in_ram:
        unet.to(device)
        return None
    swap = BlockSwap(in_ram, device)
    swap.move(unet)
    return swap


def keep_in_eight_bits(private: comfy.model_base.BaseModel) -> None:
    """Halve what the frozen weights of a copy take, before it is moved to where it is trained.

    Only layers that the copy was made with: one that a node has put there may use its weight in
    ways of its own.
    """
    kinds = plain().Linear, plain().Conv2d
    for layer in private.diffusion_model.modules():
        if isinstance(layer, kinds):
            raise_if_cancelled()  # half a minute for SDXL on a slow machine
            in_eight_bits(layer, kinds)


def keep_less(private: comfy.model_base.BaseModel) -> None:
    """Before adapters are put on a copy, and after :func:`keep_in_eight_bits`: let its layers keep
    nothing for gradients that nobody asks for."""
    keep_no_inputs(private.diffusion_model, (plain().Conv2d,))


def check_frozen_weights(model: ModelPatcher, config: TrainConfig) -> None:
    """Raises HostError unless the device of ``model`` can keep weights as ``config`` says."""
    if config.frozen_weights != "fp8":
        return
    dtype = DTYPES.get(config.precision) or _training_dtype(model)
    try:
        hold_a_little(model.load_device, dtype)
    except Exception as error:
        if is_out_of_memory(error):  # for so little: what is loaded there will make room
            return
        raise HostError(
            f"frozen_weights is fp8, and {model.load_device} cannot keep weights in it "
            f"({first_line(error)[:200]}); choose '{AS_PRECISION}'."
        ) from error


def check_precision(model: ModelPatcher, precision: str) -> None:
    """Raises HostError unless the device of ``model`` can compute in ``precision``."""
    dtype = DTYPES.get(precision) or _training_dtype(model)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            _compute_a_little(model.load_device, dtype)
    except Exception as error:
        if is_out_of_memory(error):  # for so little: what is loaded there will make room
            return
        reason = first_line(error)[:200]
        chosen = "" if precision in DTYPES else f", which comes to {dtype} here"
        raise HostError(
            f"precision is {precision}{chosen}, and {model.load_device} cannot train in it "
            f"({reason}); choose {'auto' if precision == 'fp32' else 'fp32'}."
        ) from error


def _compute_a_little(device: torch.device, dtype: torch.dtype) -> None:
    """What a block of a U-Net does, forward and backward, on 8 × 8 numbers."""
    x = torch.ones(1, 4, 8, 8, device=device, dtype=dtype, requires_grad=True)
    kernel = torch.ones(4, 4, 3, 3, device=device, dtype=dtype)
    rows = F.silu(F.group_norm(F.conv2d(x, kernel, padding=1), 2)).flatten(2)  # (1, 4, 64)
    rows = F.layer_norm(rows, rows.shape[-1:])
    F.scaled_dot_product_attention(
        rows, rows, F.linear(rows, rows.new_ones(64, 64))
    ).sum().backward()


def build_sdxl(
    unet_config: dict[str, Any],
    text_configs: dict[str, Any],
    fill: Callable[[nn.Module, nn.Module], None],
) -> tuple[ModelPatcher, Any]:
    """MODEL and CLIP of SDXL's real classes in any size; ``fill`` sets the weights of U-Net and
    text towers."""
    surface.need(surface.Part.DEMO)

    def again(**options: bool) -> list[ModelPatcher]:
        made = _sdxl(unet_config, text_configs, fill, **options)
        return [made[0], made[1].patcher]

    model, clip = _sdxl(unet_config, text_configs, fill)
    _register(model, again, 0)
    _register(clip.patcher, again, 1)
    return model, clip


def _register(patcher: Any, again: Callable[..., Any], *which: int) -> None:
    """Say how the model is made anew, as ComfyUI's loaders do: its trainer, compiling, hooks and
    several cards want one of their own (0.16 and newer)."""
    patcher.cached_patcher_init = (again, (), *which)


def _sdxl(
    unet_config: dict[str, Any],
    text_configs: dict[str, Any],
    fill: Callable[[nn.Module, nn.Module], None],
    **options_of_clip: bool,
) -> tuple[ModelPatcher, Any]:
    config = comfy.supported_models.SDXL(unet_config)
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = plain()
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    base = config.get_model({}, "", offload)
    target = config.clip_target()
    options = {**text_configs, "dtype": torch.float32, "custom_operations": casting()}
    clip = comfy.sd.CLIP(target, model_options=options, **options_of_clip)
    fill(base.diffusion_model, clip.cond_stage_model)
    patcher = comfy.model_patcher.ModelPatcher
    return patcher(base, load_device=device, offload_device=offload), clip


def build_autoencoder(weights: Mapping[str, Tensor]) -> Any:
    """A VAE of the TAESD architecture; ``weights`` are those of its encoder and decoder."""

    def build() -> Any:
        # Its latents are trained to be as SDXL's are after scaling.
        scale = torch.tensor(comfy.latent_formats.SDXL().scale_factor)
        own = {"vae_scale": scale, "vae_shift": torch.zeros(())}
        state = {**weights, **own}
        return comfy.sd.VAE(sd={n: v.to(torch.float32, copy=True) for n, v in state.items()})

    vae = build()
    _register(vae.patcher, lambda **_: build().patcher)
    return vae


def _sampling_of(model: ModelPatcher, say: bool = False) -> Any:
    """How a MODEL is sampled: as a node has set it, or as its checkpoint says.

    Under dynamic VRAM what a node has set for one clone can stay in the model that all share.
    ``say``: log it when that is so.
    """
    found: Any = model.get_model_object("model_sampling")
    if "model_sampling" in model.object_patches:
        return found
    base = model.model
    own: Any = comfy.model_base.model_sampling(base.model_config, base.model_type)
    same = found.sigmas.shape == own.sigmas.shape and _prediction(found) == _prediction(own)
    if same and torch.allclose(found.sigmas.cpu().float(), own.sigmas.float()):
        return found
    if say:
        logging.warning(
            "LoRA²: the model in memory has a sampling (%s, sigmas up to %.4g) that no node has "
            "set for this MODEL, left over from another run; it is trained as its checkpoint says "
            "(%s, up to %.4g).",
            *(_prediction(found) or type(found).__name__, float(found.sigmas.max())),
            *(_prediction(own) or type(own).__name__, float(own.sigmas.max())),
        )
    return own


def _prediction(sampling: Any) -> str | None:
    for kind in (comfy.model_sampling.EPS, comfy.model_sampling.V_PREDICTION):
        if getattr(type(sampling), "calculate_denoised", None) is kind.calculate_denoised:
            return kind.__name__
    return None


def _training_dtype(model: ModelPatcher) -> torch.dtype:
    """What ComfyUI computes in, but bf16 instead of fp16 where the card can: gradients of the
    attention entropy are far below fp16's smallest number."""
    dtype: Any = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
    if dtype == torch.float16 and comfy.model_management.should_use_bf16(model.load_device):
        return torch.bfloat16
    return dtype if dtype in DTYPES.values() else torch.bfloat16  # fp8 has no arithmetic
