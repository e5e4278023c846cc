"""Curves for a screen: thinned and smoothed without a lie."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora2_pack.nodes.screen.curves import Smoother, keep_peaks, rounded
from lora2_pack.tests.nodes.test_views import FLOATS

# --- curves ---------------------------------------------------------------------------------


@given(st.lists(FLOATS, max_size=300), st.integers(4, 60))
def test_thinned_curves_keep_both_ends_and_every_extreme(values: list[float], limit: int):
    kept = keep_peaks(values, limit)
    assert len(kept) <= limit
    assert kept == sorted(set(kept))
    if values:
        assert kept[0] == 0 and kept[-1] == len(values) - 1
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        shown = [values[index] for index in kept]
        assert max(finite) in shown and min(finite) in shown


def test_a_single_peak_among_thousands_stays():
    values = [1.0] * 50_000
    values[31_337] = 9.0
    kept = keep_peaks(values, 2000)
    assert len(kept) <= 2000 and 31_337 in kept


def smoothed(values: list[float], decay: float) -> list[float]:
    smoother = Smoother(decay)
    return [smoother.add(value) for value in values]


@given(st.floats(-1e3, 1e3), st.integers(1, 50), st.floats(0.5, 0.99))
def test_a_constant_is_smooth_from_its_first_value_on(value: float, count: int, decay: float):
    smooth = smoothed([value] * count, decay)
    assert smooth == pytest.approx([value] * count, rel=1e-9, abs=1e-9)


def test_smoothing_is_the_weighted_mean_of_all_so_far():
    values, decay = [3.0, 1.0, 4.0, 1.0, 5.0], 0.8
    for end, found in enumerate(smoothed(values, decay), 1):
        weights = [decay ** (end - 1 - n) for n in range(end)]
        mean = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert found == pytest.approx(mean)


def test_smoothing_steps_over_what_is_no_number():
    assert smoothed([2.0, math.nan, math.inf], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert math.isnan(smoothed([math.nan], 0.9)[0])


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null(value: float | None):
    assert rounded(value) is None
