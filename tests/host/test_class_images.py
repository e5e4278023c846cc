"""Class images for prior preservation: painted once, counted by content, of every size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.comfy_host import class_images
from lora2_pack.lora2_core.comfy_host.painting import Painter
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import DataConfig, TextConfig
from lora2_pack.lora2_core.data.photos import Photo
from lora2_pack.lora2_core.training.denoising import DenoisingTask
from lora2_pack.lora2_core.training.objective import loss_parts
from lora2_pack.lora2_core.training.setup import TrainingSetup
from lora2_pack.lora2_core.training.trainer import train
from lora2_pack.tests.host import demo
from torch import Tensor

Parts = tuple[Any, Any, Any]
PROMPT = "a photo of a house"


@pytest.fixture(scope="module")
def trained(comfyui: Path) -> Parts:
    """MODEL, CLIP and VAE of the demo as people get them: they really paint."""
    return demo.build(None)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: Any) -> None:
    """Pictures of two steps instead of 25: what is asked here is when they are painted."""
    monkeypatch.setattr(class_images, "_STEPS", 2)


@pytest.fixture
def calls(monkeypatch: Any) -> Counter[str]:
    """Pictures painted in this test; :func:`_counted` adds what CLIP and VAE are asked."""
    counts: Counter[str] = Counter()
    monkeypatch.setattr(Painter, "paint", _counting(Painter.paint, counts, "paint"))
    return counts


def _counting(method: Any, counts: Counter[str], name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return method(*args, **kwargs)

    return call


def _counted(parts: Parts, monkeypatch: Any, counts: Counter[str]) -> Parts:
    """The same CLIP and VAE, whose real methods are counted."""
    _, clip, vae = parts
    for owner, name in ((clip, "encode_from_tokens"), (vae, "encode")):
        monkeypatch.setattr(owner, name, _counting(getattr(owner, name), counts, name))
    return parts


def _prepare(
    parts: Parts,
    cache: Path | None,
    given: Sequence[Photo] = (),
    photos: Sequence[Photo] | None = None,
    **data: Any,
) -> TrainingSetup:
    changes = {name: data.pop(name) for name in ("text", "seed") if name in data}
    settings = {"class_prompt": PROMPT, "class_images": 2, **data}
    config = demo.settings(data=DataConfig(**settings), **changes)
    with torch.inference_mode():  # as nodes are
        return comfy_host.prepare_training(
            *parts, photos or demo.photos(1), config, given, cache=cache
        )


def _pictures(count: int) -> list[Photo]:
    generator = torch.Generator().manual_seed(3)
    return [Photo(torch.rand(70, 70, 3, generator=generator), "") for _ in range(count)]


def _latents(setup: TrainingSetup) -> list[Tensor]:
    return [sample.latent for found in setup.task.classes.values() for sample in found]


# --- once -------------------------------------------------------------------------------------


def test_they_are_painted_once(trained: Parts, monkeypatch: Any, calls: Any, tmp_path: Path):
    parts = _counted(trained, monkeypatch, calls)
    first = _prepare(parts, tmp_path)
    assert calls["paint"] == 2 and calls["encode"] == 3  # and the photo
    assert calls["encode_from_tokens"] == 3  # the caption, the class prompt, the empty prompt
    calls.clear()
    second = _prepare(parts, tmp_path, seed=1)  # another run
    assert not calls
    assert len(_latents(first)) == 2
    assert all(map(torch.equal, _latents(first), _latents(second)))
    assert not torch.equal(*_latents(first)), "one picture twice"
    assert first.data_hash == second.data_hash


def test_without_a_cache_they_are_the_same(trained: Parts, calls: Any, tmp_path: Path):
    first, second = (_prepare(trained, cache, class_images=1) for cache in (tmp_path, None))
    assert calls["paint"] == 2
    assert all(map(torch.equal, _latents(first), _latents(second)))
    assert first.data_hash == second.data_hash


def test_more_of_them_are_painted_where_some_are_there(trained: Parts, calls: Any, tmp_path: Path):
    few = _prepare(trained, tmp_path, class_images=1)
    more = _prepare(trained, tmp_path, class_images=3)
    assert calls["paint"] == 3
    assert torch.equal(_latents(few)[0], _latents(more)[0])


def test_they_show_what_their_prompt_says(trained: Parts, tmp_path: Path):
    """What is learnt is the picture that the base model paints, not one of an adapted model."""
    setup = _prepare(trained, tmp_path, class_images=1, text=TextConfig(learning_rate=1e-3))
    model, _, vae = trained
    private = comfy_host.private_copy(model)
    painter = Painter(private, vae, setup.task.texts)
    pixels = painter.paint([PROMPT], 0, (64, 64), 2, 5.0)
    with torch.inference_mode():
        wanted = private.process_latent_in(vae.encode((pixels * 255).round() / 255))[0]
    torch.testing.assert_close(_latents(setup)[0], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changed", ["prompt", "model", "clip", "vae", "sampling"])
def test_what_changes_the_picture_paints_anew(
    trained: Parts, calls: Any, tmp_path: Path, changed: str
):
    model, clip, vae = trained
    first = _prepare(trained, tmp_path, class_images=1)
    prompt = PROMPT
    if changed == "prompt":
        prompt = "a photo of a tree"
    elif changed == "model":
        model = demo.build(5)[0]
    elif changed == "clip":
        clip = demo.build(5)[1]
    elif changed == "sampling":
        model = ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]
    else:
        vae = _brighter()
    second = _prepare((model, clip, vae), tmp_path, class_images=1, class_prompt=prompt)
    assert calls["paint"] == 2
    assert not torch.equal(_latents(first)[0], _latents(second)[0])
    assert first.data_hash != second.data_hash


def _brighter() -> Any:
    """The demo's VAE with another last bias."""
    vae = demo.build(None)[2]
    with torch.inference_mode():
        for name, weight in vae.first_stage_model.state_dict().items():
            if name.endswith("bias"):
                weight += 0.05
    return vae


def test_spaces_around_the_prompt_do_not_matter(trained: Parts, calls: Any, tmp_path: Path):
    _prepare(trained, tmp_path, class_images=1)
    setup = _prepare(trained, tmp_path, class_images=1, class_prompt=f"  {PROMPT}\n")
    assert calls["paint"] == 1
    batch = setup.task.draw(torch.Generator().manual_seed(0), 1)
    assert batch.texts[1] == PROMPT
    setup.task.predict(batch)  # finds its embedding


def test_spaces_around_the_prompt_of_given_ones_do_not_matter(trained: Parts):
    setup = _prepare(trained, None, _pictures(1), class_images=0, class_prompt=f"{PROMPT} ")
    said = setup.task.predict(setup.task.draw(torch.Generator().manual_seed(0), 2))
    assert said.class_images == 2


def test_cancel_ends_the_painting(trained: Parts, monkeypatch: Any, calls: Any, tmp_path: Path):
    paint = Painter.paint

    def cancelled_meanwhile(*args: Any) -> Tensor:
        found = paint(*args)
        comfy.model_management.interrupt_current_processing(True)
        return found

    monkeypatch.setattr(Painter, "paint", cancelled_meanwhile)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            _prepare(trained, tmp_path, class_images=50)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert calls["paint"] == 1


# --- given ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted", "painted", "found"),
    [(2, 2, 0, 2), (3, 2, 0, 3), (1, 3, 2, 3), (2, 0, 0, 2)],
)
def test_those_given_count(
    trained: Parts, calls: Any, tmp_path: Path, given: int, wanted: int, painted: int, found: int
):
    setup = _prepare(trained, tmp_path, _pictures(given), class_images=wanted)
    assert calls["paint"] == painted and len(_latents(setup)) == found
    assert all(s.captions == (PROMPT,) for part in setup.task.classes.values() for s in part)
    assert setup.painter is None


def test_a_copy_of_a_given_one_counts_once(trained: Parts, calls: Any, tmp_path: Path):
    first, second = _pictures(2)
    copies = [first, Photo(first.pixels.clone(), "another caption"), second, first]
    setup = _prepare(trained, tmp_path, copies, class_images=3)
    assert calls["paint"] == 1 and len(_latents(setup)) == 3
    again = _prepare(trained, tmp_path, [first, second], class_images=3)
    assert setup.data_hash == again.data_hash


def test_without_a_prompt_there_are_none(trained: Parts, calls: Any):
    setup = _prepare(trained, None, class_prompt="", class_images=0)
    batch = setup.task.draw(torch.Generator().manual_seed(0), 2)
    assert not setup.task.classes and not batch.class_images and len(batch.samples) == 2
    assert not calls


# --- every size -------------------------------------------------------------------------------


def test_every_size_has_all_of_them(trained: Parts, tmp_path: Path):
    generator = torch.Generator().manual_seed(4)
    shapes = ((96, 192), (64, 256), (128, 128))  # none is another one turned
    photos = [Photo(torch.rand(*shape, 3, generator=generator), "sks house") for shape in shapes]
    setup = _prepare(
        trained, tmp_path, _pictures(2), photos, class_images=3, buckets=True, flip=True
    )
    task = setup.task
    wanted = {tuple(sample.latent.shape) for sample in task.samples}
    assert len(wanted) == 3
    assert {shape: len(found) for shape, found in task.classes.items()} == dict.fromkeys(wanted, 3)
    for shape, found in task.classes.items():
        assert all(tuple(sample.latent.shape) == shape for sample in found)
    for _ in range(8):
        batch = task.draw(generator, 2)
        assert batch.class_images == 2
        with torch.no_grad():
            assert all(bool(part.isfinite()) for part in loss_parts(task.predict(batch)))


# --- what they are for ------------------------------------------------------------------------


def _class_loss(setup: TrainingSetup, classes: DenoisingTask) -> float:
    """Mean loss of the class images on fixed noise and timesteps."""
    setup.network.refresh()
    with torch.no_grad():
        losses = [
            float(sum(loss_parts(classes.predict(batch))))
            for batch in classes.spread(torch.Generator().manual_seed(1), 16, 8)
        ]
    return sum(losses) / len(losses)


def _chequered(size: int) -> Tensor:
    """A picture as far from any house as can be: (size, size, 3)."""
    stripes = torch.arange(size) // 8 % 2
    return (stripes[:, None] ^ stripes).float()[..., None].repeat(1, 1, 3)


def _learn(trained: Parts, given: Sequence[Photo], prior: bool) -> tuple[float, float]:
    """The class images' loss before and after a short training on another picture."""
    photos = [Photo(_chequered(96), "a photo of a sks house")]
    config = demo.settings(
        data=DataConfig(class_prompt=PROMPT),
        rank=RankConfig.fixed(target_rank=8.0),
        **{"steps": 50, "learning_rate": 1e-2, "schedule": "cosine", "resolution": 96},
        **{"probes": 0, "entropy_weight": 0.0},
    )
    setup = comfy_host.prepare_training(*trained, photos, config, given)
    task = setup.task
    samples = [sample for found in task.classes.values() for sample in found]
    shared = task.model, task.texts, task.options, task.prediction
    classes = DenoisingTask(shared[0], samples, *shared[1:], demo.settings())
    if not prior:
        task.classes.clear()
    before = _class_loss(setup, classes)
    for _event in train(setup.network, task, config):
        pass
    return before, _class_loss(setup, classes)


def test_they_keep_what_the_model_knows(trained: Parts):
    """Measured: class loss 0.065; after 50 steps 0.184 without them, 0.062 with them."""
    model, _, vae = trained
    texts = _prepare(trained, None, class_images=0).task.texts
    painter = Painter(comfy_host.private_copy(model), vae, texts)
    given = [Photo(painter.paint([PROMPT], n, (96, 96), 12, 5.0)[0], "") for n in range(3)]
    before, without = _learn(trained, given, prior=False)
    same, kept = _learn(trained, given, prior=True)
    told = f"class loss {before:.4f}; after 50 steps {without:.4f} without, {kept:.4f} with prior"
    print(told)
    assert same == before
    assert without > 2 * before, f"nothing to keep: {told}"
    assert kept < 1.1 * before, told
