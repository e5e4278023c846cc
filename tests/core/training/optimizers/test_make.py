"""Optimizers by name: what each one computes, what it costs, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core.config.train import OPTIMIZERS, OptimizerConfig, TextConfig, TrainConfig
from lora2_pack.lora2_core.training.optimizers.make import (
    OptimizerError,
    check_optimizer,
    make_nu_optimizer,
    make_optimizer,
    schedule_factor,
)
from lora2_pack.tests.core import toy
from torch import Tensor, nn

torch.set_num_threads(1)

SHAPES = [(16, 256), (64, 96), (3, 7), (1, 4096)]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    return [nn.Parameter(toy.noise(*shape, seed=seed + n)) for n, shape in enumerate(SHAPES)]


def walk(optimizer, weights: list[nn.Parameter], steps: int) -> list[Tensor]:
    """Steps down Σ (w − target)² with noise, a new one each time; returns what was reached."""
    targets = [toy.noise(*w.shape, seed=100 + n) for n, w in enumerate(weights)]
    for step in range(steps):
        for n, (weight, target) in enumerate(zip(weights, targets, strict=True)):
            grad = weight.detach() - target
            weight.grad = grad + 0.3 * toy.noise(*weight.shape, seed=1000 * step + n)
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def made(name: str, weights, rate: float = 1e-2, **settings) -> torch.optim.Optimizer:
    return make_optimizer(OptimizerConfig(name=name, **settings), [(weights, rate)])


def nbytes(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> int:
    """Of the states of one weight alone: the maps of 8-bit numbers are shared by all."""
    state = optimizer.state[weight]
    tensors = [v for k, v in state.items() if torch.is_tensor(v) and not k.startswith("qmap")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- adamw ------------------------------------------------------------------------------------


def test_adamw_without_decay_is_adam_bit_by_bit() -> None:
    ours, theirs = parameters(), parameters()
    first = walk(made("adamw", ours), ours, 40)
    second = walk(torch.optim.Adam(theirs, 1e-2, fused=True), theirs, 40)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], parameters()[0])


def test_adamw_is_the_formula_of_adam() -> None:
    weights = parameters()
    reached = walk(made("adamw", weights), weights, 10)
    for n, start in enumerate(parameters()):
        w, target = start.detach().double(), toy.noise(*start.shape, seed=100 + n).double()
        m = v = torch.zeros_like(w)
        for step in range(10):
            g = w - target + 0.3 * toy.noise(*w.shape, seed=1000 * step + n).double()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            scale = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            w = w - 1e-2 * m / (1 - 0.9 ** (step + 1)) / scale
        torch.testing.assert_close(reached[n].double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_decay_shrinks_by_rate_times_decay(name: str) -> None:
    weights = parameters()
    optimizer = made(name, weights, rate=0.1, weight_decay=0.5)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for weight, start in zip(weights, parameters(), strict=True):
        torch.testing.assert_close(weight.detach(), 0.95 * start.detach())


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_each_group_has_its_own_rate_and_empty_ones_are_left_out(name: str) -> None:
    weights = parameters()
    groups = [(weights[:2], 1e-2), ([], 1.0), (weights[2:], 1e-3)]
    optimizer = make_optimizer(OptimizerConfig(name=name), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    pairs = zip(weights, parameters(), strict=True)
    moved = [(a.detach() - b.detach()).abs().max().item() for a, b in pairs]
    assert moved == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3], rel=0.01)


# --- adamw8bit --------------------------------------------------------------------------------


def test_adam_in_8_bits_follows_adam() -> None:
    """Within 5 % of the way (2 norm) after 200 steps, measured 4.2 %; tensors that are too small
    for it are Adam."""
    pytest.importorskip("bitsandbytes")
    ours, theirs = parameters(), parameters()
    eight, plain = made("adamw8bit", ours), made("adamw", theirs)
    first, second = walk(eight, ours, 200), walk(plain, theirs, 200)
    for start, a, b in zip(parameters(), first, second, strict=True):
        apart = (a - b).norm() / (b - start.detach()).norm()
        print(f"8 bits, {tuple(a.shape)}: {float(apart):.2e} of the way apart")
        assert apart < (0.05 if a.numel() >= 4096 else 1e-5)
        assert (apart > 1e-4) == (a.numel() >= 4096)  # 8 bits are seen at all


def test_moments_in_8_bits_take_less_than_a_third() -> None:
    pytest.importorskip("bitsandbytes")
    ours, theirs = parameters(), parameters()
    eight, plain = made("adamw8bit", ours), made("adamw", theirs)
    walk(eight, ours, 1), walk(plain, theirs, 1)
    for a, b in zip(ours, theirs, strict=True):
        share = nbytes(eight, a) / nbytes(plain, b)
        print(f"8 bits, {tuple(a.shape)}: {share:.3f} of the bytes")
        assert share < (0.30 if a.numel() >= 4096 else 1.01)


# --- prodigy ----------------------------------------------------------------------------------


def test_prodigy_finds_its_step_size() -> None:
    """From a millionth to where Adam would be set by hand, and near the target."""
    weights = parameters()
    optimizer = made("prodigy", weights, rate=1.0)
    reached = walk(optimizer, weights, 300)
    size = optimizer.param_groups[0]["d"]
    assert 1e-3 < size < 1
    for n, (start, end) in enumerate(zip(parameters(), reached, strict=True)):
        target = toy.noise(*end.shape, seed=100 + n)
        assert (end - target).norm() < 0.5 * (start.detach() - target).norm()


def test_prodigy_with_two_rates_is_refused_at_once() -> None:
    weights = parameters()
    config = OptimizerConfig(name="prodigy")
    with pytest.raises(OptimizerError, match="one learning rate for all: set text_learning_rate"):
        make_optimizer(config, [(weights[:2], 1.0), (weights[2:], 0.5)])
    same = make_optimizer(config, [(weights[:2], 1.0), (weights[2:], 1.0)])
    walk(same, weights, 2)
    assert len(same.param_groups) == 2
    empty = make_optimizer(config, [(weights, 1.0), ([], 0.5)])  # no text encoder is trained
    assert [group["lr"] for group in empty.param_groups] == [1.0]


# --- what is not there ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "package", "modules"),
    [
        ("adamw8bit", "bitsandbytes", ("bitsandbytes.optim.adamw", "bitsandbytes")),
        ("prodigy", "prodigyopt", ("prodigyopt",)),
    ],
)
def test_a_missing_package_is_named_with_the_setting_and_the_way_out(
    name: str, package: str, modules: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OptimizerError) as caught:
        made(name, parameters())
    message = str(caught.value)
    assert message.startswith(f"optimizer is {name}, ")
    assert f"pip install {package}" in message
    assert "choose adamw" in message
    made("adamw", parameters())  # needs neither


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("raise RuntimeError('no CUDA found\\nlong story')", r"cannot be loaded \(no CUDA found\)"),
        ("import lacking_of_bitsandbytes", "No module named 'lacking_of_bitsandbytes'"),
        ("", r"cannot be loaded \(No module named 'bitsandbytes\.optim'\)"),
    ],
)
def test_a_broken_package_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, words: str
) -> None:
    folder = tmp_path / "bitsandbytes"
    folder.mkdir()
    (folder / "__init__.py").write_text(line, encoding="utf-8")
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OptimizerError, match=words) as caught:
        made("adamw8bit", parameters())
    sys.modules.pop("bitsandbytes", None)
    message = str(caught.value)
    assert "--force-reinstall" in message and "choose adamw" in message and "\n" not in message


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_that_works_here_passes_the_trial(name: str) -> None:
    with torch.inference_mode():  # as nodes are run
        check_optimizer(settings(name), torch.device("cpu"))
        check_optimizer(settings(name, text=TextConfig(1.0)), torch.device("cpu"))


def test_the_trial_is_a_step_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without memory of its own stands for one that a package does not know."""
    with pytest.raises(OptimizerError, match="one learning rate for all"):
        check_optimizer(settings("prodigy", text=TextConfig(0.5)), torch.device("cpu"))
    with pytest.raises(OptimizerError, match=r"optimizer is prodigy, .* cannot compute on meta \("):
        check_optimizer(settings("prodigy"), torch.device("meta"))

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    check_optimizer(settings("adamw"), torch.device("cpu"))  # a card may be full just now


def settings(name: Any, text: TextConfig | None = None) -> TrainConfig:
    optimizer = OptimizerConfig(name)
    return TrainConfig(learning_rate=1.0, optimizer=optimizer, text=text or TextConfig())


def test_a_bitsandbytes_with_other_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its moments could neither be resized nor kept."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes, "__version__", "0.43.3")
    with pytest.raises(OptimizerError, match=r"adamw8bit.* 0\.44 or newer, and 0\.43\.3.*adamw\."):
        made("adamw8bit", parameters())
    for version in ("0.44.0.dev0", "0.50.2", "1.0"):
        monkeypatch.setattr(bitsandbytes, "__version__", version)
        made("adamw8bit", parameters())


# --- ν and the schedule -----------------------------------------------------------------------


def test_nu_moves_by_its_rate_and_never_decays() -> None:
    log_nu = nn.Parameter(torch.linspace(-3, 1, 9))
    optimizer = make_nu_optimizer(log_nu, 0.02)
    log_nu.grad = torch.ones(9)
    optimizer.step()
    torch.testing.assert_close(log_nu.detach(), torch.linspace(-3, 1, 9) - 0.02)
    still = nn.Parameter(torch.ones(9))
    optimizer = make_nu_optimizer(still, 0.02)
    still.grad = torch.zeros(9)
    for _ in range(20):
        optimizer.step()
    assert torch.equal(still.detach(), torch.ones(9))
    assert optimizer.state[still]["exp_avg"].dtype == torch.float32


def scheduled(schedule: Any, steps: int, warm_up: float | None) -> TrainConfig:
    optimizer = OptimizerConfig(warm_up=warm_up)
    return TrainConfig(schedule=schedule, steps=steps, optimizer=optimizer)


@pytest.mark.parametrize("steps", [1, 7, 100, 1000])
def test_a_linear_rate_falls_by_the_same_amount_each_step(steps: int) -> None:
    config = scheduled("linear", steps, 0.0)
    factors = [schedule_factor(config, n) for n in range(1, steps + 1)]
    assert factors == pytest.approx([1 - n / steps for n in range(steps)])
    assert factors[-1] > 0  # the last step still moves


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_warm_up_is_a_straight_line_over_its_share(schedule: str) -> None:
    for step in range(1, 201):
        with_it = schedule_factor(scheduled(schedule, 200, 0.25), step)
        without = schedule_factor(scheduled(schedule, 200, 0.0), step)
        assert with_it == pytest.approx(min(1.0, step / 50) * without)
    assert schedule_factor(scheduled(schedule, 200, 1.0), 1) > 0


def test_without_a_word_a_twentieth_warms_up_but_not_at_a_constant_rate() -> None:
    for step in range(1, 201):
        for schedule, share in (("constant", 0.0), ("cosine", 0.05), ("linear", 0.05)):
            given = schedule_factor(scheduled(schedule, 200, share), step)
            assert schedule_factor(scheduled(schedule, 200, None), step) == given
