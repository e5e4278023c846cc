"""The rank report: every component in its place, in its colour, and right in the table."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.files.places import Place, group_label, kind_of, parse_attention
from lora2_pack.lora2_core.lora_file import ComponentInfo
from lora2_pack.lora2_core.reports import canvas
from lora2_pack.lora2_core.reports.rank_map import WIDTH, grid_top, layout
from lora2_pack.lora2_core.reports.report import (
    Scale,
    TrainingHistory,
    rank_picture,
    running_median,
    scale_ticks,
    training_picture,
)
from lora2_pack.lora2_core.reports.summary import RankSummary, histogram, rank_table, summarize

SDXL = (
    *(("input_blocks_4_1", 2), ("input_blocks_5_1", 2)),
    *(("input_blocks_7_1", 10), ("input_blocks_8_1", 10), ("middle_block_1", 10)),
    *(("output_blocks_0_1", 10), ("output_blocks_1_1", 10), ("output_blocks_2_1", 10)),
    *(("output_blocks_3_1", 2), ("output_blocks_4_1", 2), ("output_blocks_5_1", 2)),
)
ROWS = ("to_q", "to_k", "to_v", "to_out_0")


def component(key: str, rank: int = 8) -> ComponentInfo:
    return ComponentInfo(key, rank, 640, 320, 0.1, 2 * rank * 960)


def network(blocks, rank: Callable[[int], int] = lambda index: 8) -> list[ComponentInfo]:
    """Attention components in ComfyUI's naming; ``rank`` maps the running index to a rank."""
    keys = [
        f"lora_unet_{name}_transformer_blocks_{block}_attn{kind}_{row}"
        for name, depth in blocks
        for block in range(depth)
        for kind in (1, 2)
        for row in ROWS
    ]
    return [component(key, rank(index)) for index, key in enumerate(keys)]


def history(count: int, value: Callable[[int], float] = lambda step: 0.1):
    steps = tuple(range(1, count + 1))
    return TrainingHistory(
        steps=steps,
        losses=tuple(value(step) for step in steps),
        mean_ranks=tuple(20 - step / max(count, 1) for step in steps),
        probe_steps=steps[:: max(1, count // 10)],
        probe_losses=tuple(value(step) for step in steps[:: max(1, count // 10)]),
        target_rank=16.0,
    )


def colour_of(image, cell) -> tuple[int, int, int]:
    """The fill of a cell: near its corner, where no number stands."""
    left, top, _, _ = cell.box
    return image.getpixel((round(left) + 4, round(top) + 4))


def near(first, second, tolerance: int = 6) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(first, second, strict=True))


def overlap(first, second) -> bool:
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )


def shown(plan) -> list[ComponentInfo]:
    return [cell.component for cell in plan.cells if cell.component is not None]


# --- keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "group", "block", "row", "label"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", (0, 4, 1), 0, 0, "down 4.1"),
        ("lora_unet_middle_block_1_transformer_blocks_9_attn2_to_v", (1, 0, 1), 9, 6, "mid"),
        (
            "lora_unet_output_blocks_0_1_transformer_blocks_3_attn2_to_out_0",
            (2, 0, 1),
            3,
            7,
            "up 0.1",
        ),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_k",
            *((0, 1, 0), 1, 1, "down 1.0"),
        ),
        (
            "lora_unet_mid_block_attentions_0_transformer_blocks_2_attn1_to_out_0",
            (1, 0, 0),
            2,
            3,
            "mid",
        ),
        (
            "unet.up_blocks.0.attentions.2.transformer_blocks.5.attn2.to_q",
            (2, 0, 2),
            5,
            4,
            "up 0.2",
        ),
    ],
)
def test_attention_keys_in_both_namings_have_a_place(key, group, block, row, label):
    assert parse_attention(key) == Place((group, block), row)
    assert group_label(group) == label


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "Text encoder 1"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "Text encoder 1"),
        ("lora_te2_text_model_encoder_layers_31_mlp_fc2", "Text encoder 2"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj", "Feed-forward"),
        ("lora_unet_input_blocks_4_1_proj_in", "Projections"),
        ("lora_unet_input_blocks_4_0_in_layers_2", "Convolutions"),
        ("lora_unet_down_blocks_0_resnets_1_conv1", "Convolutions"),
        ("lora_unet_down_blocks_0_resnets_1_time_emb_proj", "Embeddings"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "Other attention"),
        ("something else", "Other"),
    ],
)
def test_what_is_not_in_the_grid_has_a_kind(key, kind):
    assert parse_attention(key) is None
    assert kind_of(key) == kind


# --- layout --------------------------------------------------------------------------------


def test_sdxl_has_seventy_columns_in_forward_order():
    components = network(SDXL)
    plan = layout(components[::-1], 100)  # the order of the input does not matter
    first_row = sorted(
        (c.box[0], c.component.key) for c in plan.cells if c.component.key.endswith("attn1_to_q")
    )
    assert [key for _, key in first_row] == [c.key for c in components[::8]]
    assert len(first_row) == 70
    assert len({cell.box[1] for cell in plan.cells}) == 8


def test_a_block_that_the_file_leaves_out_keeps_its_column():
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


_numbers = st.integers(0, 12)
_attention = st.builds(
    lambda stage, a, b, block, kind, row: (
        f"lora_unet_{stage}_{a}_{b}_transformer_blocks_{block}_attn{kind}_{row}"
    ),
    st.sampled_from(["input_blocks", "output_blocks", "middle_block"]),
    *(_numbers, _numbers, st.integers(0, 200), st.integers(1, 2), st.sampled_from(ROWS)),
)
_diffusers = st.builds(
    lambda stage, a, b, block, row: (
        f"lora_unet_{stage}_{a}_attentions_{b}_transformer_blocks_{block}_attn1_{row}"
    ),
    st.sampled_from(["down_blocks", "up_blocks"]),
    *(_numbers, _numbers, _numbers, st.sampled_from(ROWS)),
)
_others = st.builds(
    lambda prefix, index, tail: f"{prefix}_{index}_{tail}",
    st.sampled_from(["lora_te1_layers", "lora_te2_layers", "lora_unet_input_blocks"]),
    _numbers,
    st.sampled_from(["mlp_fc1", "ff_net_0_proj", "proj_in", "conv1", "time_emb_proj", "x"]),
)
_components = st.lists(
    st.builds(
        component,
        _attention | _diffusers | _others | st.text(max_size=90),
        st.integers(0, 40) | st.integers(0, 10**6),
    ),
    max_size=60,
)


@given(_components)
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


@given(_components, st.text(max_size=200), st.text(max_size=200))
@settings(max_examples=25, deadline=None)
def test_any_components_make_a_picture_and_a_table(components, title, subtitle):
    image = rank_picture(components, title, subtitle)
    assert (image.mode, image.width) == ("RGB", WIDTH)
    training_picture(components, history(3), title, subtitle)
    text = rank_table([c for c in components if c.key.isprintable()])
    assert max(map(len, text.splitlines())) <= 100


# --- picture -------------------------------------------------------------------------------


def test_cells_show_their_rank_as_colour():
    components = network(SDXL, lambda index: index % 513)
    image = rank_picture(components, "LoRA²", "ranks 0 to 512")
    plan = layout(components, grid_top("ranks 0 to 512"))
    scale = Scale.of(components)
    assert len(plan.cells) == 560
    for cell in plan.cells:
        rank = cell.component.rank
        expected = scale.colour(rank) if rank else canvas.BACKGROUND
        assert near(colour_of(image, cell), expected), (rank, colour_of(image, cell))
    colours = [scale.colour(rank) for rank in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]
    assert all(
        sum(abs(a - b) for a, b in zip(*pair, strict=True)) > 25
        for pair in itertools.combinations(colours, 2)
    )


def test_the_curves_push_the_same_grid_down():
    components = network([("middle_block_1", 3)], lambda index: index + 1)
    image = training_picture(components, history(40), "title")
    plan = layout(components, grid_top(curves=True))
    scale = Scale.of(components)
    for cell in plan.cells:
        assert near(colour_of(image, cell), scale.colour(cell.component.rank))


def test_one_rank_everywhere_is_one_colour():
    components = network(SDXL, lambda index: 64)
    image = rank_picture(components, "plain")
    plan = layout(components, grid_top())
    assert len({colour_of(image, cell) for cell in plan.cells}) == 1


def test_brightness_rises_with_rank():
    def lightness(rank):
        return sum(c * w for c, w in zip(scale.colour(rank), (0.2126, 0.7152, 0.0722), strict=True))

    scale = Scale(1, 512)
    values = [lightness(rank) for rank in range(1, 513)]
    # Half a level of slack, because colours are whole numbers.
    assert all(b >= a - 0.5 for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 64, 99, 128, 500, 512, 10**6])
def test_legend_ticks_start_at_one_and_end_at_the_largest(largest):
    ticks = scale_ticks(largest)
    assert ticks == sorted(set(ticks)) and len(ticks) <= 11
    assert ticks[0] == 1 and ticks[-1] == max(largest, 2)


def test_histogram_counts_every_component():
    ranks = [0, 0, 1, 2, 3, 4, 5, 8, 9, 512]
    bars = histogram([component(str(i), rank) for i, rank in enumerate(ranks)])
    assert {label: count for label, _, count in bars if count} == {
        "0": 2, "1": 1, "2": 1, "3-4": 2, "5-8": 2, "9-16": 1, "257-512": 1
    }  # fmt: skip
    assert sum(count for *_, count in bars) == len(ranks)


# --- curves --------------------------------------------------------------------------------


def uses(image, colour) -> int:
    """How many pixels of ``image`` have ``colour``."""
    return sum(count for count, found in image.getcolors(1 << 24) if near(found, colour, 12))


@pytest.mark.parametrize("count", [0, 1, 2, 9, 5000])
def test_histories_of_any_length(count):
    components = network([("middle_block_1", 1)], lambda index: 16)
    noisy = history(count, lambda step: 0.1 + 0.05 * math.sin(step * step))
    image = training_picture(components, noisy, "title")
    drawn = uses(image, (0xFF, 0xB4, 0x54))
    assert drawn > 0 if count else drawn == 0


def test_values_that_are_not_finite_are_skipped():
    def value(step):
        return (math.nan, math.inf, -math.inf, 1e300, 0.2, 0.3, 0.25)[step % 7]

    image = training_picture([], history(50, value), "title")
    assert uses(image, (0xFF, 0xB4, 0x54)) > 0
    training_picture([], history(50, lambda step: math.nan), "title")


def test_constant_and_tiny_series():
    for level in (0.0, 0.1, -3.0, 1e-12, 1e20):
        image = training_picture([], history(20, lambda step, level=level: level), "title")
        assert uses(image, (0xFF, 0xB4, 0x54)) > 0


def test_outliers_do_not_set_the_range_of_a_noisy_curve():
    ys = [0.1 + 0.001 * (i % 10) for i in range(500)]
    ys[250] = 40.0
    curve = canvas.Curve.of("raw", range(500), ys, colour=(0, 0, 0), robust=True)
    assert canvas.value_range([curve])[1] < 0.2
    assert max(median for _, median in running_median(ys)) < 0.2


@given(st.lists(st.floats(-50, 400), min_size=1, max_size=5))
def test_labels_at_the_ends_of_curves_keep_apart(wanted):
    placed = sorted(canvas.spread(wanted, 16, 20, 300))
    assert all(b - a >= 16 - 1e-6 for a, b in itertools.pairwise(placed))
    assert placed[0] >= 20 - 1e-6 and placed[-1] <= 300 + 1e-6


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_distinct_and_inside(low, span):
    ticks = canvas.ticks(low, low + span, 5)
    assert 2 <= len(ticks) <= 9
    slack = 1e-6 * (span + abs(low))
    assert low - slack <= ticks[0] and ticks[-1] <= low + span + slack


@given(st.text(max_size=300), st.floats(60, 600))
def test_long_text_is_cut_to_fit(text, width):
    assert canvas.text_width(canvas.fitted(text, 20, width), 20) <= width


def test_text_keeps_to_the_glyphs_of_the_bundled_font():
    assert canvas.drawable("LoRA² – é × 犬") == "LoRA² - e x ?"


# --- figures and table ---------------------------------------------------------------------


def test_summary():
    parts = [component("a", 0), component("b", 1), component("c", 4), component("d", 11)]
    assert summarize(parts) == RankSummary(
        count=4,
        zero_count=1,
        rank_min=0,
        rank_median=2.5,
        rank_mean=4.0,
        rank_max=11,
        parameters=16 * 960,
        nbytes=2 * 16 * 960,
    )
    assert summarize([]) == RankSummary(0, 0, 0, 0.0, 0.0, 0, 0, 0)


def test_table_numbers():
    components = network([("input_blocks_4_1", 2), ("output_blocks_0_1", 1)], lambda index: index)
    components += [component("lora_te1_layers_0_mlp_fc1", 100), component("lora_te1_layers_1", 50)]
    text = rank_table(components)
    means = {
        found[1]: [float(value) for value in found[2].split()]
        for found in re.finditer(r"^(down 4\.1|up 0\.1|all) +([\d. ]+)$", text, re.MULTILINE)
    }
    assert means == {
        "down 4.1": [4, 5, 6, 7, 8, 9, 10, 11],
        "up 0.1": [16, 17, 18, 19, 20, 21, 22, 23],
        "all": [8, 9, 10, 11, 12, 13, 14, 15],
    }
    assert "Components   26, of which 1 left out" in text
    assert re.search(r"^Text encoder 1 +2 +75\.0$", text, re.MULTILINE)
    largest = text.split("Ten largest\n")[1].splitlines()[:10]
    smallest = text.split("Ten smallest\n")[1].splitlines()
    assert [int(line.split()[0]) for line in largest] == [100, 50, 23, 22, 21, 20, 19, 18, 17, 16]
    assert [int(line.split()[0]) for line in smallest] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_table_of_one_rank_names_no_extremes():
    text = rank_table(network(SDXL, lambda index: 64))
    assert "Every component has rank 64." in text and "Ten" not in text
