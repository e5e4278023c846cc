"""What the pack relies on of ComfyUI, in one table, and what of it the running version lacks.

Looked at when the pack is loaded. Whatever is missing stops what needs it, with a sentence, and
nothing else.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from .errors import HostError

TESTED = "0.3.75", "0.33.0"  # ComfyUI's versions, the oldest and the newest


class Part(Enum):
    """What can fail by itself, as a message calls it."""

    TRAINING = "training"
    LOADING = "loading LoRA files into models"
    BYPASS = "applying LoRAs as bypass"
    TEXT = "training the text encoders"
    PAINTING = "painting samples and class images"
    DEMO = "the demo model"
    SCORE = "scoring with CLIP_VISION"
    MEMORY = "advice about memory"
    CANCEL = "Cancel of a training that a prompt waits for"
    PROGRESS = "the progress bar of a training"
    BACKGROUND = "trainings in the background"
    LISTS = "lists of files and folders"
    SCREEN = "panels, notes and the LoRA² tab"
    RESUME = "Resume in the LoRA² tab"


@dataclass(frozen=True)
class Used:
    """One thing of ComfyUI's: ``places`` are the names it has had, newest last; one must be there.

    ``keywords``: of arguments that are passed by name. ``fields``: attributes of its objects.
    """

    parts: tuple[Part, ...]
    places: tuple[str, ...]
    keywords: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As ComfyUI calls it today."""
        return self.places[-1]

    def lack(self) -> str:
        """What is missing of it, by its full name; empty when nothing is."""
        found = [thing for place in self.places if (thing := _find(place)) is not None]
        if not found:
            return self.name
        thing = found[-1]
        if lost := next((word for word in self.keywords if not _takes(thing, word)), None):
            return f"{self.name}({lost}=)"
        if lost := next((field for field in self.fields if not _has(thing, field)), None):
            return f"{self.name}.{lost}"
        return ""


def _of(parts: Part | tuple[Part, ...], module: str, *lines: str) -> Iterator[Used]:
    """Rows of the table. A line: a name, ``name=`` for keywords, ``.name`` for fields."""
    for line in lines:
        name, *rest = line.split()
        yield Used(
            parts if isinstance(parts, tuple) else (parts,),
            tuple(f"{place}.{name}" for place in module.split("|")),
            tuple(word[:-1] for word in rest if word.endswith("=")),
            tuple(word[1:] for word in rest if word.startswith(".")),
        )


_TRAIN, _LOAD = Part.TRAINING, (Part.LOADING, Part.TRAINING)
_COPIES = (Part.TRAINING, Part.TEXT, Part.PAINTING)
_BYPASS, _TEXT, _PAINT, _DEMO = Part.BYPASS, Part.TEXT, Part.PAINTING, Part.DEMO
_SCREEN, _LISTS = Part.SCREEN, Part.LISTS

TABLE: tuple[Used, ...] = (
    # The objects behind MODEL, CLIP and VAE.
    *_of(
        _LOAD,
        "comfy.model_patcher",
        "ModelPatcher .model .load_device .patches .is_injected .injections",
        "ModelPatcher.clone",
        "ModelPatcher.add_patches",
        "ModelPatcher.model_dtype",
    ),
    *_of(
        _COPIES,
        "comfy.model_patcher",
        "ModelPatcher .object_patches .object_patches_backup .backup .hook_backup "
        ".weight_wrapper_patches .forced_hooks",
        "ModelPatcher.get_model_object",
        "ModelPatcher.get_combined_hook_patches",
    ),
    *_of(_LOAD, "comfy.sd", "CLIP .cond_stage_model .patcher .layer_idx", "CLIP.clone"),
    *_of(_LOAD, "comfy.sd", "CLIP.add_patches"),
    *_of(_TRAIN, "comfy.sd", "CLIP.tokenize", "CLIP.encode_from_tokens return_pooled="),
    *_of(_TRAIN, "comfy.sd", "VAE .patcher", "VAE.encode"),
    *_of(
        _TRAIN,
        "comfy.model_base",
        "BaseModel .model_config .model_type .concat_keys .manual_cast_dtype .current_patcher",
        "BaseModel.apply_model",
        "BaseModel.encode_adm",
        "BaseModel.get_dtype",
        "BaseModel.process_latent_in",
        "SDXL",
        "model_sampling",
    ),
    # LoRAs.
    *_of(_LOAD, "comfy.lora", "load_lora", "model_lora_keys_unet", "model_lora_keys_clip"),
    *_of(_LOAD, "comfy.lora_convert", "convert_lora"),
    *_of(_LOAD, "comfy.utils", "get_attr"),
    *_of(_BYPASS, "comfy.patcher_extension", "PatcherInjection inject= eject="),
    *_of(_BYPASS, "comfy.model_patcher", "ModelPatcher.set_injections"),
    *_of(_BYPASS, "comfy.model_patcher", "ModelPatcher.remove_injections"),
    # Copies to train on.
    *_of(_COPIES, "comfy.lora", "calculate_weight original_weights="),
    *_of(_COPIES, "comfy.float", "stochastic_rounding seed="),
    *_of(_COPIES, "comfy.model_patcher|comfy.utils", "string_to_seed"),
    *_of(_COPIES, "comfy.model_management", "current_loaded_models"),
    *_of(_COPIES, "comfy.quant_ops", "QuantizedTensor"),
    *_of((*_COPIES, _DEMO), "comfy.ops", "disable_weight_init.Linear", "manual_cast.Linear"),
    *_of(_TRAIN, "comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel operations= device="),
    *_of(
        _TRAIN,
        "comfy.ldm.modules.attention",
        "attention_pytorch",
        "BasicTransformerBlock",
        "CrossAttention",
        "SpatialTransformer",
    ),
    *_of(_TRAIN, "comfy.model_sampling", "EPS.calculate_denoised"),
    *_of(_TRAIN, "comfy.model_sampling", "V_PREDICTION.calculate_denoised"),
    *_of(_TRAIN, "comfy.model_management", "should_use_bf16", "unload_all_models"),
    *_of(_TEXT, "comfy.clip_model", "CLIPLayer"),
    *_of(_TEXT, "comfy.sd1_clip", "gen_empty_tokens", "SDClipModel.reset_clip_options"),
    *_of(_TEXT, "comfy.sd1_clip", "SDClipModel.set_clip_options"),
    *_of(_TEXT, "comfy.sdxl_clip", "SDXLClipModel"),
    *_of(_TEXT, "comfy.sd", "CLIP .tokenizer .tokenizer_options"),
    # Pictures.
    *_of(_PAINT, "comfy.samplers", "calculate_sigmas"),
    *_of(_PAINT, "comfy.k_diffusion.sampling", "sample_dpmpp_2m disable="),
    *_of(_PAINT, "comfy.model_sampling", "EPS.noise_scaling", "EPS.inverse_noise_scaling"),
    *_of(_PAINT, "comfy.model_base", "BaseModel.process_latent_out"),
    *_of(_PAINT, "comfy.sd", "VAE .first_stage_model .vae_dtype .process_output .upscale_ratio"),
    *_of(_PAINT, "comfy.sd", "VAE.throw_exception_if_invalid"),
    *_of(_PAINT, "comfy.utils", "tiled_scale upscale_amount= output_device="),
    # The demo model.
    *_of(_DEMO, "comfy.supported_models", "SDXL.set_inference_dtype", "SDXL.get_model"),
    *_of(_DEMO, "comfy.supported_models", "SDXL.clip_target"),
    *_of(_DEMO, "comfy.latent_formats", "SDXL"),
    *_of(_DEMO, "comfy.sd", "CLIP model_options=", "VAE sd="),
    *_of(_DEMO, "comfy.model_management", "unet_offload_device"),
    # Judges, memory, Cancel, outputs that are left out.
    *_of(Part.SCORE, "comfy.clip_vision", "ClipVisionModel .model .image_size"),
    *_of(Part.SCORE, "comfy.clip_vision", "ClipVisionModel.encode_image"),
    *_of(Part.MEMORY, "comfy.model_management", "get_free_memory", "get_total_memory"),
    *_of((Part.MEMORY, _DEMO), "comfy.model_management", "get_torch_device"),
    *_of(Part.CANCEL, "comfy.model_management", "throw_exception_if_processing_interrupted"),
    *_of(Part.PROGRESS, "comfy.utils", "ProgressBar.update_absolute"),
    *_of(Part.BACKGROUND, "comfy_execution.graph_utils", "ExecutionBlocker"),
    # Files and folders.
    *_of(
        _LISTS,
        "folder_paths",
        "base_path",
        "filename_list_cache",
        "folder_names_and_paths",
        "get_filename_list",
        "get_folder_paths",
        "get_full_path",
        "get_input_directory",
        "get_input_subfolders",
        "get_temp_directory",
    ),
    *_of((_LISTS, _TRAIN), "folder_paths", "get_output_directory", "get_save_image_path"),
    *_of((_LISTS, _TRAIN, _SCREEN), "folder_paths", "get_user_directory"),
    # The server.
    *_of(_SCREEN, "server", "PromptServer .client_id .routes", "PromptServer.send_sync"),
    *_of((_SCREEN, Part.BACKGROUND), "server", "PromptServer .prompt_queue"),
    *_of(Part.BACKGROUND, "execution", "PromptQueue.get_tasks_remaining"),
    *_of(Part.RESUME, "execution", "PromptQueue.get_current_queue_volatile"),
    *_of(Part.RESUME, "server", "PromptServer .port .address"),
)


def lacks(table: Iterable[Used] = TABLE) -> dict[Part, str]:
    """What cannot work here → the first thing that it lacks, by its full name."""
    found: dict[Part, str] = {}
    for used in table:
        if lost := used.lack():
            for part in used.parts:
                found.setdefault(part, lost)
    return found


def need(*parts: Part) -> None:
    """Raises HostError when one of ``parts`` lacks something; called before its work begins."""
    if part := next((part for part in parts if part in MISSING), None):
        raise HostError(sentence(MISSING[part], [part]))


def is_there(part: Part) -> bool:
    """Whether ``part`` can work with this version of ComfyUI."""
    return part not in MISSING


def sentence(lost: str, parts: Iterable[Part] = ()) -> str:
    """What a person is told: the version, what it lacks, what does not work, what to do."""
    stopped = ", ".join(part.value for part in parts) or "what needs it"
    return (
        f"ComfyUI {version()} lacks {lost}, so this cannot work: {stopped}. The rest of LoRA² can; "
        "update LoRA², or report this with ComfyUI's version."
    )


def report() -> list[str]:
    """Say in ComfyUI's log what does not work here and whether this version has been tested."""
    lines = []
    if _numbers(version()) > _numbers(TESTED[1]) or _numbers(version()) < _numbers(TESTED[0]):
        lines.append(
            f"tested with ComfyUI {TESTED[0]} to {TESTED[1]}, not with this one, {version()}."
        )
    for lost in dict.fromkeys(MISSING.values()):
        lines.append(sentence(lost, [part for part, name in MISSING.items() if name == lost]))
    for line in lines:
        logging.warning("LoRA²: %s", line)
    return lines


def version() -> str:
    """Of the running ComfyUI, as it calls itself."""
    try:
        return str(importlib.import_module("comfyui_version").__version__)
    except (ImportError, AttributeError):
        return "of unknown version"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _find(place: str) -> Any:
    """The module, class or function of a dotted name; None where there is none."""
    parts = place.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for name in parts[count:]:
            thing = getattr(thing, name, None)
        return thing
    return None


def _takes(thing: Any, word: str) -> bool:
    parameters = inspect.signature(thing).parameters
    return word in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _has(kind: Any, field: str) -> bool:
    """Whether objects of a class have an attribute, which is mostly set in a method of theirs."""
    if not inspect.isclass(kind):
        return True  # whatever makes the objects now, what they have cannot be told
    for one in inspect.getmro(kind):
        if field in vars(one) or field in getattr(one, "__annotations__", {}):
            return True
        functions = (getattr(value, "__code__", None) for value in vars(one).values())
        if any(field in code.co_names for code in functions if code is not None):
            return True
    return False


MISSING = lacks()
