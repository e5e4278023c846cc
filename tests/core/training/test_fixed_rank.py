"""The fixed mode: a plain LoRA inside our engine, to compare with."""

from __future__ import annotations

import pytest
import torch
from lora2_pack.lora2_core.adapters.budget import file_bytes
from lora2_pack.lora2_core.adaptive_rank import denoising_loss
from lora2_pack.tests.core import toy
from lora2_pack.tests.core.stacked import by_component
from torch import nn

torch.set_num_threads(1)


def test_fixed_mode_is_a_plain_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are those of Adam on B·A alone, and ν and ranks stand still."""
    student = toy.Parallel(3, 16)
    task = toy.TeacherTask(student, [0, 2, 5])
    net = toy.adapt(student, "layers", mode="fixed", target_rank=4.0)
    first = [part.clone() for part in by_component(net)]
    state = [part.clone().requires_grad_() for part in first]  # A, (rank, in), B transposed, …
    plain = torch.optim.Adam(state, lr=1e-2)
    drawn = []
    draw = task.draw
    monkeypatch.setattr(task, "draw", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    before = net.log_nu.detach().clone()
    events = toy.run(net, task, steps=6)
    trained = [part.clone() for part in by_component(net)]
    for batch in drawn:
        outputs = [
            nn.functional.linear(batch[:, n], layer.base.weight + up.t() @ down, layer.base.bias)
            for n, (layer, down, up) in enumerate(
                zip(net.layers, state[::2], state[1::2], strict=True)
            )
        ]
        target = task.predict(batch).target
        plain.zero_grad()
        denoising_loss(torch.stack(outputs, 1), target).backward()
        plain.step()
    assert len(drawn) == 6
    assert torch.equal(net.log_nu, before)
    assert {event.ranks for event in events} == {(4, 4, 4)}
    assert {event.rank_term for event in events} == {0.0}
    assert all(torch.equal(layer.importance, torch.ones(4)) for layer in net.layers)
    assert any(not torch.equal(a, b) for a, b in zip(trained, first, strict=True))
    for weight, expected in zip(trained, state, strict=True):
        torch.testing.assert_close(weight, expected.detach(), rtol=1e-5, atol=1e-7)


def test_a_fixed_rank_is_held_to_each_layers_own_size() -> None:
    net = toy.adapt(toy.Transformer(blocks=1), mode="fixed", target_rank=512)
    assert net.ranks == [target.largest_rank for target in net.targets]
    small = toy.adapt(toy.Transformer(blocks=1), mode="fixed", target_rank=3)
    assert set(small.ranks) == {3}
    assert small.expected_bytes() == file_bytes(small.targets, [3] * 8)
