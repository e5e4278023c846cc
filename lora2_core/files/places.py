"""Where a component stands in the rank map, told by its name; for the picture and for the panel.

Rows are transformer blocks in the order the network runs them, columns are q, k, v and out of self-
and of cross-attention. What is no attention has a kind in place of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .read import ComponentInfo

PROJECTIONS = ("q", "k", "v", "out")
BANDS = ("Self-attention", "Cross-attention")
STAGES = ("down", "mid", "up")
_MAX_BLOCKS = 120  # more rows than this are no map any more

_BLOCK = re.compile(
    r"(input_blocks|down_blocks|middle_block|mid_block|output_blocks|up_blocks)_(?:(\d{1,9})_)?"
    r"(?:attentions_)?(\d{1,9})_transformer_blocks_(\d{1,9})_attn([12])_(?:processor_)?"
    r"to_(q|k|v|out)(?:_0)?(?:_lora)?$"
)
_STAGE_OF = {"input": 0, "down": 0, "middle": 1, "mid": 1, "output": 2, "up": 2}
_KINDS = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("Text encoder 1", r"^(lora_te1?_|text_encoder_)(?!2_)"),
        ("Text encoder 2", r"^(lora_te2_|text_encoder_2_)"),
        ("Feed-forward", r"_ff_|_mlp_"),
        ("Projections", r"proj_(in|out)$"),
        ("Other attention", r"attn|_to_(q|k|v|out)"),
        ("Embeddings", r"emb"),
        ("Convolutions", r"conv|(in|out)_layers|skip|_op$|samplers|resnets|blocks_0_0$|unet_out_"),
        ("Other", r""),
    )
)

Group = tuple[int, int, int]  # stage, and the two indices of the attention module
Block = tuple[Group, int]  # one transformer block of a group


@dataclass(frozen=True)
class Place:
    """Where an attention component belongs: its block, its column (self q 0 … cross out 7)."""

    block: Block
    column: int


def parse_attention(key: str) -> Place | None:
    """The place of an attention component, named as in ComfyUI or as in diffusers."""
    match = None if key.startswith("lora_te") else _BLOCK.search(key.replace(".", "_"))
    if match is None:
        return None
    stage, first, second, block, kind, projection = match.groups()
    group = (_STAGE_OF[stage.split("_")[0]], int(first or 0), int(second))
    return Place((group, int(block)), 4 * (int(kind) - 1) + PROJECTIONS.index(projection))


def kind_of(key: str) -> str:
    """What a component is that has no place in the attention grid."""
    return next(name for name, pattern in _KINDS if pattern.search(key.replace(".", "_")))


def group_label(group: Group) -> str:
    """The name of a group, as in "down 4.1", "mid" and "up 0.1"."""
    stage, first, second = group
    return "mid" if stage == 1 else f"{STAGES[stage]} {first}.{second}"


def sort_components(
    components: Sequence[ComponentInfo],
) -> tuple[dict[Block, dict[int, ComponentInfo]], dict[str, list[ComponentInfo]]]:
    """Attention by block, in forward order, and column; and the rest by kind."""
    grid: dict[Block, dict[int, ComponentInfo]] = {}
    rest: list[tuple[str, ComponentInfo]] = []
    for component in components:
        place = parse_attention(component.key)
        # Two spellings of one place: the second keeps a cell of its own among the rest.
        if place is None or place.column in grid.get(place.block, {}):
            rest.append((kind_of(component.key), component))
        else:
            grid.setdefault(place.block, {})[place.column] = component
    kept = sorted(grid)[:_MAX_BLOCKS]
    for block in sorted(grid)[_MAX_BLOCKS:]:
        rest += [("Other attention", c) for c in grid[block].values()]
    blocks = _with_gaps_filled(kept)
    rest.sort(key=lambda item: _natural(item[1].key))
    kinds = {name: [c for kind, c in rest if kind == name] for name, _ in _KINDS}
    return {b: grid.get(b, {}) for b in blocks}, {k: some for k, some in kinds.items() if some}


def _natural(text: str) -> list[tuple[str, int]]:
    """A sort key that puts block 2 before block 10."""
    parts = re.findall(r"([^0-9]*)([0-9]{0,18})", text)  # int() refuses what is far longer
    return [(name, int(number or 0)) for name, number in parts]


def _with_gaps_filled(blocks: Sequence[Block]) -> list[Block]:
    """``blocks`` with those that a file leaves out entirely, where they are few."""
    last: dict[Group, int] = {}
    for group, block in blocks:
        last[group] = max(block, last.get(group, 0))
    if sum(block + 1 for block in last.values()) > _MAX_BLOCKS:
        return list(blocks)
    return [(group, block) for group in sorted(last) for block in range(last[group] + 1)]
