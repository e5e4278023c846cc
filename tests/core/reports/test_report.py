"""The rank report: every component in its place, in its colour, and right in the table."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
from lora2_pack.tests.core.reports.components import SDXL, anything, component, network
from matplotlib import colormaps


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


@given(anything, st.text(max_size=200), st.text(max_size=200))
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


def test_the_colours_are_those_of_matplotlib():
    cividis = [tuple(round(255 * c) for c in colour) for colour in colormaps["cividis"].colors]
    assert list(canvas.CIVIDIS) == cividis[31::28]
    assert all(near(canvas.cividis(n / 224), one, 8) for n, one in enumerate(cividis[31:]))


def test_ranks_can_be_read_on_every_colour_and_every_cell_on_the_page():
    for step in range(201):
        fill = canvas.cividis(step / 200)
        assert canvas.contrast(canvas.ink_on(fill), fill) >= 4.5
        assert canvas.contrast(fill, canvas.BACKGROUND) >= 1.4


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
