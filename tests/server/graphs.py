"""Workflows to send to the server, in API format."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

TWINS = Path(__file__).resolve().parent.parent / "workflows"

Workflow = dict[str, dict[str, Any]]


def twin(name: str) -> Workflow:
    """A fresh copy of an API-format workflow of tests/workflows."""
    return json.loads((TWINS / f"{name}.json").read_text(encoding="utf-8"))


def changed(workflow: Workflow, node: str, **inputs: Any) -> Workflow:
    """A copy with other inputs at one node."""
    new = copy.deepcopy(workflow)
    new[node]["inputs"].update(inputs)
    return new


def quick(workflow: Workflow) -> Workflow:
    """The same workflow on a few small steps: what it wires counts here, not how well it learns."""
    small = {
        "LoRA2Train": {"steps": 4, "resolution": 64, "batch_size": 1},
        "EmptyLatentImage": {"width": 128, "height": 128},
        "KSampler": {"steps": 3},
    }
    new = copy.deepcopy(workflow)
    for node in new.values():
        node["inputs"].update(small.get(node["class_type"], {}))
    return new


def training(model_seed: int, /, **inputs: Any) -> Workflow:
    """A short training on the untrained model of this seed: nodes 1 model, 2 images, 3 training."""
    short = {name: node for name, node in twin("train_and_sample").items() if name in "123"}
    short = quick(short)
    short["1"] = {"class_type": "LoRA2TestModel", "inputs": {"seed": model_seed}}
    defaults = {"file_name": f"tests/{model_seed}", "target_rank": 2.0, "max_rank": 8}
    return changed(short, "3", **{**defaults, **inputs})


def painting(seed: int, model: list[Any], **nodes: dict[str, Any]) -> Workflow:
    """One picture of the untrained model of ``seed`` by the socket ``model``, saved at "p"."""
    link = {"model": model, "positive": ["c", 0], "negative": ["c", 0], "latent_image": ["l", 0]}
    settings = {"seed": 5, "steps": 3, "cfg": 1.0, "denoise": 1.0}
    names = {"sampler_name": "euler", "scheduler": "normal"}
    return {
        "1": {"class_type": "LoRA2TestModel", "inputs": {"seed": seed}},
        "c": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a cat"}},
        "l": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 128, "height": 128, "batch_size": 1},
        },
        "k": {"class_type": "KSampler", "inputs": {**link, **settings, **names}},
        "d": {"class_type": "VAEDecode", "inputs": {"samples": ["k", 0], "vae": ["1", 2]}},
        "p": {
            "class_type": "SaveImage",
            "inputs": {"images": ["d", 0], "filename_prefix": "painting"},
        },
        **nodes,
    }
