"""Checkpointed blocks: the same gradients, to the bit, from far fewer activations."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import comfy.model_management as management
import pytest
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, CrossAttention, attention_pytorch
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.adapters.network import AdaptiveRankNetwork
from lora2_pack.lora2_core.adapters.targets import find_targets
from lora2_pack.lora2_core.comfy_host.checkpointing import (
    Level,
    checkpoint_blocks,
    is_checkpointed,
    remove_checkpoints,
)
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.training.objective import CrossAttentionEntropy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

LEVELS: tuple[Level, ...] = ("block", "transformer")
SELECTIONS = ("attention", "cross-attention", "attention+ff+conv", r"middle_block.*attn2\.to_k$")


class Setting:
    """A private copy with adapters that do something, and one fixed batch of two."""

    def __init__(self, model: Any, targets: str = "attention", precision: str = "fp32"):
        self.base = comfy_host.private_copy(model, precision)
        self.unet = self.base.diffusion_model
        self.blocks = [m for m in self.unet.modules() if isinstance(m, BasicTransformerBlock)]
        found = find_targets(self.unet, targets)
        config = RankConfig.balanced(target_rank=2.0, max_rank=4)
        self.network = AdaptiveRankNetwork(self.unet, found, config, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for layer in self.network.layers:
                layer.lora_up.copy_(torch.randn(layer.lora_up.shape, generator=generator) / 10)
        layers = [m for n, m in self.unet.named_modules() if n.endswith(".attn2")]
        self.entropy = CrossAttentionEntropy([m for m in layers if isinstance(m, CrossAttention)])
        self.entropy.gathers = False  # as with checkpoints: sums in another order differ in a bit
        width = self.base.model_config.unet_config["context_dim"]
        vector = self.base.model_config.unet_config["adm_in_channels"]
        self.noised = torch.randn(2, 4, 16, 16, generator=generator)
        self.context = torch.randn(2, 77, width, generator=generator)
        self.vector = torch.randn(2, vector, generator=generator)

    def predict(self, **options: Any) -> Tensor:
        return self.base.apply_model(
            self.noised,
            torch.tensor([2.0, 0.5]),
            c_crossattn=self.context,
            y=self.vector,
            transformer_options={"optimized_attention_override": _plain_attention, **options},
        )

    def loss(self, entropy_weight: float, **options: Any) -> Tensor:
        """As the trainer takes it; the weight of the entropy is large, so that it counts."""
        self.network.refresh()
        if not entropy_weight:
            return self.predict(**options).square().mean()
        with self.entropy.collecting():
            loss = self.predict(**options).square().mean()
        return loss + entropy_weight * self.entropy.value()

    def parameters(self) -> list[nn.Parameter]:
        return [*self.network.weights(), self.network.log_nu]

    def gradients(self, entropy_weight: float = 0.0, **options: Any) -> list[Tensor]:
        loss = self.loss(entropy_weight, **options)
        found = torch.autograd.grad(loss, self.parameters(), allow_unused=True)
        zeros = (torch.zeros_like(parameter) for parameter in self.parameters())
        return [loss.detach(), *(z if g is None else g for g, z in zip(found, zeros, strict=True))]


def _plain_attention(_chosen: object, *args: Any, **kwargs: Any) -> Tensor:
    return attention_pytorch(*args, **kwargs)


def check_equal(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    assert all(map(torch.equal, first, second))


class Allocations(TorchDispatchMode):
    """Notes the memory that operations take, as long as anything holds it.

    ``own``: tensors whose memory was there before; an operation may return a view of them.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._sizes = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self._own:
                    self._sizes[storage] = storage.nbytes()
        return result

    def held(self) -> int:
        gc.collect()
        return sum(self._sizes.values())


def kept_bytes(setting: Setting, entropy_weight: float) -> int:
    """What is held between a forward pass and its backward pass."""
    setting.entropy._terms = []  # of an earlier pass
    own = [*setting.unet.state_dict().values(), setting.network.log_nu]
    with Allocations(own) as allocations:
        loss = setting.loss(entropy_weight)
    held = allocations.held()
    loss.backward()
    assert allocations.held() < held / 10, "not held for the backward pass"
    return held


# --- the same gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("targets", SELECTIONS)
@pytest.mark.parametrize("entropy_weight", [0.0, 1.0])
def test_gradients_are_the_same_to_the_bit(
    model: Any, level: Level, targets: str, entropy_weight: float
):
    setting = Setting(model, targets)
    wanted = setting.gradients(entropy_weight)
    assert any(bool(gradient.any()) for gradient in wanted[1:])
    checkpoint_blocks(setting.unet, level, setting.entropy)
    check_equal(setting.gradients(entropy_weight), wanted)
    check_equal(setting.gradients(entropy_weight), wanted)


@pytest.mark.parametrize("which", [(), (0,), (1, 3, 4), (2, 99)])
def test_any_of_the_blocks_may_be_checkpointed(model: Any, which: tuple[int, ...]):
    setting = Setting(model)
    wanted = setting.gradients(1.0)
    setting.entropy.gathers = True  # of blocks that are computed once
    checkpoint_blocks(setting.unet, entropy=setting.entropy, which=which)
    twice = [n for n, block in enumerate(setting.blocks) if is_checkpointed(block)]
    assert twice == [n for n in which if n < len(setting.blocks)]
    for found, expected in zip(setting.gradients(1.0), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("level", LEVELS)
def test_the_entropy_has_a_gradient_of_its_own(model: Any, level: Level):
    setting = Setting(model)
    plain = setting.gradients(0.0)
    wanted = setting.gradients(1.0)
    assert not torch.equal(plain[-1], wanted[-1]), "the entropy does not reach ν"

    def of_entropy_alone() -> list[Tensor]:
        setting.network.refresh()
        with setting.entropy.collecting():
            setting.predict()
        return list(
            torch.autograd.grad(setting.entropy.value(), setting.parameters(), allow_unused=True)
        )

    alone = of_entropy_alone()
    checkpoint_blocks(setting.unet, level, setting.entropy)
    for found, expected in zip(of_entropy_alone(), alone, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_training_with_and_without_entropy_may_alternate(model: Any, level: Level):
    setting = Setting(model)
    wanted = [setting.gradients(weight) for weight in (0.0, 1.0)]
    checkpoint_blocks(setting.unet, level, setting.entropy)
    for weight in (1, 0, 0, 1, 1, 0):
        check_equal(setting.gradients(float(weight)), wanted[weight])


@pytest.mark.parametrize("level", LEVELS)
def test_a_term_is_collected_once_and_no_hook_stays(model: Any, level: Level):
    setting = Setting(model)
    checkpoint_blocks(setting.unet, level, setting.entropy)
    loss = setting.loss(1.0)
    before = setting.entropy.value()
    loss.backward()
    assert len(setting.entropy._terms) == len(setting.blocks) > 5
    assert torch.equal(setting.entropy.value(), before)
    assert not any(module._forward_hooks for module in setting.unet.modules())


def test_an_entropy_that_the_checkpoints_do_not_know_is_an_error(model: Any):
    setting = Setting(model)
    checkpoint_blocks(setting.unet)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        setting.gradients(1.0)


def test_a_graph_may_be_used_twice(model: Any):
    setting = Setting(model)
    checkpoint_blocks(setting.unet, "block", setting.entropy)
    loss = setting.loss(1.0)
    first = torch.autograd.grad(loss, setting.parameters(), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, setting.parameters(), allow_unused=True)
    check_equal([g for g in first if g is not None], [g for g in second if g is not None])


def test_bf16_gradients_are_the_same_to_the_bit(model: Any):
    setting = Setting(model, precision="bf16")
    wanted = setting.gradients(1.0)
    checkpoint_blocks(setting.unet, "block", setting.entropy)
    check_equal(setting.gradients(1.0), wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_the_second_pass_reads_the_options_of_the_first(model: Any, level: Level):
    setting = Setting(model)
    seen: list[tuple[Any, ...]] = []

    def patch(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> Any:
        seen.append((*options["block"], options["transformer_index"], options["block_index"]))
        return n, context, value

    patches = {"attn2_patch": [patch]}
    plain = setting.gradients(patches=patches)
    once, count = list(seen), len(seen)
    assert len(set(once)) == count == len(setting.blocks)
    checkpoint_blocks(setting.unet, level)
    seen.clear()
    check_equal(setting.gradients(patches=patches), plain)
    assert seen[:count] == once, "the forward pass"
    assert sorted(seen[count:]) == sorted(once), "the second pass"


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy_weight", [0.0, 1.0])
def test_every_level_keeps_less(model: Any, entropy_weight: float):
    setting = Setting(model)
    kept = [kept_bytes(setting, entropy_weight)]
    for level in LEVELS:
        checkpoint_blocks(setting.unet, level, setting.entropy)
        kept.append(kept_bytes(setting, entropy_weight))
    print("kept of one forward pass, MB:", [round(size / 1e6, 2) for size in kept])
    assert kept[1] < 0.6 * kept[0] and kept[2] < kept[1], kept


def test_the_entropy_costs_a_checkpointed_model_no_memory(model: Any):
    setting = Setting(model)
    checkpoint_blocks(setting.unet, "block", setting.entropy)
    scalars = 1000  # bytes; the terms themselves
    assert kept_bytes(setting, 1.0) <= kept_bytes(setting, 0.0) + scalars


# --- everything else stays --------------------------------------------------------------------


def test_it_can_be_put_on_twice_and_taken_off(model: Any):
    setting = Setting(model)
    names = setting.unet.state_dict().keys()
    wanted = setting.gradients()
    assert not is_checkpointed(setting.unet)
    for level in (*LEVELS, "block"):
        checkpoint_blocks(setting.unet, level)
        assert is_checkpointed(setting.unet)
    assert setting.unet.state_dict().keys() == names
    remove_checkpoints(setting.unet)
    remove_checkpoints(setting.unet)
    assert not is_checkpointed(setting.unet)
    check_equal(setting.gradients(), wanted)


def test_without_gradients_a_block_runs_once(model: Any):
    setting = Setting(model)
    calls: list[int] = []
    setting.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    checkpoint_blocks(setting.unet)
    with torch.no_grad():
        setting.predict()
    assert len(calls) == 1
    setting.gradients()
    assert len(calls) == 3


def test_the_second_pass_is_deaf_to_cancel(model: Any):
    """On a GPU it runs in a thread that no job has made deaf; here the job's guard is left out."""
    setting = Setting(model)
    checkpoint_blocks(setting.unet, "block", setting.entropy)
    loss = setting.loss(1.0)
    management.interrupt_current_processing(True)
    try:
        loss.backward()
        with pytest.raises(management.InterruptProcessingException):
            management.throw_exception_if_processing_interrupted()  # a prompt's, not used up
    finally:
        management.interrupt_current_processing(False)


def test_the_global_generator_is_left_alone(model: Any):
    setting = Setting(model)
    checkpoint_blocks(setting.unet)
    loss = setting.loss(0.0)
    state = torch.get_rng_state()
    torch.randn(3)  # a prompt draws between the two passes
    after = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(state, after)


def test_the_user_s_model_is_not_checkpointed(model: Any):
    checkpoint_blocks(Setting(model).unet)
    assert not is_checkpointed(model.model.diffusion_model)


def test_a_copy_of_a_checkpointed_model_is_freed(model: Any):
    setting = Setting(model)
    checkpoint_blocks(setting.unet, "block", setting.entropy)
    setting.gradients(1.0)
    unet = weakref.ref(setting.unet)
    del setting
    gc.collect()
    assert unet() is None


def test_a_model_without_such_blocks_is_named():
    with pytest.raises(ValueError, match=r"Linear has no BasicTransformerBlock"):
        checkpoint_blocks(nn.Linear(2, 2))
