"""The seam to ComfyUI: the only file that imports comfy or folder_paths.

It turns MODEL, CLIP and VAE into a private model and a task for the trainer, applies LoRAs as
model patches, and resolves every path a user names.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.lora
import comfy.lora_convert
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.attention import CrossAttention, attention_pytorch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from .config import TrainConfig
from .dataset import Photo, Sample, crop
from .denoising import DenoisingTask
from .lora_file import component_keys
from .network import AdaptiveRankNetwork, find_targets, fingerprint
from .objective import CrossAttentionEntropy
from .thread_guard import ThreadGuard

_QUANTIZED = ("scale_weight", "weight_scale", "scaled_fp8")  # weights that need a scale beside
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class HostError(ValueError):
    """An input from ComfyUI cannot be used; the message names it and what to connect instead."""


@dataclass(frozen=True)
class TrainingSetup:
    """Everything a training job needs, none of it shared with the user's own model."""

    config: TrainConfig  # as asked, with the precision that ``auto`` came to
    network: AdaptiveRankNetwork
    task: DenoisingTask
    entropy: CrossAttentionEntropy
    base_hash: str


def check_model(model: ModelPatcher) -> None:
    """Raises HostError unless ``model`` is of the SDXL family and predicts noise or v."""
    base = model.model
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
    sampling = type(model.get_model_object("model_sampling"))
    for kind in (comfy.model_sampling.EPS, comfy.model_sampling.V_PREDICTION):
        if getattr(sampling, "calculate_denoised", None) is kind.calculate_denoised:
            return kind.__name__
    raise HostError(
        "model is sampled neither as noise (EPS) nor as v (V_PREDICTION) prediction; load another "
        "SDXL checkpoint, without LCM or other changes of its sampling."
    )


def prepare_training(
    model: ModelPatcher, clip: Any, vae: Any, photos: Sequence[Photo], config: TrainConfig
) -> TrainingSetup:
    """Encode the photos and captions, copy the model and put adapters on the copy.

    May be called under inference mode, as nodes are. Raises HostError for a model, CLIP or VAE
    that does not fit, and ValueError for settings that do not fit the model.
    """
    check_model(model)
    with torch.inference_mode():
        encoded = encode_samples(model, clip, vae, photos, config.resolution)
    with torch.inference_mode(False):
        # A tensor made in inference mode cannot take part in a backward pass; its clone can.
        samples = [Sample(s.latent.clone(), s.context.clone(), s.vector.clone()) for s in encoded]
        private = private_copy(model, config.precision)
        base_hash = fingerprint(private.diffusion_model)
        targets = find_targets(private.diffusion_model, config.targets)
        network = AdaptiveRankNetwork(private.diffusion_model, targets, config.rank, config.seed)
        layers = [m for n, m in private.diffusion_model.named_modules() if n.endswith(".attn2")]
        cross = CrossAttentionEntropy([m for m in layers if isinstance(m, CrossAttention)])
        # The default on the CPU splits the attention into chunks, slow to differentiate.
        options = {"optimized_attention_override": _plain_attention}
        task = DenoisingTask(private, samples, options, prediction_of(model))
        used = {dtype: name for name, dtype in _DTYPES.items()}[private.diffusion_model.dtype]
        resolved = dataclasses.replace(config, precision=used)
        return TrainingSetup(resolved, network, task, cross, base_hash)


def private_copy(model: ModelPatcher, precision: str = "auto") -> comfy.model_base.BaseModel:
    """A frozen copy of the model with its weight and object patches, not its attention patches.

    Everything is a copy that training may touch; config and small helpers are shared. ComfyUI
    does not know the copy, so neither a prompt nor its memory management can move or patch it.
    """
    base = model.model
    if any(name.endswith(_QUANTIZED) for name in base.state_dict()):
        raise HostError("model is quantized with scales; load it with weight_dtype 'default'.")
    # While a patched clone of this model is resident the weights are that clone's.
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    dtype = _DTYPES.get(precision) or _training_dtype(model)
    private = base.__class__.__new__(base.__class__)
    private.__dict__ = dict(base.__dict__)
    # copy.deepcopy of the whole BaseModel fails from ComfyUI 0.8.0 on, of these two it works.
    private._modules = dict(base._modules)
    private._modules["diffusion_model"] = _copy_frozen(base.diffusion_model, dtype)
    sampling = copy.deepcopy(model.get_model_object("model_sampling"))
    private._modules["model_sampling"] = sampling.to(model.load_device)
    private.current_patcher = None  # type: ignore[assignment]
    private.manual_cast_dtype = None
    if model.load_device.type != "cpu":
        # Only the copy is needed from here on: the model itself, CLIP and VAE leave the GPU
        # (unless ComfyUI was told to keep everything there).
        comfy.model_management.unload_all_models()
    private.diffusion_model.to(model.load_device)
    return private


def encode_samples(
    model: ModelPatcher, clip: Any, vae: Any, photos: Sequence[Photo], resolution: int
) -> list[Sample]:
    """Latents, text embeddings and size conditioning of all photos, on the CPU.

    Each caption is encoded once. Raises HostError when ``clip`` or ``vae`` is of another family.
    """
    base = model.model
    texts = {text: _encode_text(base, clip, text) for text in {p.caption for p in photos}}
    samples = []
    for photo in photos:
        cut = crop(photo, resolution)
        context, pooled = texts[photo.caption]
        vector: Any = base.encode_adm(
            pooled_output=pooled,
            width=cut.original_size[0],
            height=cut.original_size[1],
            crop_w=cut.offset[0],
            crop_h=cut.offset[1],
            target_width=resolution,
            target_height=resolution,
        )
        samples.append(Sample(_encode_image(base, vae, cut.pixels), context, _plain(vector)[0]))
    return samples


def apply_state(
    model: ModelPatcher,
    clip: Any | None,
    state: Mapping[str, Tensor],
    strength_model: float,
    strength_clip: float,
    source: str,
) -> tuple[ModelPatcher, Any | None]:
    """Clones of ``model`` and ``clip`` with a LoRA as patches, as the stock loader makes them.

    Every layer may have its own rank. Raises HostError, naming ``source``, when the LoRA fits no
    layer of the model or was made for layers of another shape.
    """
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(state)), keys, False)
    if not patches:
        raise HostError(
            f"{source} fits no layer of the connected model ({type(model.model).__name__}); it "
            "was trained for another architecture. Choose a LoRA for this model."
        )
    shapes = {key: weight.shape for key, weight in model.model.state_dict().items()}
    for key, patch in patches.items():
        _check_shape(key, patch, shapes.get(key), source)
    new_model = model.clone()
    applied = set(new_model.add_patches(patches, strength_model))
    new_clip = None if clip is None else clip.clone()
    if new_clip is not None:
        applied |= set(new_clip.add_patches(patches, strength_clip))
    unused = len(component_keys(state)) - len(applied)
    if unused > 0:
        hint = "" if clip is not None else " (those of the text encoders need clip connected)"
        logging.warning("LoRA²: %s: %d components fit no layer%s.", source, unused, hint)
    return new_model, new_clip


# Cancel is one global flag that every operation checks and the first reader consumes: a training
# thread would steal a prompt's Cancel and die of it. Entered there, this makes it deaf to the flag.
deaf_to_cancel = ThreadGuard(
    comfy.model_management, "throw_exception_if_processing_interrupted"
).silenced


def raise_if_cancelled() -> None:
    """Raises ComfyUI's own interruption when the running prompt was cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def progress_bar(total: int) -> Callable[[int], None]:
    """ComfyUI's progress bar of the node that runs now; call it with the steps done."""
    return comfy.utils.ProgressBar(total).update_absolute


def build_sdxl(
    unet_config: dict[str, Any],
    text_configs: dict[str, Any],
    fill: Callable[[nn.Module, nn.Module], None],
) -> tuple[ModelPatcher, Any]:
    """MODEL and CLIP of SDXL's real classes in any size; ``fill`` sets the weights of U-Net and
    text towers."""
    config = comfy.supported_models.SDXL(unet_config)
    config.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    base = config.get_model({}, "", offload)
    target = config.clip_target()
    clip = comfy.sd.CLIP(target, model_options={**text_configs, "dtype": torch.float32})
    fill(base.diffusion_model, clip.cond_stage_model)
    return ModelPatcher(base, load_device=device, offload_device=offload), clip


def build_autoencoder(weights: Mapping[str, Tensor]) -> Any:
    """A VAE of the TAESD architecture; ``weights`` are those of its encoder and decoder."""
    # Its latents are trained to be as SDXL's are after scaling.
    scale = torch.tensor(comfy.latent_formats.SDXL().scale_factor)
    own = {"vae_scale": scale, "vae_shift": torch.zeros(())}
    return comfy.sd.VAE(sd={name: value.float() for name, value in {**weights, **own}.items()})


def lora_names() -> list[str]:
    """LoRA files that ComfyUI lists, relative to its loras folders; safetensors only."""
    names = folder_paths.get_filename_list("loras")
    return [name for name in names if name.endswith(".safetensors")]


def lora_path(name: str) -> Path:
    """The file of a listed LoRA. Raises HostError when ``name`` is not in a loras folder."""
    if path := folder_paths.get_full_path("loras", name):
        return Path(path)
    raise HostError(f"lora_name {name!r} is not in a loras folder; choose one from the list.")


def lora_fingerprint(name: str) -> str:
    """Changes when the file does, so that ComfyUI reads it again; empty when it is not there."""
    path = folder_paths.get_full_path("loras", name)
    return str(Path(path).stat().st_mtime_ns) if path else ""


def new_lora_path(file_name: str) -> Path:
    """A path under output/loras that does not exist yet, from the name a user typed.

    ``file_name`` may hold subfolders and marks like %year%. Raises HostError for a name that
    leaves the folder.
    """
    clean = file_name.strip().removesuffix(".safetensors").replace("\\", "/")
    name = clean.rpartition("/")[2]
    leaves = clean.startswith("/") or ".." in clean.split("/")
    unfit = not 0 < len(name.strip(". ").encode()) <= 200 or any(c in clean for c in '<>:"|?*\0')
    if leaves or unfit:
        raise HostError(
            f"file_name is {file_name[:60]!r}; it must be a plain name or a subfolder and a name, "
            "such as 'cats/sks_cat', of at most 200 bytes, and stays within output/loras."
        )
    root = Path(folder_paths.get_output_directory()).resolve() / "loras"
    folder, name, counter, _, _ = folder_paths.get_save_image_path(clean, str(root))
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def dataset_folders() -> list[str]:
    """Subfolders of ComfyUI's input folder, for a list to choose from."""
    return sorted(folder_paths.get_input_subfolders())


def dataset_folder(name: str) -> Path:
    """The folder that ``name`` means: below input/, or an absolute path that ComfyUI may read.

    Allowed are the input, output and temp folders and any folder registered under the name
    ``lora2_datasets`` in extra_model_paths.yaml. Raises HostError for anything else.
    """
    root = Path(folder_paths.get_input_directory())
    registered = folder_paths.folder_names_and_paths.get("lora2_datasets", ([], set()))[0]
    outputs = (folder_paths.get_output_directory(), folder_paths.get_temp_directory())
    allowed = [root, *map(Path, outputs), *map(Path, registered)]
    path = (root / name).resolve()  # an absolute name replaces the root
    if not any(path.is_relative_to(folder.resolve()) for folder in allowed):
        raise HostError(
            f"folder {name!r} is outside ComfyUI's folders; put the images under input/, or list "
            "their folder as lora2_datasets in extra_model_paths.yaml."
        )
    if not path.is_dir():
        raise HostError(f"folder {name!r} does not exist under {root}; check the name.")
    return path


def _training_dtype(model: ModelPatcher) -> torch.dtype:
    """What ComfyUI computes in, but bf16 instead of fp16 where the card can: gradients of the
    attention entropy are far below fp16's smallest number."""
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    if dtype == torch.float16 and comfy.model_management.should_use_bf16(model.load_device):
        return torch.bfloat16
    return dtype if dtype in _DTYPES.values() else torch.bfloat16  # fp8 has no arithmetic


def _copy_frozen(module: Any, dtype: torch.dtype) -> Any:
    """A copy in RAM with its own weights, cast to ``dtype``: no second model on the GPU."""
    weights = {
        id(p): nn.Parameter(p.detach().to("cpu", dtype, copy=True), requires_grad=False)
        for p in module.parameters()
    }
    copied = copy.deepcopy(module, weights).eval()
    copied.dtype = dtype
    return copied


def _plain_attention(_chosen: object, *args: Any, **kwargs: Any) -> Tensor:
    return attention_pytorch(*args, **kwargs)


def _encode_text(base: comfy.model_base.BaseModel, clip: Any, text: str) -> tuple[Tensor, Tensor]:
    context, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    config = base.model_config.unet_config
    widths = context.shape[-1], 0 if pooled is None else pooled.shape[-1]
    wanted = config["context_dim"], config["adm_in_channels"] - 1536
    if pooled is None or widths != wanted:
        raise HostError(
            f"clip gives text embeddings of width {widths[0]} and {widths[1]} where the model "
            f"takes {wanted[0]} and {wanted[1]}; connect the CLIP of the same checkpoint."
        )
    return _plain(context)[0], _plain(pooled)


def _encode_image(base: comfy.model_base.BaseModel, vae: Any, pixels: Tensor) -> Tensor:
    latent = vae.encode(pixels[None])
    if latent.ndim != 4 or latent.shape[1] != 4:
        raise HostError(
            f"vae gives latents of shape {tuple(latent.shape)} where SDXL takes 4 channels; "
            "connect the VAE of the same checkpoint."
        )
    scaled = base.process_latent_in(_plain(latent))[0]
    if not scaled.isfinite().all():
        raise HostError(
            "vae gave latents that are not finite; SDXL's own VAE overflows in fp16: start ComfyUI "
            "with --fp32-vae or load the fp16-fix VAE."
        )
    return scaled


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float().cpu()


def _check_shape(key: str, patch: Any, shape: torch.Size | None, source: str) -> None:
    weights = getattr(patch, "weights", None)
    if shape is None or weights is None or getattr(patch, "name", "") != "lora":
        return  # text encoders, and other kinds of patch, are ComfyUI's business
    up, down, _, middle, _, reshape = weights
    if middle is not None or reshape is not None:
        return
    if (up.shape[0], down[0].numel()) != (shape[0], shape[1:].numel()):
        raise HostError(
            f"{source} was trained for another architecture: {key} is "
            f"{shape[0]}×{shape[1:].numel()} in the model and {up.shape[0]}×{down[0].numel()} in "
            "the file. Choose a LoRA for this model."
        )
