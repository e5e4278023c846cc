"""The paper's formulas against literal calculations in float64, and the laws of ranks."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core import adaptive_rank

torch.set_num_threads(1)

MODES = adaptive_rank.MODES
EXTREMES = (1e-12, 1e-6, 1e-3, 0.5, 2.3, 30.0, 90.0, 1e3, 1e6)
usual_nu = st.floats(2e-3, 8.0)
any_nu = st.floats(1e-12, 1e6)
quantiles = st.sampled_from((0.5, 0.8, 0.9, 0.95, 0.99))
ADAPTIVE = ("balanced", "paper")
modes = st.sampled_from(ADAPTIVE)


def f(x, nu):
    """f(x; ν) of section 3.2, as it stands there: the difference of two CDFs."""
    return (1 - np.exp(-nu * (x + 1))) - (1 - np.exp(-nu * x))


def precise_f(x: int, nu: float) -> float:
    """The same with 60 digits, where float64 would cancel to nothing."""
    with localcontext() as context:
        context.prec = 60
        rate = Decimal(nu)
        return float((1 - (-rate * (x + 1)).exp()) - (1 - (-rate * x).exp()))


def searched_rank(nu: float, quantile: float, max_rank: int) -> int:
    """The smallest number of ranks whose summed importance reaches the quantile."""
    cdf = np.cumsum(f(np.arange(max_rank), nu))
    reached = np.flatnonzero(cdf >= quantile)
    return int(reached[0]) + 1 if len(reached) else max_rank


def away_from_steps(nu: float, quantile: float) -> bool:
    """Whether rounding cannot decide the rank."""
    exact = -np.log(1 - quantile) / nu
    return abs(exact - np.round(exact)) > 2e-6 * exact


def single(value: float) -> float:
    """``value`` as fp32 holds it."""
    return float(np.float32(value))


# --- eq. 10 and what follows from it ----------------------------------------------------------


@pytest.mark.parametrize("nu", [4.5e-3, 0.02, 0.144, 1.0, 2.3])
def test_importance_is_equation_10(nu: float) -> None:
    nu, rank = single(nu), min(512, math.ceil(12 / nu))
    expected = f(np.arange(1, rank + 1), nu)
    got = adaptive_rank.importance(torch.tensor([nu]), rank, "paper")[0].numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("nu", "rank"), [(1e-6, 512), (1e-3, 2048), (0.144, 400), (5.0, 12)])
def test_importance_keeps_its_digits_in_the_tail(nu: float, rank: int) -> None:
    nu = single(nu)
    got = adaptive_rank.importance(torch.tensor([nu]), rank, "paper")[0]
    for x in (1, 2, rank // 2, rank):
        assert float(got[x - 1]) == pytest.approx(precise_f(x, nu), rel=1e-5)


@settings(deadline=None)
@given(nu=usual_nu, rank=st.integers(1, 512))
def test_balanced_importance_is_f_over_its_first_entry(nu: float, rank: int) -> None:
    nu = single(nu)
    rank = min(rank, math.ceil(10 / nu))
    expected = f(np.arange(1, rank + 1), nu) / f(1, nu)
    got = adaptive_rank.importance(torch.tensor([nu]), rank, "balanced")[0].numpy()
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=0)


def test_fixed_importance_is_one_and_moves_nothing() -> None:
    nu = torch.tensor([0.01, 0.5, 3.0], requires_grad=True)
    got = adaptive_rank.importance(nu, 7, "fixed")
    assert torch.equal(got, torch.ones(3, 7))
    assert not got.requires_grad


@settings(deadline=None)
@given(nu=st.floats(0.01, 3.0), x=st.integers(1, 30), mode=modes)
def test_gradient_of_importance(nu: float, x: int, mode: str) -> None:
    nu = single(nu)
    tensor = torch.tensor(nu, requires_grad=True)
    adaptive_rank.importance_at(tensor, torch.tensor(x), mode).backward()
    if mode == "paper":
        expected = (x + 1) * np.exp(-nu * (x + 1)) - x * np.exp(-nu * x)
        scale = x * np.exp(-nu * x)  # the two terms may cancel
    else:
        expected = -(x - 1) * np.exp(-nu * (x - 1))
        scale = abs(expected)
    assert float(tensor.grad) == pytest.approx(expected, rel=1e-5, abs=1e-5 * scale + 1e-12)


@settings(deadline=None)
@given(nu=st.floats(2.5e-3, 8.0), quantile=quantiles, max_rank=st.sampled_from((1, 7, 64, 512)))
def test_effective_rank_is_the_searched_quantile(nu: float, quantile: float, max_rank: int) -> None:
    nu = single(nu)
    assume(away_from_steps(nu, quantile))
    got = adaptive_rank.effective_rank(torch.tensor([nu]), quantile, max_rank)
    assert got.tolist() == [searched_rank(nu, quantile, max_rank)]


@pytest.mark.parametrize(("quantile", "rank"), [(0.9, 1), (0.9, 16), (0.5, 3.5), (0.99, 512)])
def test_target_nu_is_equation_12(quantile: float, rank: float) -> None:
    got = adaptive_rank.nu_for_rank(rank, quantile)
    assert got == pytest.approx(-np.log(1 - quantile) / rank, rel=1e-12)


@pytest.mark.parametrize("nu", [1e-6, 4.497e-3, 0.144, 1.0, 2.3, 10.0])
@pytest.mark.parametrize("rank", [1, 2, 16, 128, 512])
def test_init_std_sums_what_the_paper_sums(nu: float, rank: int) -> None:
    nu = single(nu)
    total = math.fsum(precise_f(j, nu) ** 2 for j in range(1, rank + 1))
    got = adaptive_rank.init_std(torch.tensor([nu]), rank)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(math.sqrt(2) / math.sqrt(total), rel=1e-5)


def test_init_std_takes_a_rank_for_every_component() -> None:
    nu, rank = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([23, 5, 1])
    got = adaptive_rank.init_std(nu, rank)
    alone = [float(adaptive_rank.init_std(nu[i : i + 1], int(rank[i]))) for i in range(3)]
    assert got.tolist() == pytest.approx(alone, rel=1e-6)


@settings(deadline=None)
@given(st.lists(usual_nu, min_size=1, max_size=40), st.floats(0.5, 512), quantiles)
def test_rank_penalty_is_equation_12(values: list[float], target: float, quantile: float) -> None:
    nus = np.array([single(v) for v in values])
    expected = np.abs(nus - -np.log(1 - quantile) / target).sum()
    got = adaptive_rank.rank_penalty(torch.tensor(values), target, quantile)
    assert float(got) == pytest.approx(expected, rel=1e-5, abs=1e-6 * nus.max())


@settings(deadline=None)
@given(st.lists(st.tuples(usual_nu, st.floats(1, 5e3)), min_size=1, max_size=40), quantiles)
def test_rank_budget_is_the_weighted_mean_rank(
    pairs: list[tuple[float, float]], quantile: float
) -> None:
    nu, weight = np.array(pairs, dtype=np.float32).astype(np.float64).T
    expected = (weight * -np.log(1 - quantile) / nu).sum() / weight.sum() / 7
    tensors = torch.tensor(nu).float(), torch.tensor(weight).float()
    got = adaptive_rank.rank_budget(*tensors, target_rank=7, quantile=quantile)
    assert float(got) == pytest.approx(expected, rel=1e-5)


@settings(deadline=None)
@given(st.lists(st.tuples(usual_nu, st.floats(0.1, 9), st.booleans()), min_size=2, max_size=20))
def test_budgets_of_groups_are_those_of_their_members(rows) -> None:
    nu, weight, first = (torch.tensor(column) for column in zip(*rows, strict=True))
    masks = [first, ~first]
    weights = torch.stack([weight * mask for mask in masks])
    targets = torch.tensor([3.0, 11.0])
    got = adaptive_rank.rank_budget(nu, weights, targets, 0.9)
    for mask, target, value in zip(masks, targets, got, strict=True):
        if mask.any():
            alone = adaptive_rank.rank_budget(nu[mask], weight[mask], float(target), 0.9)
            assert float(value) == pytest.approx(float(alone), rel=1e-5)


# --- laws -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(nu=any_nu, quantile=st.floats(1e-6, 1 - 1e-9), max_rank=st.integers(1, 4096))
def test_effective_rank_stays_within_its_bounds(nu: float, quantile: float, max_rank: int) -> None:
    got = adaptive_rank.effective_rank(torch.tensor([nu]), quantile, max_rank)
    assert got.dtype == torch.int64
    assert 1 <= int(got) <= max_rank


@pytest.mark.parametrize("nu", [0.0, math.inf])
def test_effective_rank_survives_the_ends_of_the_range(nu: float) -> None:
    got = adaptive_rank.effective_rank(torch.tensor([nu]), 0.9, 512)
    assert int(got) == (512 if nu == 0 else 1)


@settings(deadline=None)
@given(st.tuples(any_nu, any_nu), quantiles)
def test_effective_rank_falls_as_nu_rises(pair: tuple[float, float], quantile: float) -> None:
    low, high = adaptive_rank.effective_rank(torch.tensor(sorted(pair)), quantile, 4096).tolist()
    assert low >= high


def test_every_component_has_its_own_limit() -> None:
    limits = torch.tensor([3, 512, 64])
    got = adaptive_rank.effective_rank(torch.full((3,), 1e-3), 0.9, limits)
    assert got.tolist() == [3, 512, 64]


@settings(deadline=None)
@given(nu=any_nu, least=st.integers(1, 600), most=st.integers(1, 512))
def test_a_smallest_rank_clips_like_the_largest_and_gives_way_to_it(nu, least, most) -> None:
    free = adaptive_rank.effective_rank(torch.tensor([nu]), 0.9, 4096)
    got = adaptive_rank.effective_rank(torch.tensor([nu]), 0.9, most, torch.tensor([least]))
    assert int(got) == min(max(int(free), least), most)


@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.9, 0.99, 0.999])
def test_every_whole_rank_survives_its_own_nu_in_fp32(quantile: float) -> None:
    ranks = torch.arange(1, 4097)
    nu = torch.tensor([adaptive_rank.nu_for_rank(float(r), quantile) for r in ranks])
    assert nu.dtype == torch.float32
    assert torch.equal(adaptive_rank.effective_rank(nu, quantile, 8192), ranks)


@pytest.mark.parametrize(
    "quantile",
    [
        0.9,
        0.99,
        pytest.param(
            0.5,
        ),
    ],
)
def test_every_whole_rank_survives_the_logarithm_in_which_nu_is_kept(quantile: float) -> None:
    ranks = torch.arange(1, 4097)
    nu = torch.tensor([adaptive_rank.nu_for_rank(float(r), quantile) for r in ranks])
    assert torch.equal(adaptive_rank.effective_rank(nu.log().exp(), quantile, 8192), ranks)


@settings(deadline=None)
@given(nu=any_nu, mode=modes)
def test_importance_is_finite_and_never_rises(nu: float, mode: str) -> None:
    got = adaptive_rank.importance(torch.tensor([nu]), 600, mode)[0]
    assert got.isfinite().all()
    assert (got >= 0).all()
    assert (got.diff() <= 0).all()


@settings(deadline=None)
@given(nu=st.floats(1e-4, 8.0), mode=modes)
def test_importance_is_positive_and_falls_where_fp32_can_tell(nu: float, mode: str) -> None:
    rank = max(2, min(512, math.floor(70 / nu)))
    got = adaptive_rank.importance(torch.tensor([nu]), rank, mode)[0]
    assert (got > 0).all()
    assert (got.diff() < 0).all()


@pytest.mark.parametrize("nu", EXTREMES)
@pytest.mark.parametrize("rank", [1, 512, 4096])
def test_init_std_is_finite_and_positive(nu: float, rank: int) -> None:
    got = adaptive_rank.init_std(torch.tensor([nu]), rank)
    assert got.isfinite().all()
    assert (got > 0).all()


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("mode", MODES)
def test_importance_adds_the_rank_as_last_dimension(shape: tuple[int, ...], mode: str) -> None:
    got = adaptive_rank.importance(torch.full(shape, 0.3), 7, mode)
    assert got.shape == (*shape, 7)


@pytest.mark.parametrize("mode", MODES)
def test_importance_at_broadcasts_and_agrees_with_importance(mode: str) -> None:
    nu = torch.tensor([0.05, 0.3, 1.7])
    rows = adaptive_rank.importance(nu, 9, mode)
    flat = adaptive_rank.importance_at(nu[[0, 2, 1]], torch.tensor([4, 1, 9]), mode)
    assert torch.equal(flat, torch.stack([rows[0, 3], rows[2, 0], rows[1, 8]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ADAPTIVE)
def test_importance_of_a_short_nu_is_computed_in_fp32(dtype: torch.dtype, mode: str) -> None:
    got = adaptive_rank.importance(torch.tensor([0.02], dtype=dtype), 512, mode)[0]
    assert got.dtype == torch.float32
    assert (got.diff() < 0).all()  # in bf16 neighbours would collapse


@settings(deadline=None)
@given(rank=st.integers(1, 4096), proposed=st.integers(1, 4096))
def test_hysteresis_moves_past_half_a_root_only(rank: int, proposed: int) -> None:
    got = int(adaptive_rank.hysteresis(torch.tensor([rank]), torch.tensor([proposed])))
    assert got == (proposed if abs(proposed - rank) > 0.5 * rank**0.5 else rank)


def test_hysteresis_at_exactly_half_a_root_stays() -> None:
    rank, proposed = torch.tensor([4, 4, 16, 16]), torch.tensor([5, 6, 14, 13])
    assert adaptive_rank.hysteresis(rank, proposed).tolist() == [4, 6, 16, 13]


@pytest.mark.parametrize(("rank", "proposed"), [(1, 2), (2, 1), (3, 2), (1, 512), (512, 1)])
def test_hysteresis_never_traps_a_small_rank(rank: int, proposed: int) -> None:
    got = adaptive_rank.hysteresis(torch.tensor([rank]), torch.tensor([proposed]))
    assert got.tolist() == [proposed]


# --- bad values -------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_bad_quantile_is_named(quantile: float) -> None:
    with pytest.raises(ValueError, match=f"quantile is {quantile}"):
        adaptive_rank.effective_rank(torch.tensor([0.1]), quantile, 8)


@pytest.mark.parametrize("rank", [0.0, -1.0, math.nan])
def test_no_nu_for_a_rank_that_cannot_be(rank: float) -> None:
    with pytest.raises(ValueError, match="rank is"):
        adaptive_rank.nu_for_rank(rank, 0.9)


def test_bad_arguments_of_importance_are_named() -> None:
    with pytest.raises(ValueError, match="rank is 0"):
        adaptive_rank.importance(torch.tensor([0.1]), 0)
    with pytest.raises(ValueError, match="mode is 'literal'; choose one of balanced, paper"):
        adaptive_rank.importance(torch.tensor([0.1]), 3, "literal")
