"""What of a prompt is kept, to send it again."""

from __future__ import annotations

import copy
import json
from typing import Any

from lora2_pack.nodes.prompt_graph import base_of, needed_by

PROMPT: dict[str, Any] = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sdxl/base.safetensors"}},
    "2": {"class_type": "LoRA2ImageFolder", "inputs": {"folder": "cat"}, "is_changed": [1.5]},
    "5": {"class_type": "LoraLoader", "inputs": {"model": ["1", 0], "lora_name": "a.safetensors"}},
    "3:7": {
        "class_type": "LoRA2Train",
        "inputs": {"model": ["5", 0], "images": ["2", 0], "steps": 4, "size": [64, 64]},
        "_meta": {"title": "Train"},
        "is_changed": [float("nan")],
    },
    "9": {"class_type": "SaveImage", "inputs": {"images": ["3:7", 4]}},
}


def test_only_what_a_node_depends_on_and_only_what_a_client_sends():
    before = copy.deepcopy(PROMPT["1"])
    found = needed_by(PROMPT, "3:7")
    assert found is not None
    assert list(found) == ["1", "2", "5", "3:7"]
    assert found["2"] == {"class_type": "LoRA2ImageFolder", "inputs": {"folder": "cat"}}
    assert found["3:7"]["_meta"] == {"title": "Train"} and "is_changed" not in found["3:7"]
    assert "NaN" not in json.dumps(found)
    assert PROMPT["1"] == before


def test_graphs_that_lead_nowhere():
    assert needed_by(PROMPT, "8") is None
    assert needed_by({}, "3") is None
    broken = {"1": {"class_type": "A", "inputs": {"x": ["2", 0], "y": ["1", 0]}}}
    assert list(needed_by(broken, "1") or ()) == ["1"], "a missing node, and one that needs itself"
    assert base_of(broken, "1") == "" and base_of({}, "1") == ""


def test_the_base_is_found_through_what_lies_between():
    assert base_of(PROMPT, "3:7") == "sdxl/base.safetensors"
    unet = {"1": {"class_type": "UNETLoader", "inputs": {"unet_name": "koala.safetensors"}}}
    assert base_of({**PROMPT, **unet}, "3:7") == "koala.safetensors"
    circle = {"1": {"class_type": "A", "inputs": {"model": ["1", 0]}}}
    assert base_of({**PROMPT, **circle}, "3:7") == ""
