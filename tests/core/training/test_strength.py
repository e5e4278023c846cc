"""The strength at which a LoRA is saved: by its rule, on a network, and in a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora2_pack.lora2_core import lora_file
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import OptimizerConfig, TrainConfig
from lora2_pack.lora2_core.files.metadata import STRENGTH, deciding, headline
from lora2_pack.lora2_core.files.model_family import guess_family
from lora2_pack.lora2_core.reports.inspector import FileReport
from lora2_pack.lora2_core.training.losses.fixed_noise import FixedNoise
from lora2_pack.lora2_core.training.losses.strength import STRENGTHS, least_strength
from lora2_pack.tests.core import toy, toy_job
from lora2_pack.tests.core.toy_job import config, finish

torch.set_num_threads(1)
shares = st.floats(0.5, 1)


# --- the rule ---------------------------------------------------------------------------------


@given(start=st.floats(0.01, 10), slope=st.floats(0.01, 5), bend=st.floats(0, 1), share=shares)
def test_what_is_kept_is_no_less_than_asked_and_hardly_more(
    start: float, slope: float, bend: float, share: float
):
    """Of a loss that falls ever more slowly, the true curve."""

    def gain(strength: float) -> float:
        return slope * (strength - bend * strength**2 / 2)

    losses = {strength: start - gain(strength) for strength in STRENGTHS}
    found = least_strength(losses, share)
    assert 0 < found <= 1 and found == round(found, 2)
    assert gain(found) >= share * gain(1) - 1e-9 * (start + slope)
    # A line between two strengths is off by an eighth of the bend times the square of their gap.
    less = found - 0.01 - 1e-9
    slack = slope * bend * 0.4**2 / 8 + 1e-9 * (start + slope)
    assert gain(less) <= share * gain(1) + slack


@given(st.lists(st.floats(0, 2), min_size=len(STRENGTHS), max_size=len(STRENGTHS)), shares, shares)
def test_whatever_the_losses_it_is_a_strength(values: list[float], one: float, other: float):
    losses = dict(zip(STRENGTHS, values, strict=True))
    few, many = (least_strength(losses, share) for share in sorted((one, other)))
    assert 0 < few <= many <= 1
    if losses[0.0] <= losses[1.0]:
        assert few == many == 1


def test_nothing_gained_and_no_numbers_leave_it_whole():
    assert least_strength({0.0: 1.0, 0.5: 0.1, 1.0: 1.0}, 0.9) == 1
    assert least_strength({0.0: 1.0, 0.5: math.nan, 1.0: 0.5}, 0.9) == 1
    assert least_strength({0.0: 1.0, 0.5: 0.9, 1.0: math.inf}, 0.9) == 1
    assert least_strength({0.0: 1.0, 1.0: 0.5}, 0.9) == pytest.approx(0.9)
    with pytest.raises(ValueError, match=r"losses are those of \[0.5, 1.0\]; take 0 and 1"):
        least_strength({0.5: 1.0, 1.0: 0.5}, 0.9)


def test_modes_that_are_to_be_literal_keep_all():
    rank = {mode: RankConfig.for_mode(mode) for mode in ("balanced", "paper", "fixed")}
    kept = {mode: TrainConfig(rank=found).gain_to_keep for mode, found in rank.items()}
    assert kept == {"balanced": 0.96, "paper": 1, "fixed": 1}
    assert all(TrainConfig(rank=r, kept_gain=0.7).gain_to_keep == 0.7 for r in rank.values())
    # What is learnt is the same: a run goes on, whatever is asked for at its end.
    assert deciding(TrainConfig()) == deciding(TrainConfig(kept_gain=0.7))


# --- a network --------------------------------------------------------------------------------


def _trained(mode: str) -> tuple[Any, Any]:
    model = toy.Transformer()
    task = toy.TransformerTask(model)
    network = toy.adapt(model, target_rank=2.0, mode=mode)
    toy.run(network, task, steps=40, batch_size=4)
    return network, task


@pytest.mark.parametrize("mode", ["balanced", "paper", "fixed"])
def test_a_strength_scales_every_update_for_a_while(mode: str):
    network, task = _trained(mode)
    whole = network.components()
    batch = task.draw(torch.Generator().manual_seed(1), 2)
    with torch.no_grad():
        before = task.predict(batch).value
        with network.at_strength(0.5):
            scaled = network.components()
            halved = task.predict(batch).value
        network.refresh()
        assert torch.equal(task.predict(batch).value, before)
        assert not torch.allclose(halved, before, rtol=1e-3)
        for layer in network.layers:
            layer.lora_up.mul_(0.5)
        network.refresh()
        assert torch.allclose(task.predict(batch).value, halved, rtol=1e-5, atol=1e-6)
    for one, half in zip(whole, scaled, strict=True):
        assert torch.allclose(half.importance, 0.5 * one.importance)
        assert torch.equal(half.lora_up, one.lora_up)


def test_the_least_strength_keeps_the_share_on_the_fixed_draws():
    """Measured anew, by changing B itself."""
    network, task = _trained("balanced")
    judge = FixedNoise(network, task, 2)
    found = judge.least_strength(0.9)
    assert found is not None and 0.4 < found < 1

    def gain(strength: float) -> float:
        losses = []
        for factor in (0.0, strength):
            kept = [layer.lora_up.detach().clone() for layer in network.layers]
            with torch.no_grad():
                for layer in network.layers:
                    layer.lora_up.mul_(factor)
                losses.append(judge.loss() or math.nan)
                for layer, up in zip(network.layers, kept, strict=True):
                    layer.lora_up.copy_(up)
        return losses[0] - losses[1]

    assert gain(found) >= 0.9 * gain(1.0) > gain(found - 0.1)


def test_without_memory_there_is_no_answer(monkeypatch: pytest.MonkeyPatch):
    network, task = _trained("balanced")
    judge = FixedNoise(network, task, 2)

    def predict(_batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(task, "predict", predict)
    assert judge.least_strength(0.9) is None


# --- a run and its file -----------------------------------------------------------------------


def _run(folder: Path, **changes: Any) -> Any:
    folder.mkdir()
    return finish(toy_job.job(folder / "cat.safetensors", config(**{"steps": 30, **changes})))


def _delta(path: Path) -> dict[str, torch.Tensor]:
    state = lora_file.load(path).state
    stems = {name.rpartition(".lora_")[0] for name in state if ".lora_" in name}
    return {
        stem: state[f"{stem}.lora_up.weight"].float() @ state[f"{stem}.lora_down.weight"].float()
        for stem in stems
    }


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_a_balanced_run_is_saved_at_its_strength_and_says_so(tmp_path: Path, ema: float):
    optimizer = OptimizerConfig(ema=ema)
    part, whole = (
        _run(tmp_path / f"{gain}", kept_gain=gain, optimizer=optimizer) for gain in (0.8, 1.0)
    )
    metadata = lora_file.load(part.path).metadata
    strength = float(metadata[STRENGTH])
    assert 0.3 < strength < 1 and f"saved at {strength:g} of its strength" in headline(metadata)
    found, full = _delta(part.path), _delta(whole.path)
    assert found.keys() == full.keys()
    for name, delta in found.items():
        wanted, size = strength * full[name], float(delta.abs().max())
        assert torch.allclose(delta, wanted, rtol=2e-3, atol=1e-3 * size)
    assert STRENGTH not in lora_file.load(whole.path).metadata
    told = "\n".join(part.progress.log)
    assert f"Saved at {strength:.2f} of its trained strength, which keeps 80%" in told
    assert f"a loader's strength of {1 / strength:.2f} undoes it" in told
    # What was trained is the same.
    assert [e.loss for e in part.progress.events] == [e.loss for e in whole.progress.events]


def test_a_run_that_measures_no_curve_finds_its_strength_too(tmp_path: Path):
    measured, not_measured = (
        _run(tmp_path / f"{probes}", kept_gain=0.8, probes=probes) for probes in (3, 0)
    )
    strengths = [lora_file.load(j.path).metadata[STRENGTH] for j in (measured, not_measured)]
    assert strengths[0] == strengths[1]
    assert all(event.probe is None for event in not_measured.progress.events)


@pytest.mark.parametrize("error", [None, RuntimeError("odd"), torch.OutOfMemoryError("CUDA")])
def test_no_accident_there_costs_the_lora(
    tmp_path: Path, error: Exception | None, monkeypatch: pytest.MonkeyPatch
):
    def least(self: Any, share: float) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(FixedNoise, "least_strength", least)
    job = _run(tmp_path / "run", kept_gain=0.8)
    assert job.progress.state == "finished" and STRENGTH not in lora_file.load(job.path).metadata
    assert any("saved at its full strength" in line for line in job.progress.log)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0.8", "as saved: 0.8 of what was trained, all of which 1.25 is"),
        *((text, "as trained") for text in ("", "1", "0", "-1", "nan", "inf", "x" * 9999)),
    ],
)
def test_an_inspection_says_what_strength_1_is(text: str, told: str):
    metadata = {"lora2.format_version": "1", STRENGTH: text}
    report = FileReport("a.safetensors", 0, (), metadata, guess_family({}, metadata))
    assert report.alpha == f"1 in every component, so that strength 1 is {told}"
