"""What is drawn and how it is weighed: captions, noise, timesteps, masks, class images."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.adaptive_rank import denoising_loss
from lora2_pack.lora2_core.config.train import DataConfig, ObjectiveConfig
from lora2_pack.lora2_core.data.photos import Photo
from lora2_pack.lora2_core.data.samples import Sample
from lora2_pack.lora2_core.training.denoising import (
    Batch,
    DenoisingTask,
    min_snr_weight,
    output_scale,
    timestep_range,
)
from lora2_pack.lora2_core.training.objective import Prediction, loss_parts
from lora2_pack.lora2_core.training.setup import TrainingSetup
from lora2_pack.tests.host import demo
from torch import Tensor

TAGS = "sks cat, red hat, on a chair, at night"  # the last three may move: six orders
CLASS = "a photo of a cat"


def _masked(photo: Photo) -> Photo:
    """Learnt from in the right half only, with a soft edge."""
    mask = torch.zeros(photo.pixels.shape[:2])
    mask[:, 44:] = 0.5
    mask[:, 52:] = 1
    return Photo(photo.pixels, photo.caption, mask)


@pytest.fixture(scope="module")
def setup(parts: tuple[Any, Any, Any]) -> TrainingSetup:
    """Two photos and one with a mask, of two shapes; two class images in both shapes."""
    square, tall, third = demo.photos(3)
    given = [Photo(square.pixels, TAGS), _masked(Photo(tall.pixels, "a photo of sks cat"))]
    given.append(Photo(third.pixels.repeat(2, 1, 1), "sks cat, sitting"))
    data = DataConfig(
        buckets=True, caption_shuffle=True, class_prompt=CLASS, class_images=2, caption_dropout=0.1
    )
    classes = [Photo(photo.pixels.flip(0), "") for photo in demo.photos(2)]
    config = demo.settings(data=data, resolution=96)
    return comfy_host.prepare_training(*parts, given, config, classes)


def _task(
    setup: TrainingSetup,
    samples: list[Sample] | None = None,
    classes: list[Sample] | None = None,
    **changes: Any,
) -> DenoisingTask:
    """The setup's samples under other settings; no class images unless given."""
    task = setup.task
    return DenoisingTask(
        task.model,
        samples or task.samples,
        task.texts,
        task.options,
        task.prediction,
        demo.settings(**changes),
        classes or (),
    )


def _classes(setup: TrainingSetup, shape: torch.Size) -> list[Sample]:
    return setup.task.classes[tuple(shape)]


def _batch(task: DenoisingTask, samples: list[Sample], classes: list[Sample], seed: int = 0):
    """Chosen samples with noise and timesteps of a seed."""
    generator = torch.Generator().manual_seed(seed)
    rows = [*samples, *classes]
    steps = torch.randint(1000, (len(rows),), generator=generator)
    noise = torch.randn(len(rows), *rows[0].latent.shape, generator=generator)
    texts = tuple(row.captions[0] for row in rows)
    return Batch(tuple(rows), texts, task.sigmas[steps], noise, len(classes))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_same_draw(first: Batch, second: Batch) -> None:
    assert first.texts == second.texts and first.class_images == second.class_images
    assert torch.equal(first.sigma, second.sigma) and torch.equal(first.noise, second.noise)
    for one, other in zip(first.samples, second.samples, strict=True):
        assert torch.equal(one.latent, other.latent) and one.captions == other.captions


# --- masks ------------------------------------------------------------------------------------


def _masked_prediction(setup: TrainingSetup) -> tuple[Prediction, Tensor]:
    [sample] = [sample for sample in setup.task.samples if sample.mask is not None]
    task = _task(setup, [sample])
    said = task.predict(_batch(task, [sample], []))
    assert sample.mask is not None
    return said, sample.mask[None].expand_as(said.value)


def test_the_masked_region_has_no_gradient(setup: TrainingSetup):
    setup.network.refresh()
    said, mask = _masked_prediction(setup)
    off = mask == 0
    assert 0.3 < off.float().mean() < 0.7
    assert ((mask > 0) & (mask < 1)).any(), "no soft edge arrived"
    [slope] = torch.autograd.grad(sum(loss_parts(said)), said.value)
    assert not slope[off].any()
    expected = 2 * mask * (said.value - said.target).detach() / mask.numel()
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-9)
    assert slope[~off].all()


def test_what_is_wanted_under_the_mask_changes_no_gradient(setup: TrainingSetup):
    network = setup.network
    network.refresh()
    said, mask = _masked_prediction(setup)
    other = torch.where(mask == 0, said.target + 100, said.target)
    weights = [weight for weight in network.weights() if weight.requires_grad]
    found = [
        torch.autograd.grad(
            denoising_loss(said.value, target, said.weight),
            weights,
            retain_graph=True,
            allow_unused=True,
        )
        for target in (said.target, other)
    ]
    pairs = [(a, b) for a, b in zip(*found, strict=True) if a is not None]
    assert len(pairs) == len(weights) and any(bool(a.any()) for a, _ in pairs)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(
        denoising_loss(said.value, said.target, said.weight),
        denoising_loss(said.value, other, said.weight),
    )


def test_a_photo_without_a_mask_counts_in_full_beside_one_with(setup: TrainingSetup):
    [masked] = [sample for sample in setup.task.samples if sample.mask is not None]
    plain = Sample(masked.latent, masked.sizes, masked.captions)
    task = _task(setup, [masked, plain])
    with torch.no_grad():
        weight = task.predict(_batch(task, [plain, masked], [])).weight
    assert weight is not None and masked.mask is not None
    assert torch.equal(weight[0], torch.ones_like(weight[0]))
    assert torch.equal(weight[1], masked.mask)


# --- min-SNR ----------------------------------------------------------------------------------


def _expected_snr_weight(prediction: str, sigma: float, gamma: float) -> float:
    """Equation 9 of arXiv 2303.09556 and its text for v, with numbers instead of tensors."""
    snr = 1 / sigma**2
    return min(snr, gamma) / (snr if prediction == "EPS" else snr + 1)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["EPS", "V_PREDICTION"])
def test_min_snr_weights(prediction: str, gamma: float):
    knee = gamma**-0.5
    sigmas = [0.03, 0.2, knee * 0.99, knee, knee * 1.01, 1.0, 4.0, 14.6]
    found = min_snr_weight(prediction, torch.tensor(sigmas), gamma)
    assert found.shape == (len(sigmas), 1, 1, 1)
    expected = [_expected_snr_weight(prediction, sigma, gamma) for sigma in sigmas]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["eps", "v_prediction"])
def test_min_snr_reaches_the_loss(parts: Any, setup: TrainingSetup, name: str):
    kind = {"eps": "EPS", "v_prediction": "V_PREDICTION"}[name]
    model = ModelSamplingDiscrete().patch(parts[0], name, False)[0]
    private = comfy_host.private_copy(model)
    sample = setup.task.samples[0]
    losses: dict[float, list[float]] = {}
    for gamma in (0.0, 5.0):
        config = demo.settings(objective=ObjectiveConfig(min_snr_gamma=gamma))
        old = setup.task
        task = DenoisingTask(private, [sample], old.texts, old.options, kind, config)
        batches = [_batch(task, [sample], [], seed) for seed in range(3)]
        with torch.no_grad():
            losses[gamma] = [float(sum(loss_parts(task.predict(batch)))) for batch in batches]
    sigmas = [float(batch.sigma) for batch in batches]
    factors = [_expected_snr_weight(kind, sigma, 5.0) for sigma in sigmas]
    assert max(factors) / min(factors) > 1.5, f"the weights hardly differ at {sigmas}"
    expected = [loss * factor for loss, factor in zip(losses[0.0], factors, strict=True)]
    assert losses[5.0] == pytest.approx(expected, rel=1e-4)


def test_v_and_noise_are_weighed_alike_below_the_knee():
    # Where SNR is above γ, both weights turn the loss into γ times that of the clean latents.
    sigma = torch.tensor([0.05, 0.2])
    clean = [
        min_snr_weight(name, sigma, 5.0) * output_scale(name, sigma).square()
        for name in ("EPS", "V_PREDICTION")
    ]
    torch.testing.assert_close(clean[0], torch.full_like(clean[0], 5.0))
    torch.testing.assert_close(clean[1], torch.full_like(clean[1], 5.0))


# --- noise and timesteps ----------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 0.1, 0.5])
def test_noise_offset_s_variance(setup: TrainingSetup, offset: float):
    sample = setup.task.samples[0]
    task = _task(setup, [sample], objective=ObjectiveConfig(noise_offset=offset))
    noise = task.draw(_generator(), 2048).noise  # (2048, 4, h, w)
    pixels = sample.latent.shape[1] * sample.latent.shape[2]
    means = noise.mean((2, 3))  # 8192 independent numbers: their variance is known within 1.6 %
    assert float(means.var()) == pytest.approx(offset**2 + 1 / pixels, rel=0.08)
    inside = noise - means[..., None, None]
    assert float(inside.var()) == pytest.approx(1 - 1 / pixels, rel=0.01)
    between = torch.corrcoef(means.T)  # one number a channel, not one an image
    assert (between - torch.eye(4)).abs().max() < 0.12


def test_all_timesteps_of_the_range_and_no_other(setup: TrainingSetup):
    sample = setup.task.samples[0]
    limits = ObjectiveConfig(timestep_low=0.57, timestep_high=0.58)
    task = _task(setup, [sample], objective=limits)
    drawn = {float(sigma) for sigma in task.draw(_generator(), 400).sigma}
    assert drawn == {float(sigma) for sigma in task.sigmas[570:580]}
    probes = [float(sigma) for batch in task.spread(_generator(), 10, 3) for sigma in batch.sigma]
    assert probes == [float(sigma) for sigma in task.sigmas[570:580]]


def test_probes_lie_in_the_middle_of_equal_parts(setup: TrainingSetup):
    batches = _task(setup).spread(_generator(), 4, 1)
    assert [float(batch.sigma) for batch in batches] == [
        float(setup.task.sigmas[step]) for step in (125, 375, 625, 875)
    ]


def test_all_timesteps_are_drawn_alike(setup: TrainingSetup):
    task = _task(setup, [setup.task.samples[0]])
    sigma = task.draw(_generator(), 20_000).sigma
    steps = torch.searchsorted(task.sigmas, sigma)
    assert torch.equal(task.sigmas[steps], sigma)
    tenths = torch.bincount(steps // 100, minlength=10)
    # 2000 each with a standard deviation of 42.
    assert tenths.numel() == 10 and (tenths - 2000).abs().max() < 5 * 42, tenths.tolist()
    assert steps.min() < 10 and steps.max() > 989


def test_every_share_of_the_schedule_is_met_exactly():
    for number in range(1000):
        low = ObjectiveConfig(timestep_low=number / 1000)
        assert timestep_range(low, 1000) == (number, 1000)
        if number:
            high = ObjectiveConfig(timestep_high=number / 1000)
            assert timestep_range(high, 1000) == (0, number)


# --- captions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_caption_dropout(setup: TrainingSetup, share: float):
    task = _task(setup, [setup.task.samples[0]], data=DataConfig(caption_dropout=share))
    count = 4000
    empty = task.draw(_generator(), count).texts.count("")
    spread = math.sqrt(count * share * (1 - share))
    assert abs(empty - count * share) <= 4 * spread, empty


def test_probes_and_class_images_keep_their_captions(setup: TrainingSetup):
    sample = setup.task.samples[0]
    classes = _classes(setup, sample.latent.shape)
    data = DataConfig(caption_dropout=1, class_prompt=CLASS)
    task = _task(setup, [sample], classes, data=data)
    assert set(task.draw(_generator(), 8).texts[8:]) == {CLASS}
    probes = task.spread(_generator(), 4, 2)
    assert {text for batch in probes for text in batch.texts} == {sample.captions[0]}
    assert not any(batch.class_images for batch in probes)


def test_orders_of_a_caption_are_drawn_alike(setup: TrainingSetup):
    sample = setup.task.samples[0]
    assert len(sample.captions) == 6
    assert all(caption.startswith("sks cat, ") for caption in sample.captions)
    task = _task(setup, [sample])
    counts = Counter(task.draw(_generator(), 6000).texts)
    assert counts.keys() == set(sample.captions)
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert chi_square < 25.7, counts  # one in 10,000 with five degrees of freedom


# --- class images -----------------------------------------------------------------------------


@pytest.mark.parametrize(("photos", "classes"), [(1, 1), (3, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("prior_weight", [0.0, 0.4, 1.0])
def test_the_loss_is_that_of_the_photos_and_the_weighted_one_of_the_class(
    setup: TrainingSetup, photos: int, classes: int, prior_weight: float
):
    [masked] = [sample for sample in setup.task.samples if sample.mask is not None]
    extra = _classes(setup, masked.latent.shape)
    plain = Sample(masked.latent, masked.sizes, masked.captions)
    data = DataConfig(class_prompt=CLASS, prior_weight=prior_weight)
    objective = ObjectiveConfig(min_snr_gamma=5)
    task = _task(setup, [masked, plain], extra, data=data, objective=objective)
    batch = _batch(task, [masked, plain, masked][:photos], (extra * 2)[:classes])
    with torch.no_grad():
        said = task.predict(batch)
        rows = []
        for number, sample in enumerate(batch.samples):
            squares = (said.value[number] - said.target[number]).double().square()
            weight = _expected_snr_weight("EPS", float(batch.sigma[number]), 5)
            rows.append((squares * (1 if sample.mask is None else sample.mask)).mean() * weight)
        of_photos, of_classes = loss_parts(said)
    assert said.class_images == classes
    wanted = torch.stack(rows[:photos]).mean(), torch.stack(rows[photos:]).mean()
    assert float(of_photos) == pytest.approx(float(wanted[0]), rel=1e-5)
    assert float(of_classes) == pytest.approx(prior_weight * float(wanted[1]), rel=1e-5)
    whole = denoising_loss(said.value, said.target, said.weight)
    torch.testing.assert_close(of_photos + of_classes, whole)


def test_every_draw_has_as_many_class_images_of_its_shape(setup: TrainingSetup):
    generator, shapes = _generator(), Counter()
    for _ in range(12):
        batch = setup.task.draw(generator, 2)
        assert batch.class_images == 2 and len(batch.samples) == len(batch.texts) == 4
        [shape] = {tuple(sample.latent.shape) for sample in batch.samples}
        assert tuple(batch.noise.shape) == (4, *shape)
        known = [id(sample) for sample in setup.task.classes[shape]]
        assert [id(sample) in known for sample in batch.samples] == [False] * 2 + [True] * 2
        shapes[shape] += 1
    assert sorted(shapes.values()) == [4, 8]  # as the photos come


# --- draws that can be repeated ---------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])  # with 2 an epoch of class images ends at every draw
def test_the_order_of_draws_goes_on_where_it_was(setup: TrainingSetup, size: int):
    def fresh() -> DenoisingTask:
        task = setup.task
        classes = [sample for found in task.classes.values() for sample in found]
        return _task(setup, task.samples, classes, data=setup.config.data)

    first, generator = fresh(), _generator(5)
    for _ in range(5):
        first.draw(generator, size)
    kept, numbers = json.loads(json.dumps(first.state())), generator.get_state()
    wanted = [first.draw(generator, size) for _ in range(12)]
    second, other = fresh(), _generator()
    for _ in range(3):  # another past must not show
        second.draw(other, size)
    second.load_state(kept)
    other.set_state(numbers)
    for batch in wanted:
        check_same_draw(second.draw(other, size), batch)
    first.load_state(kept)  # and back, as after an exception
    generator.set_state(numbers)
    check_same_draw(first.draw(generator, size), wanted[0])


def test_what_is_switched_off_draws_no_number(setup: TrainingSetup):
    sample = Sample(setup.task.samples[0].latent, setup.task.samples[0].sizes, ("one",))
    task = _task(setup, [sample])
    found, wanted = _generator(3), _generator(3)
    for _ in range(3):
        batch = task.draw(found, 2)
        for _ in range(2):  # an epoch of one photo each
            torch.randperm(1, generator=wanted)
        steps = torch.randint(0, 1000, (2,), generator=wanted)
        noise = torch.randn((2, *sample.latent.shape), generator=wanted)
        assert torch.equal(batch.sigma, task.sigmas[steps]) and torch.equal(batch.noise, noise)
        assert torch.equal(found.get_state(), wanted.get_state())


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": ObjectiveConfig(min_snr_gamma=5)},
        {"data": DataConfig(class_prompt=CLASS, prior_weight=3, trigger="sks")},
        {"entropy_weight": 0.0, "gradient_checkpointing": True},
    ],
)
def test_what_only_weighs_changes_no_draw(setup: TrainingSetup, changes: Any):
    plain, other = _task(setup), _task(setup, **changes)
    generators = _generator(1), _generator(1)
    for _ in range(4):
        check_same_draw(plain.draw(generators[0], 2), other.draw(generators[1], 2))
