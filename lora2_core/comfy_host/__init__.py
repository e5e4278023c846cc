"""The seam to ComfyUI: only this folder imports comfy or folder_paths.

It turns MODEL, CLIP and VAE into a private model and a task for the trainer, applies LoRAs as
model patches, and resolves every path a user names.

Its modules are imported when they are first asked for: where a version of ComfyUI lacks a module,
only what needs it fails, with a sentence.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import surface
from .errors import HostError as HostError
from .surface import Part as Part
from .surface import need as need
from .surface import report as report
from .surface import version as version

if TYPE_CHECKING:
    from .encoding import Encoder as Encoder
    from .judging import clip_vision_judge as clip_vision_judge
    from .judging import judge_folder as judge_folder
    from .loading.applying import Applied as Applied
    from .loading.applying import apply_lora as apply_lora
    from .loading.applying import apply_state as apply_state
    from .models import build_autoencoder as build_autoencoder
    from .models import build_sdxl as build_sdxl
    from .models import check_model as check_model
    from .models import prediction_of as prediction_of
    from .models import private_copy as private_copy
    from .paths import cache_folder as cache_folder
    from .paths import checkpoint_folder as checkpoint_folder
    from .paths import dataset_folder as dataset_folder
    from .paths import dataset_folders as dataset_folders
    from .paths import jobs_folder as jobs_folder
    from .paths import lora_fingerprint as lora_fingerprint
    from .paths import lora_names as lora_names
    from .paths import lora_path as lora_path
    from .paths import new_lora_path as new_lora_path
    from .paths import own_folders as own_folders
    from .paths import strip_path as strip_path
    from .plan import TrainingPlan as TrainingPlan
    from .plan import check_settings as check_settings
    from .plan import plan_training as plan_training
    from .prepare import carry_out as carry_out
    from .prepare import prepare_training as prepare_training
    from .running import blocked as blocked
    from .running import deaf_to_cancel as deaf_to_cancel
    from .running import free_memory as free_memory
    from .running import progress_bar as progress_bar
    from .running import raise_if_cancelled as raise_if_cancelled
    from .running import total_memory as total_memory

_NAMES = {
    "loading.applying": ("Applied", "apply_lora", "apply_state"),
    "encoding": ("Encoder",),
    "judging": ("clip_vision_judge", "judge_folder"),
    "models": (
        "build_autoencoder",
        "build_sdxl",
        "check_model",
        "prediction_of",
        "private_copy",
    ),
    "paths": (
        "cache_folder",
        "checkpoint_folder",
        "dataset_folder",
        "dataset_folders",
        "jobs_folder",
        "lora_fingerprint",
        "lora_names",
        "lora_path",
        "new_lora_path",
        "own_folders",
        "strip_path",
    ),
    "plan": ("TrainingPlan", "check_settings", "plan_training"),
    "prepare": ("carry_out", "prepare_training"),
    "running": (
        "blocked",
        "deaf_to_cancel",
        "free_memory",
        "progress_bar",
        "raise_if_cancelled",
        "total_memory",
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_HOME[name]}", __name__)
    except ImportError as error:
        raise HostError(surface.sentence(error.name or str(error))) from error
    return getattr(module, name)
