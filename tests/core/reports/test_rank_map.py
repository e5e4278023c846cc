"""The plan of the rank map: every component has its cell, and nothing lies on anything else."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from lora2_pack.lora2_core.lora_file import ComponentInfo
from lora2_pack.lora2_core.reports import canvas
from lora2_pack.lora2_core.reports.rank_map import MARGIN, WIDTH, layout
from lora2_pack.tests.core.reports.components import SDXL, anything, component, network


def overlap(first, second) -> bool:
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )


def shown(plan) -> list[ComponentInfo]:
    return [cell.component for cell in plan.cells if cell.component is not None]


def test_sdxl_has_seventy_rows_in_forward_order_in_two_halves():
    components = network(SDXL)
    plan = layout(components[::-1], 100)  # the order of the input does not matter
    first_column = sorted(
        (*c.box[:2], c.component.key) for c in plan.cells if c.component.key.endswith("attn1_to_q")
    )
    assert [key for *_, key in first_column] == [c.key for c in components[::8]]
    assert len({(left, top) for left, top, _ in first_column}) == 70
    halves = {left: [key for at, _, key in first_column if at == left] for left, *_ in first_column}
    assert [len(keys) for keys in halves.values()] == [34, 36]
    assert all("output_blocks" in key for key in list(halves.values())[1])
    assert len({cell.box[0] for cell in plan.cells}) == 2 * 8


def test_columns_are_the_projections_of_self_attention_then_of_cross_attention():
    components = network([("output_blocks_3_1", 1)])
    plan = layout(components, 0)
    from_left = sorted(plan.cells, key=lambda cell: cell.box[0])
    assert [cell.component for cell in from_left] == components
    assert len({cell.box[1] for cell in plan.cells}) == 1


def test_means_stand_beside_every_row_and_below_every_column():
    components = network([("middle_block_1", 2)], lambda index: index)
    labels = {
        (round(label.x), round(label.y)): label.text for label in layout(components, 0).labels
    }
    rows = [y for (_, y), text in labels.items() if text in "01"]
    edge = max(x for x, _ in labels)
    assert [labels[edge, y] for y in rows] == ["3.5", "11.5"]
    last = max(y for _, y in labels)
    below = [text for (_, y), text in sorted(labels.items()) if y == last]
    assert below == ["mean", *(f"{mean}.0" for mean in range(4, 12)), "7.5"]


def test_a_block_that_the_file_leaves_out_keeps_its_row():
    components = [c for c in network([("middle_block_1", 4)]) if "blocks_2_" not in c.key]
    plan = layout(components, 0)
    assert len(plan.cells) == 32
    assert sum(cell.component is None for cell in plan.cells) == 8


def test_two_spellings_of_one_place_both_appear():
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out"
    components = [component(key, 3), component(key + "_0", 5)]
    assert sorted(c.rank for c in shown(layout(components, 0))) == [3, 5]


def test_more_blocks_than_fit_go_to_a_strip():
    components = network([("input_blocks_4_1", 300)])
    plan = layout(components, 0)
    assert {c.key for c in shown(plan)} == {c.key for c in components}
    assert any(label.text.startswith("Other attention") for label in plan.labels)


@pytest.mark.parametrize("count", [150, 1000, 10_000])
def test_any_number_of_cells_stays_on_the_page(count):
    plan = layout([component(f"unknown {n}") for n in range(count)], 0)
    boxes = {cell.box for cell in plan.cells}
    assert len(boxes) == count
    assert all(b[0] >= MARGIN and b[2] <= WIDTH - MARGIN and b[3] <= plan.bottom for b in boxes)
    assert plan.bottom < WIDTH, "no longer than a page is wide"


@given(anything)
@settings(max_examples=60, deadline=None)
def test_every_component_has_one_cell_and_nothing_overlaps(components):
    plan = layout(components, 50)
    assert sorted(map(repr, shown(plan))) == sorted(map(repr, components))
    boxes = [cell.box for cell in plan.cells]
    for label in plan.labels:
        width = canvas.text_width(label.text, label.size)
        left = label.x - {"left": 0, "centre": 0.5, "right": 1}[label.align] * width
        if label.text:
            boxes.append((left, label.y - 0.7 * label.size, left + width, label.y))
    assert all(b[0] >= 0 and b[2] <= WIDTH and b[3] <= plan.bottom for b in boxes)
    assert all(b[2] > b[0] and b[3] > b[1] for b in boxes)
    by_height = sorted(boxes, key=lambda b: b[1])
    for index, box in enumerate(by_height):
        below = itertools.takewhile(lambda b, end=box[3]: b[1] < end, by_height[index + 1 :])
        assert not any(overlap(box, other) for other in below)
