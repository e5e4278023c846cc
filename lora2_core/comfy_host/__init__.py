"""The seam to ComfyUI: only this folder imports comfy or folder_paths.

It turns MODEL, CLIP and VAE into a private model and a task for the trainer, applies LoRAs as
model patches, and resolves every path a user names.
"""

from .applying import Applied, apply_lora, apply_state
from .encoding import Encoder
from .errors import HostError
from .judging import clip_vision_judge, judge_folder
from .models import build_autoencoder, build_sdxl, check_model, prediction_of, private_copy
from .paths import (
    cache_folder,
    checkpoint_folder,
    dataset_folder,
    dataset_folders,
    jobs_folder,
    lora_fingerprint,
    lora_names,
    lora_path,
    new_lora_path,
    own_folders,
    strip_path,
)
from .prepare import prepare_training
from .running import blocked, deaf_to_cancel, free_memory, progress_bar, raise_if_cancelled

__all__ = [
    "Applied",
    "Encoder",
    "HostError",
    "apply_lora",
    "apply_state",
    "blocked",
    "build_autoencoder",
    "build_sdxl",
    "cache_folder",
    "check_model",
    "checkpoint_folder",
    "clip_vision_judge",
    "dataset_folder",
    "dataset_folders",
    "deaf_to_cancel",
    "free_memory",
    "jobs_folder",
    "judge_folder",
    "lora_fingerprint",
    "lora_names",
    "lora_path",
    "new_lora_path",
    "own_folders",
    "prediction_of",
    "prepare_training",
    "private_copy",
    "progress_bar",
    "raise_if_cancelled",
    "strip_path",
]
