"""Writes the golden files: one of each version of the format, never to be written again.

``.venv/bin/python tests/golden/make.py`` wrote ``v1.safetensors`` and ``v1.json`` beside this
script with the first release of version 1. A reader must go on reading them; a new version of the
format gets files of its own. The numbers come from a formula, not from a generator, so that they
can be checked with pencil and paper.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Name, root, kernel, out, rank, ν, scale of B; every kind of component that a file of version 1
# can hold: fp16 and fp32, linear and convolution, all three models, and one that is left out.
COMPONENTS = (
    ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "unet", (6,), 5, 3, 0.7, 1.0),
    ("input_blocks.4.1.transformer_blocks.0.attn2.to_k", "unet", (8,), 5, 1, 2.3, 1.0),
    ("input_blocks.4.1.transformer_blocks.0.attn2.to_v", "unet", (8,), 5, 2, 0.9, 0.0),
    ("input_blocks.4.1.proj_in", "unet", (6,), 4, 2, 0.4, 1e-9),  # too faint for fp16
    ("input_blocks.1.0.in_layers.2", "unet", (3, 3, 3), 4, 2, 1.1, 1.0),
    ("input_blocks.7.0.skip_connection", "unet", (4, 1, 1), 6, 4, 0.2, 1.0),
    ("text_model.encoder.layers.0.self_attn.q_proj", "te1", (4,), 4, 2, 1.0, 1.0),
    ("text_model.encoder.layers.0.mlp.fc1", "te2", (4,), 8, 3, 0.5, 1.0),
)
METADATA = {"lora2.mode": "balanced", "lora2.quantile": "0.9", "ss_output_name": "golden"}


def number(row: int, column: int) -> float:
    """What stands in row and column of a factor before Λ is folded in."""
    return ((7 * row + 3 * column) % 11 - 5) / 4


def components(importance_of: Any, make: Any) -> list[Any]:
    """The components as training leaves them, by ``adaptive_rank.importance`` and ``Component``."""
    import torch

    made = []
    for name, root, kernel, out, rank, nu, scale in COMPONENTS:
        width = int(torch.tensor(kernel).prod())
        down = torch.tensor([[number(r, c) for c in range(width)] for r in range(rank)])
        up = torch.tensor([[scale * number(r + 1, c) for c in range(rank)] for r in range(out)])
        importance = importance_of(torch.tensor(nu), rank, "balanced")
        shaped = up.view(out, rank, *(1 for _ in kernel[1:]))
        made.append(make(name, down.view(rank, *kernel), shaped, importance, nu, root))
    return made


def main() -> None:
    runpy.run_path(str(HERE.parent.parent / "tools" / "pack.py"))["register"]()
    from lora2_pack.lora2_core import adaptive_rank, lora_file
    from lora2_pack.lora2_core.files.component import Component

    expected = {}
    made = components(adaptive_rank.importance, Component)
    for one in made:
        up, down = one.lora_up.flatten(1), one.lora_down.flatten(1)
        delta = (up * one.importance).double() @ down.double()
        stored = one.rank if bool(delta.any()) else 0
        key = lora_file.kohya_key(one.name, one.root)
        expected[key] = {"rank": stored, "nu": one.nu, "delta": delta.tolist()}
    lora_file.save(HERE / "v1.safetensors", made, METADATA)
    (HERE / "v1.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
