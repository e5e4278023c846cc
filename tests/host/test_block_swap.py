"""A training whose frozen weights wait in RAM: what it takes, computes and learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.adapters.swapping import bytes_of_weights, is_swapped, places_of
from lora2_pack.lora2_core.comfy_host import prepare
from lora2_pack.lora2_core.comfy_host.checkpointing import blocks_of, is_checkpointed
from lora2_pack.lora2_core.comfy_host.copies.text_encoders import TextEncoders
from lora2_pack.lora2_core.config.train import (
    OptimizerConfig,
    SampleConfig,
    TextConfig,
    TrainConfig,
)
from lora2_pack.lora2_core.jobs.job import TrainingJob
from lora2_pack.lora2_core.training import estimate
from lora2_pack.lora2_core.training.out_of_memory import OutOfMemory, suggestions
from lora2_pack.lora2_core.training.setup import TrainingSetup
from lora2_pack.lora2_core.training.trainer import train
from lora2_pack.tests.host import demo

Parts = tuple[Any, Any, Any]


def _prepare(parts: Parts, **changes: Any) -> TrainingSetup:
    with torch.inference_mode():  # as nodes are
        return comfy_host.prepare_training(*parts, demo.photos(), demo.settings(**changes))


def _blocks(setup: TrainingSetup) -> list[Any]:
    return blocks_of(setup.task.model.diffusion_model)


def _losses(setup: TrainingSetup) -> list[float]:
    return [e.loss for e in train(setup.network, setup.task, setup.config, setup.entropy)]


# --- what is learnt ---------------------------------------------------------------------------

LIKE = {
    "balanced": {},
    "text": {"text": TextConfig(learning_rate=1e-3)},
    "convolutions": {"targets": "attention+ff+conv"},
    "no entropy": {"entropy_weight": 0.0},
    "accumulation": {"optimizer": OptimizerConfig(accumulation=3)},
}


@pytest.mark.parametrize("like", LIKE)
def test_the_run_is_the_one_whose_weights_are_there(parts: Parts, like: str):
    """Losses, ranks and weights; sums are taken in another order, as layers are not joined."""
    changes = {"steps": 12, "precision": "fp32", **LIKE[like]}
    plain, swapped = (_prepare(parts, block_swap=on, **changes) for on in (False, True))
    assert all(map(is_swapped, _blocks(swapped))) and not any(map(is_swapped, _blocks(plain)))
    assert _losses(swapped) == pytest.approx(_losses(plain), rel=1e-4)
    assert swapped.network.ranks == plain.network.ranks
    for one, two in zip(swapped.network.components(), plain.network.components(), strict=True):
        delta = [c.lora_up.flatten(1) @ c.lora_down.flatten(1) for c in (one, two)]
        assert (delta[0] - delta[1]).norm() <= 2e-3 * delta[1].norm()


def test_in_eight_bits_it_is_that_run_to_the_bit(parts: Parts):
    """Nothing is joined there either. With pictures painted meanwhile."""
    samples = SampleConfig(prompts=("a photo",), every=2, steps=2)
    changes = {"steps": 5, "frozen_weights": "fp8", "samples": samples}
    plain = _prepare(parts, gradient_checkpointing=True, **changes)
    swapped = _prepare(parts, block_swap=True, **changes)
    painted = []
    for setup in (plain, swapped):
        found = _losses(setup)
        assert setup.painter is not None
        painted.append((found, setup.painter.paint(("a photo",), 0, (64, 64), 2, 5.0)))
    assert painted[0][0] == painted[1][0] and torch.equal(painted[0][1], painted[1][1])
    weights = [setup.network.state() for setup in (plain, swapped)]
    for name, value in weights[0].items():
        if torch.is_tensor(value):
            assert torch.equal(value, weights[1][name]), name


def test_files_are_of_the_same_run(parts: Parts, tmp_path: Path):
    """How a run is computed is no part of what it is."""
    files = []
    for on in (False, True):
        setup = _prepare(parts, steps=3, block_swap=on)
        path = tmp_path / f"{on}.safetensors"
        job = TrainingJob(setup, path, guard=comfy_host.deaf_to_cancel)
        job.start()
        assert job.wait(60) and job.progress.error is None
        files.append(lora_file.load(path))
    assert files[0].metadata["lora2.run"] == files[1].metadata["lora2.run"]
    assert "block_swap" not in files[1].metadata["lora2.config"]
    assert files[0].state.keys() == files[1].state.keys()


def test_who_goes_on_with_more_memory_uses_it(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What was computed twice, as memory was short when the run began, is looked at anew."""
    found = []
    for free, last in ((1, 2), (10**12, 4)):
        monkeypatch.setattr(prepare, "free_memory", lambda free=free: free)
        setup = _prepare(parts, steps=4, gradient_checkpointing="auto")
        job = TrainingJob(setup, tmp_path / "x.safetensors", checkpoints=tmp_path)
        job.watch = lambda job=job, last=last: job.stop() if job.progress.step == last else None
        job.start()
        assert job.wait(120) and job.progress.step == last
        found.append([is_checkpointed(block) for block in _blocks(setup)])
    assert all(found[0]) and not any(found[1])


# --- what it takes ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["as precision", "fp8"])
def test_what_stays_on_the_device_is_told(parts: Parts, kind: str, monkeypatch: pytest.MonkeyPatch):
    plain, swapped = (
        _prepare(parts, block_swap=on, frozen_weights=kind, gradient_checkpointing=True)
        for on in (False, True)
    )
    unet, sizes = swapped.task.model.diffusion_model, bytes_of_weights(_blocks(swapped))
    places = list(places_of(unet))
    assert [len(place) for place in places] == [max(sizes)] * 2
    told = [setup.estimate.memory.frozen for setup in (plain, swapped)]
    assert told[1] - told[0] == 2 * max(sizes)  # RAM is all that a CPU has
    monkeypatch.setattr(estimate, "_computes_in_ram", lambda _network: False)
    again = _prepare(parts, block_swap=True, frozen_weights=kind)
    saved = told[0] - again.estimate.memory.frozen
    assert saved == sum(sizes) - 2 * max(sizes) > 0.25 * told[0]
    # What is fetched is not kept for the backward pass; and no B lies among zeros.
    kept = [setup.estimate.memory.activations for setup in (plain, swapped)]
    assert 0.8 * kept[0] < kept[1] <= kept[0]
    assert "computed twice, the weights of" in swapped.estimate.text()
    assert swapped.checkpointing and all(map(is_checkpointed, _blocks(swapped)))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, None])
def test_as_few_blocks_wait_as_the_free_memory_asks_for(
    parts: Parts, share: float | None, monkeypatch: pytest.MonkeyPatch
):
    """Of what all save, so much has to be saved. None: it is not even enough for that."""
    whole = _prepare(parts, block_swap=True)
    assert whole.estimate is not None
    memory, sizes = whole.estimate.memory, bytes_of_weights(_blocks(whole))
    parameters = sum(weight.numel() for weight in whole.network.weights())
    to_come = memory.learning - 4 * parameters
    room = memory.activations + (0 if share is None else int((1 - share) * sum(sizes)))
    monkeypatch.setattr(prepare, "free_memory", lambda: to_come + room - (share is None))
    monkeypatch.setattr(prepare, "_swaps", lambda _plan: True)
    setup = _prepare(parts, block_swap="auto", gradient_checkpointing="auto")
    told = setup.estimate
    assert told is not None and len(told.twice) == told.blocks == len(sizes)
    assert [n for n, block in enumerate(_blocks(setup)) if is_swapped(block)] == list(told.swapped)
    saved = sum(sizes[n] for n in told.swapped) / sum(sizes)
    wanted = 1.0 if share is None else share
    assert wanted <= saved <= wanted + 0.5 * bool(wanted)
    assert setup.config == dataclasses.replace(whole.config, block_swap=False)
    assert _losses(setup) == pytest.approx(_losses(whole), rel=1e-4)


@pytest.mark.parametrize(
    ("free", "settings", "swaps"),
    [
        (1e9, {}, True),
        (40e9, {}, False),
        (1e9, {"gradient_checkpointing": True}, True),
        (1e9, {"gradient_checkpointing": False}, False),
        (1e9, {"block_swap": False}, False),
        (40e9, {"block_swap": True}, True),
        (None, {}, False),
    ],
)
def test_memory_decides_where_nobody_did(
    parts: Parts, free: float | None, settings: Any, swaps: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prepare, "free_memory", lambda: free)
    asked = {"block_swap": "auto", "gradient_checkpointing": "auto", **settings}
    config = demo.settings(resolution=1024, **asked)
    plan = comfy_host.plan_training(*parts, demo.photos(), config)
    card = dataclasses.replace(plan, model=_on_a_card(plan.model))
    assert prepare._swaps(card) is swaps
    assert prepare._swaps(plan) is (config.block_swap is True)  # RAM is all that a CPU has
    mac = dataclasses.replace(plan, model=_on_a_card(plan.model, "mps"))  # and all of a Mac
    assert prepare._swaps(mac) is (config.block_swap is True)
    waits = plan.may_swap or config.block_swap is True
    assert (card.least_memory.total < card.lasting_memory().total) is waits
    assert plan.least_memory == plan.lasting_memory()
    assert card.leanest.block_swap is waits
    advice = suggestions(card.leanest)
    assert any("block_swap" in found.text for found in advice) is (config.block_swap is False)


def test_a_card_is_empty_before_anything_comes(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    """The user's models leave it, then what is free decides, and then text encoders come too."""
    order: list[str] = []
    for place, name in ((prepare, "make_room"), (prepare, "_swaps"), (TextEncoders, "move_to")):
        original = getattr(place, name)

        def noted(*args: Any, name: str = name, original: Any = original) -> Any:
            order.append(name)
            return original(*args)

        monkeypatch.setattr(place, name, noted)
    config = demo.settings(text=TextConfig(learning_rate=1e-3))
    plan = comfy_host.plan_training(*parts, demo.photos(), config)
    order.clear()
    comfy_host.carry_out(plan)
    assert order == ["make_room", "_swaps", "move_to"]


@pytest.mark.parametrize("place", ["put_in_place", "AdaptiveRankNetwork"])
def test_a_model_that_does_not_fit_is_told_as_a_step_is(
    parts: Parts, place: str, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 50.00 MiB. GPU 0 has a total capacity of 3.81 "
            "GiB of which 12.00 MiB is free."
        )

    monkeypatch.setattr(prepare, place, full)
    monkeypatch.setattr(prepare, "_swaps", lambda _plan: True)
    config = demo.settings(block_swap=False, gradient_checkpointing=True, precision="bf16")
    plan = comfy_host.plan_training(*parts, demo.photos(), config)
    card = dataclasses.replace(plan, model=_on_a_card(plan.model))
    monkeypatch.setattr(prepare, "make_room", lambda _model: None)
    monkeypatch.setattr(prepare, "prediction_of", lambda _model: "EPS")
    monkeypatch.setattr(prepare, "_remember_base", lambda _plan: None)
    if place != "put_in_place":
        monkeypatch.setattr(prepare, "put_in_place", lambda *_: None)
    with pytest.raises(OutOfMemory) as caught:
        comfy_host.carry_out(card)
    told = str(caught.value)
    assert told.startswith("Out of memory before the first step even with gradient checkpointing:")
    assert "52 MB more were needed and 13 MB were free" in told and "set block_swap on" in told


def _on_a_card(model: Any, device: str = "cuda") -> Any:
    clone = model.clone()
    clone.load_device = torch.device(device)
    return clone


def test_advice_knows_what_waits_already(parts: Parts):
    setup = _prepare(parts, block_swap=True)
    plain = TrainConfig(frozen_weights="fp8", gradient_checkpointing=True)
    assert any("block_swap" in found.text for found in suggestions(plain))
    assert setup.estimate is not None
    told = suggestions(plain, expected=setup.estimate, checkpointing=True)
    assert told and not any("block_swap" in found.text for found in told)
