"""The terms of the loss against naive calculations in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2_pack.lora2_core.adaptive_rank import denoising_loss, gaussian_prior
from lora2_pack.lora2_core.training import objective
from lora2_pack.tests.core import toy
from lora2_pack.tests.core.stacked import by_component, grad_of
from torch import Tensor

torch.set_num_threads(1)

# batch, image tokens, text tokens, heads, width of a head
SHAPES = [(1, 1, 1, 1, 1), (1, 7, 3, 1, 4), (2, 16, 5, 3, 8), (3, 9, 77, 2, 16), (1, 64, 11, 4, 2)]
CHUNKS = [1, 40, 700, 1 << 22]  # elements; the first gives one row at a time


def random_qk(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    batch, image, text, heads, d = shape
    query = 2 * toy.noise(batch, image, heads * d, seed=seed)
    return query, 2 * toy.noise(batch, text, heads * d, seed=seed + 1)


def entropy_in_autograd(query: Tensor, key: Tensor, heads: int) -> Tensor:
    q, k = (t.view(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (query, key))
    p = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return -(p * p.log()).sum(-1).mean()


# --- eq. 11 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_denoising_loss_is_the_mean_square_in_fp32(dtype: torch.dtype) -> None:
    prediction = toy.noise(2, 4, 8, 8).to(dtype)
    target = (prediction + 1e-2 * toy.noise(2, 4, 8, 8, seed=1)).to(dtype)
    difference = prediction.double().numpy() - target.double().numpy()
    per_image = (difference**2).reshape(2, -1).mean(1)
    got = denoising_loss(prediction, target)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(per_image.mean(), rel=1e-5)


# --- the priors of eq. 9 ----------------------------------------------------------------------


def log_density(x: np.ndarray, mean: float | np.ndarray, std: float) -> np.ndarray:
    return -0.5 * ((x - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))


@settings(deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30),
    st.floats(-4, 4),
    st.floats(0.05, 20),
)
def test_prior_is_the_log_ratio_of_densities(values: list[float], mean: float, std: float) -> None:
    x = np.array(values)
    # q is a Gaussian of variance 1 around the parameter itself, taken at that parameter.
    expected = -(log_density(x, mean, std) - log_density(x, x, 1.0)).sum()
    got = gaussian_prior(torch.tensor(values), mean, std)
    scale = (((x - mean) / std) ** 2).sum() + len(x)
    assert float(got) == pytest.approx(expected, rel=1e-5, abs=1e-6 * scale)


def test_prior_of_unit_width_is_half_the_squares() -> None:
    got = gaussian_prior(torch.tensor([3.0, -1.0]), 1.0, 1.0)
    assert float(got) == 4.0  # no constant of the densities is left


# --- eq. 13 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elements", CHUNKS)
def test_entropy_is_that_of_a_naive_softmax(
    shape: tuple[int, ...], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "_SCORES_CPU", elements)
    query, key = random_qk(shape)
    got = objective.attention_entropy(query, key, shape[3])
    assert float(got) == pytest.approx(
        toy.entropy_in_numpy(query, key, shape[3]), rel=1e-5, abs=1e-7
    )


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("elements", CHUNKS)
def test_entropy_gradient_is_that_of_float64_autograd(
    shape: tuple[int, ...], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "_SCORES_CPU", elements)
    query, key = (t.requires_grad_() for t in random_qk(shape))
    (3 * objective.attention_entropy(query, key, shape[3])).backward()
    exact = [t.detach().double().requires_grad_() for t in (query, key)]
    (3 * entropy_in_autograd(*exact, shape[3])).backward()
    for got, expected in zip((query, key), exact, strict=True):
        error = (got.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert float(error) < 1e-5


def test_small_chunks_really_split_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "_SCORES_CPU", 40)
    rows = []
    plain = objective._log_attention
    monkeypatch.setattr(
        objective, "_log_attention", lambda q, k, s: rows.append(q.shape[1]) or plain(q, k, s)
    )
    objective.attention_entropy(*random_qk((1, 7, 11, 1, 4)), 1)
    assert rows == [3, 3, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_map_is_not_kept_for_the_backward_pass(dtype: torch.dtype) -> None:
    """Only what is as small as q and k, in their type."""
    query, key = (t.to(dtype).requires_grad_() for t in random_qk((1, 64, 64, 1, 4)))
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        objective.attention_entropy(query, key, 1)
    assert sum(kept) == query.nbytes + key.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entropy_of_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    query, key = (t.to(dtype).requires_grad_() for t in random_qk((2, 8, 5, 2, 4)))
    got = objective.attention_entropy(query, key, 2)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(
        toy.entropy_in_numpy(query.detach(), key.detach(), 2), rel=1e-5
    )
    got.backward()
    assert query.grad.dtype == key.grad.dtype == dtype


def test_entropy_of_no_preference_is_the_logarithm_of_the_tokens() -> None:
    key = toy.noise(1, 77, 8)
    got = objective.attention_entropy(torch.zeros(1, 4, 8), key, 2)
    assert float(got) == pytest.approx(math.log(77), rel=1e-6)


def test_entropy_of_certainty_is_zero_and_finite() -> None:
    query, key = ((1e3 * t).requires_grad_() for t in random_qk((1, 6, 9, 1, 4)))
    got = objective.attention_entropy(query, key, 1)
    grads = torch.autograd.grad(got, (query, key))
    assert 0 <= got.item() < 1e-3
    assert all(grad.isfinite().all() for grad in grads)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), scale=st.floats(0, 100), text=st.integers(1, 30))
def test_entropy_lies_between_its_bounds(seed: int, scale: float, text: int) -> None:
    query, key = random_qk((1, 5, text, 2, 4), seed)
    got = float(objective.attention_entropy(scale * query, key, 2))
    assert -1e-6 <= got <= math.log(text) * (1 + 1e-5) + 1e-6


# --- collecting it from a model ---------------------------------------------------------------


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def collector(model: toy.Transformer) -> objective.CrossAttentionEntropy:
    return objective.CrossAttentionEntropy([block.attn2 for block in model.blocks])


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    return toy.noise(2, 6, 16, seed=seed), toy.noise(2, 5, 12, seed=seed + 1)


def test_collected_entropy_is_the_mean_over_the_cross_attentions() -> None:
    model = toy.Transformer(blocks=3)
    seen: list[Tensor] = []
    for block in model.blocks:
        block.attn2.to_q.register_forward_hook(lambda _m, _a, out: seen.append(out))
        block.attn2.to_k.register_forward_hook(lambda _m, _a, out: seen.append(out))
    entropy = collector(model)
    with entropy.collecting():
        model(*inputs())
    naive = [toy.entropy_in_numpy(seen[i], seen[i + 1], 2) for i in (0, 2, 4)]
    assert float(entropy.value()) == pytest.approx(np.mean(naive), rel=1e-5)


@pytest.mark.parametrize(
    ("at_once", "calls"), [(60, 3), (239, 3), (240, 2), (359, 2), (360, 1), (1 << 22, 1)]
)
def test_maps_gathered_and_maps_alone_are_the_same(
    at_once: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three maps of 120 scores: in chunks of rows, alone, two and one, and all at once."""
    monkeypatch.setattr(objective, "_SCORES_CPU", at_once)
    monkeypatch.setattr(objective, "_SMALL_MAP_CPU", at_once // 2)  # as on a GPU
    plain, made = objective.attention_entropy, []
    monkeypatch.setattr(
        objective, "attention_entropy", lambda *a: made.append(a[0].shape[0]) or plain(*a)
    )
    model = toy.Transformer(blocks=3)
    network = toy.adapt(model, target_rank=4)
    found = []
    for gathers in (True, False):
        entropy = collector(model)
        entropy.gathers, before = gathers, len(made)
        network.refresh()
        with entropy.collecting():
            model(*inputs())
        # Two that do not fit at once are not gathered: they are computed where they arise.
        assert len(made) - before == (3 if calls == 3 or not gathers else 0)
        value = entropy.value()
        gradients = torch.autograd.grad(value, network.weights())
        of = dict(zip(network.weights(), gradients, strict=True))
        found.append([value, entropy.value(), *by_component(network, of.__getitem__)])
    assert len(made) == calls + 3 and sum(made) == 2 * 2 * 3
    assert sum(bool(part.any()) for part in found[0]) > 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


class Maps(torch.nn.Module):
    """A cross-attention whose q and k are given, so that both can be leaves."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k = torch.nn.Identity(), torch.nn.Identity()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([(1, 4, 3, 1, 2), (2, 4, 3, 1, 2), (1, 4, 3, 2, 1)]), min_size=1),
    st.sampled_from([1, 7, 12, 24, 30, 48, 60, 1000]),
)
def test_maps_of_any_kinds_have_the_mean_entropy_and_its_gradient(
    shapes: list[tuple[int, ...]], at_once: int
) -> None:
    """Of 12 and 24 scores, some alike but for their heads: gathered, in parts, row by row."""
    pairs = [tuple(t.requires_grad_() for t in random_qk(s, n)) for n, s in enumerate(shapes)]
    layers = [Maps(shape[3]) for shape in shapes]
    entropy = objective.CrossAttentionEntropy(list(layers))
    with pytest.MonkeyPatch.context() as patch, entropy.collecting():
        patch.setattr(objective, "_SCORES_CPU", at_once)
        for layer, (query, key) in zip(layers, pairs, strict=True):
            layer.to_q(query), layer.to_k(key)
        found = entropy.value()
    exact = [[t.detach().double().requires_grad_() for t in pair] for pair in pairs]
    terms = [entropy_in_autograd(*pair, s[3]) for pair, s in zip(exact, shapes, strict=True)]
    wanted = torch.stack(terms).mean()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    (3 * found).backward()
    (3 * wanted).backward()
    for own, other in zip(pairs, exact, strict=True):
        for got, expected in zip(own, other, strict=True):
            assert got.grad is not None and expected.grad is not None
            error = (got.grad.double() - expected.grad).norm()
            assert float(error) <= 1e-5 * float(expected.grad.norm()) + 1e-9


def test_each_collection_forgets_the_last() -> None:
    model = toy.Transformer()
    entropy = collector(model)
    values = []
    for seed in (0, 1, 0):
        with entropy.collecting():
            model(*inputs(seed))
        values.append(float(entropy.value()))
    assert values[0] == values[2] != values[1]


def test_collecting_leaves_the_output_alone_and_no_hook_behind() -> None:
    model = toy.Transformer()
    before = model(*inputs())
    with collector(model).collecting():
        during = model(*inputs())
        assert hook_count(model) == 4
    assert torch.equal(before, during)
    assert hook_count(model) == 0


def test_hooks_go_when_the_forward_fails() -> None:
    model = toy.Transformer()
    with pytest.raises(RuntimeError), collector(model).collecting():
        model(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    assert hook_count(model) == 0


def test_entropy_of_nothing_is_an_error() -> None:
    entropy = collector(toy.Transformer())
    with pytest.raises(RuntimeError, match="no cross-attention ran"):
        entropy.value()


def test_entropy_reaches_the_adapters_of_query_and_key_only() -> None:
    model = toy.Transformer(blocks=1)
    network = toy.adapt(model, target_rank=4)
    with torch.no_grad():
        for layer in network.layers:
            layer.lora_up.normal_()
    entropy = collector(model)
    network.refresh()
    with entropy.collecting():
        model(*inputs())
    entropy.value().backward()
    learning = {
        target.name.removeprefix("blocks.0.")
        for target, grad in zip(network.targets, by_component(network, grad_of)[1::2], strict=True)
        if grad.any()
    }
    before_it = {f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert learning == before_it | {"attn2.to_q", "attn2.to_k"}
    assert network.log_nu.grad.any()
