"""Copies and hashes of models that ComfyUI's dynamic VRAM holds, and the same of classic ones.

The card is that of `card.py`; where ComfyUI has no dynamic VRAM, half of this is skipped, with
that reason.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import pytest
import torch
from lora2_pack.lora2_core import comfy_host, lora_file
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.comfy_host.copies.text_encoders import TextEncoders
from lora2_pack.lora2_core.comfy_host.copies.weights import Weights
from lora2_pack.lora2_core.comfy_host.encoding import Encoder
from lora2_pack.lora2_core.comfy_host.painting import _Decoder
from lora2_pack.lora2_core.data.cache import TensorCache, content_key, weights_hash
from lora2_pack.lora2_core.files.component import Component
from lora2_pack.lora2_core.training.trainer import Trainer
from lora2_pack.tests.host import demo
from lora2_pack.tests.host.card import CARD, CPU, Native, dynamic_patcher, everywhere
from torch import Tensor, nn

HELD = ("_v", "_pin", "_prefetch", "dynamic_", "weight_lowvram", "bias_lowvram")
LARGE = "diffusion_model.input_blocks.7.1.transformer_blocks.0.ff.net.0.proj.weight"
TEXT = "clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
Kind = Callable[..., Any]


@pytest.fixture(params=["classic", "dynamic"])
def kind(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kind]:
    """Makes a patcher of a model, of the one kind or the other."""
    make, device = comfy.model_patcher.ModelPatcher, CPU
    if request.param == "dynamic":
        make, device = dynamic_patcher(monkeypatch), CARD
    made = []  # ComfyUI forgets a patcher that nobody holds, and then cannot unpatch

    def patcher_of(model: Any) -> Any:
        made.append(make(model, device, CPU))
        return made[-1]

    yield patcher_of
    _unload()


@pytest.fixture(scope="module")
def own(comfyui: Any) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of these tests alone, whose modules a patcher leaves things on."""
    return demo.build()


@pytest.fixture(scope="module")
def other(comfyui: Any) -> Any:
    """A MODEL to merge with."""
    return demo.build(1)[0]


def _load(patcher: Any) -> None:
    comfy.model_management.load_models_gpu([patcher])


def _unload() -> None:
    for device in (CARD, CPU):
        comfy.model_management.free_memory(1e30, device)


def _lora(base: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return lora_file.to_state(
        [
            Component(
                target.name,
                torch.randn(2, target.in_features, generator=generator),
                torch.randn(target.out_features, 2, generator=generator),
                torch.ones(2),
                0.1,
            )
            for target in find_targets(base.diffusion_model)
        ]
    )


def _nothing(patcher: Any, _other: Any) -> Any:
    return patcher


def _with_lora(patcher: Any, _other: Any) -> Any:
    return comfy_host.apply_state(patcher, None, _lora(patcher.model), 0.7, 1.0, "x")[0]


def _merged(patcher: Any, other: Any) -> Any:
    """As ComfyUI's node for merging models does it."""
    clone = patcher.clone()
    for key, patch in other.get_key_patches("diffusion_model.").items():
        clone.add_patches({key: patch}, 0.6, 0.4)
    return clone


def _set_and_wrapped(patcher: Any, _other: Any) -> Any:
    clone = patcher.clone()
    weight = comfy.utils.get_attr(patcher.model, LARGE)
    clone.add_patches({LARGE: ("set", (torch.full_like(weight, 0.5),))})
    clone.add_patches({LARGE: ("diff", (torch.ones_like(weight),))}, 0.25)
    clone.add_weight_wrapper(LARGE, lambda weight: 2 * weight)
    return clone


CHANGES = [_nothing, _with_lora, _merged, _set_and_wrapped]


def _expected(base: Any, change: Any, other: Any) -> dict[str, Tensor]:
    """What the classic patcher merges into the weights."""
    patcher = change(comfy.model_patcher.ModelPatcher(base, CPU, CPU), other)
    found = demo.weights(patcher)
    _unload()
    if change is _set_and_wrapped:
        found[LARGE] = torch.full_like(found[LARGE], 2 * 0.75)  # wrapped while casting only
    return {key: value for key, value in found.items() if key.startswith("diffusion_model.")}


def _natives(module: nn.Module) -> list[str]:
    """What of dynamic VRAM a network's modules carry."""
    return [
        f"{path}.{name}"
        for path, part in module.named_modules()
        for name in vars(part)
        if name.startswith(HELD)
    ]


@pytest.mark.parametrize("loaded", ["nobody", "this", "another"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_has_what_is_sampled(own: Any, other: Any, kind: Kind, change: Any, loaded: str):
    base = own[0].model
    before = {name: value.clone() for name, value in base.state_dict().items()}
    wanted = _expected(base, change, other)
    patcher = kind(base)
    patched = change(patcher, other)
    if loaded != "nobody":
        _load(patched if loaded == "this" else _with_lora(patcher, other))
    private = comfy_host.private_copy(patched, "fp32")
    got = private.state_dict()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    assert not _natives(private) and not [name for name in vars(private) if name.startswith(HELD)]
    _unload()
    after = base.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_copy_neither_owns_nor_shares_native_memory(
    comfyui: Any, monkeypatch: pytest.MonkeyPatch
):
    base, clip, vae = demo.build()
    make = dynamic_patcher(monkeypatch)
    base, clip.patcher = make(base.model, CARD, CPU), make(clip.cond_stage_model, CARD, CPU)
    vae.patcher = make(vae.first_stage_model, CARD, CPU)
    for patcher in (base, clip.patcher, vae.patcher):
        _load(patcher)
    assert _natives(base.model) and _natives(clip.cond_stage_model), "the double is not used"
    gc.collect()
    made, before = Native.made, Native.freed.total()
    copies: list[Any] = [comfy_host.private_copy(base), TextEncoders(clip, CPU), _Decoder(vae)]
    networks = [copies[0], *copies[1].roots.values(), copies[2]._network]
    assert not any(_natives(network) for network in networks)
    copies, networks = [], []
    gc.collect()
    assert (Native.made, Native.freed.total()) == (made, before)
    _unload()
    del base, clip, vae, patcher
    gc.collect()
    assert Native.freed.total() > before
    assert set(Native.freed.values()) == {1}, "freed twice"


def test_text_encoders_have_the_patches(own: Any, kind: Kind):
    clip = own[1].clone()
    clip.patcher = kind(clip.cond_stage_model)
    bare = comfy.utils.get_attr(clip.cond_stage_model, TEXT).detach().clone()
    clip.patcher.add_patches({TEXT: ("diff", (torch.ones_like(bare),))}, 0.5)
    _load(clip.patcher)
    roots = TextEncoders(clip, CPU).roots
    got = comfy.utils.get_attr(roots["te2"], TEXT.removeprefix("clip_g.transformer."))
    assert torch.equal(got, bare + 0.5)
    assert not any(_natives(root) for root in roots.values())


def test_the_cache_tells_a_patched_clip_from_a_bare_one(own: Any, kind: Kind):
    model, clip, vae = own

    def identity(strength: float) -> str:
        other = clip.clone()
        other.patcher = kind(clip.cond_stage_model)
        weight = comfy.utils.get_attr(clip.cond_stage_model, TEXT)
        if strength:
            patch = {TEXT: ("diff", (torch.ones_like(weight),))}
            other.patcher.add_patches(patch, strength)
        return Encoder(model.model, other, vae, TensorCache(None)).identity

    assert len({identity(0), identity(0.5), identity(0.7)}) == 3
    assert identity(0.5) == identity(0.5)
    assert identity(0) == Encoder(model.model, clip, vae, TensorCache(None)).identity


@torch.inference_mode()  # as nodes are run, which loaded the weights for the tests before
def test_a_run_of_an_earlier_version_goes_on(own: Any):
    """Its checkpoint names the VAE and CLIP by the hashes of what was loaded."""
    model, clip, vae = own
    patched = clip.clone()
    patched.patcher = comfy.model_patcher.ModelPatcher(clip.cond_stage_model, CPU, CPU)
    weight = comfy.utils.get_attr(clip.cond_stage_model, TEXT)
    patched.patcher.add_patches({TEXT: ("diff", (torch.ones_like(weight),))}, 0.5)
    found = Encoder(model.model, patched, vae, TensorCache(None)).identity
    _load(patched.patcher)
    hashes = weights_hash(vae.first_stage_model), weights_hash(clip.cond_stage_model)
    _unload()
    assert found == content_key(hashes[0], hashes[1] + str(clip.layer_idx))


def test_a_training_is_the_same_whoever_holds_the_model(own: Any, other: Any, kind: Kind):
    base, clip, vae = own
    losses = []
    for patcher in (comfy.model_patcher.ModelPatcher(base.model, CPU, CPU), kind(base.model)):
        patched = _with_lora(patcher, other)
        _load(patched)
        setup = comfy_host.prepare_training(patched, clip, vae, demo.photos(), demo.settings())
        trainer = Trainer(setup.network, setup.task, setup.config, setup.entropy)
        losses.append([setup.base_hash, *(event.loss for event in trainer.run())])
        _unload()
    assert losses[0] == losses[1] and len(losses[0]) > 2


def test_the_demo_model_is_built_and_copied(own: Any, monkeypatch: pytest.MonkeyPatch):
    wanted = own[0].model.state_dict(), own[1].cond_stage_model.state_dict()
    _load(own[0])
    plain = demo.sample(own[0].model)
    everywhere(monkeypatch)
    model, clip, vae = demo.build()
    assert all(patcher.is_dynamic() for patcher in (model, clip.patcher, vae.patcher))
    for built, expected in zip((model.model, clip.cond_stage_model), wanted, strict=True):
        got = built.state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], value) for name, value in expected.items())
    _load(model)
    assert torch.equal(demo.sample(model.model), plain)
    assert torch.equal(demo.sample(comfy_host.private_copy(model)), plain)
    _unload()


def test_a_sampling_left_by_another_run_is_not_taken(own: Any, caplog: pytest.LogCaptureFixture):
    """A known fault of dynamic VRAM (September 2026): what one clone set stays for all."""
    model = own[0].clone()
    base = model.model
    eps = base.model_sampling
    v = comfy.model_base.ModelType.V_PREDICTION
    left = comfy.model_base.model_sampling(base.model_config, v)
    base.model_sampling = left
    try:
        assert comfy_host.prediction_of(model) == "EPS"
        private = comfy_host.private_copy(model)
        assert "left over from another run" in caplog.text and "V_PREDICTION" in caplog.text
        asked = model.clone()
        asked.add_object_patch("model_sampling", left)
        assert comfy_host.prediction_of(asked) == "V_PREDICTION"
    finally:
        base.model_sampling = eps
    assert type(private.model_sampling).calculate_denoised is type(eps).calculate_denoised
    assert torch.equal(private.model_sampling.sigmas, eps.sigmas)


def test_what_works_beside_the_weights_is_refused_by_name(own: Any):
    class Injection:
        def inject(self, _: Any) -> None: ...

        def eject(self, _: Any) -> None: ...

    model = own[0].clone()
    model.set_injections("bypass_lora", [Injection()])
    with pytest.raises(comfy_host.HostError, match=r"model carries 'bypass_lora'.*merges"):
        comfy_host.private_copy(model)
    clone = own[0].clone()
    clone.add_weight_wrapper(LARGE, lambda weight: weight[:1])
    with pytest.raises(comfy_host.HostError, match=r"ff\.net\.0\.proj\.weight wrapped by .*lambda"):
        comfy_host.private_copy(clone)
    replaced = own[0].clone()
    replaced.add_object_patch("diffusion_model", nn.Identity())
    with pytest.raises(comfy_host.HostError, match="U-Net replaced by a Identity"):
        comfy_host.private_copy(replaced)


def test_every_name_of_a_state_dict_is_there_in_its_order(own: Any):
    for patcher in (own[0], own[1].patcher, own[2].patcher):
        names = list(patcher.model.state_dict())
        assert list(Weights(patcher, "x")) == names
