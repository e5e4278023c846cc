"""How many kernels a training step launches, and how many bytes it holds at its peak.

``.venv/bin/python bench/kernels.py [--json] [--sdxl] [--quick]``. Counted are calls of PyTorch's
operators that are no views, in one step that has been taken before: on a fast card a step of
small layers costs what its launches cost. ``--sdxl`` counts on SDXL's real shapes, 560 components
at 1024 px, with meta tensors, which have shapes and take no memory. Every figure is the same on
every run.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import runtime

PRECISIONS = ("fp32", "bf16")
_RIVALS = ("peft",)
_WARM_UP = 2  # steps: the first one makes the optimizer's states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--sdxl", action="store_true", help="on SDXL's real shapes, too")
    parser.add_argument("--quick", action="store_true", help="bf16 alone, and ours alone")
    options = parser.parse_args()
    found: dict[str, Any] = {"demo": demo(options.quick)}
    if options.sdxl:
        found |= {"sdxl": sdxl(options.quick), "memory": memory()}
    print(json.dumps(found, indent=2) if options.json else _table(found))


class Trace:
    """Counts operators and the bytes of the tensors that are alive, within :meth:`watching`."""

    def __init__(self) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        trace = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
                out = func(*args, **(kwargs or {}))
                trace._saw(func, out)
                return out

        self._mode = Mode()
        self.operators: collections.Counter[str] = collections.Counter()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    @property
    def kernels(self) -> int:
        return sum(self.operators.values())

    @contextmanager
    def watching(self) -> Iterator[Trace]:
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def start(self) -> None:
        self._mode.__enter__()

    def stop(self) -> None:
        self._mode.__exit__(None, None, None)

    def hold(self, tensors: Iterable[Any]) -> None:
        """Count what is there already."""
        for tensor in tensors:
            self._account(tensor)

    def _saw(self, func: Any, out: Any) -> None:
        import torch

        if func.namespace == "aten" and not func.is_view and "unsafe" not in func.__name__:
            self.operators[str(func)] += 1  # the unsafe ones are views in all but name
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._account(tensor)

    def _account(self, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def demo(quick: bool = False) -> dict[str, dict[str, int]]:
    """Kernels of one step on the demo model, batch 2, by precision and contestant."""
    runtime.enter()
    import contestants
    import torch

    torch.set_num_threads(1)
    parts = contestants.demo_parts()
    found = {}
    for precision in PRECISIONS[quick:]:
        found[precision] = {
            name: _count(make(parts, precision))
            for name, make in _contestants().items()
            if not quick or name not in _RIVALS
        }
        if not quick:
            found[precision]["TrainLoraNode"] = _count_train_lora_node(parts, precision)
    return found


def _contestants() -> dict[str, Callable[[Any, str], Callable[[], Any]]]:
    import contestants

    def ours(mode: str, **changes: Any) -> Callable[[Any, str], Callable[[], Any]]:
        return lambda parts, precision: contestants.ours(
            parts, contestants.config(mode, precision=precision, **changes)
        )

    return {
        "floor": contestants.floor,
        "balanced": ours("balanced"),
        "balanced, no entropy": ours("balanced", entropy_weight=0.0),
        "paper": ours("paper"),
        "fixed": ours("fixed"),
        "fixed, no entropy": ours("fixed", entropy_weight=0.0),
        "peft": contestants.peft_lora,
    }


def _count(step: Callable[[], Any], warm_up: int = _WARM_UP) -> int:
    for _ in range(warm_up):
        step()
    with Trace().watching() as trace:
        step()
    return trace.kernels


def _count_train_lora_node(parts: Any, precision: str) -> int:
    import contestants

    trace, calls = Trace(), []

    def between() -> None:
        calls.append(None)
        if len(calls) == _WARM_UP + 1:
            trace.start()
        elif len(calls) == _WARM_UP + 2:
            trace.stop()

    contestants.run_train_lora_node(parts, _WARM_UP + 1, False, between, precision)
    return trace.kernels


def sdxl(quick: bool = False) -> dict[str, dict[str, int]]:
    """Kernels of one step on SDXL's shapes at 1024 px, batch 1, by precision and contestant."""
    runtime.enter()
    import shapes
    import torch

    found: dict[str, dict[str, int]] = {}
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for precision in PRECISIONS[quick:]:
        found[precision] = {}
        for name, (make, config) in _on_sdxl().items():
            if not quick or name not in _RIVALS:
                step = make(shapes.model_of("SDXL", types[precision]), config)
                step = step[1] if isinstance(step, tuple) else step
                found[precision][name] = _count(step, 1)
    return found


def _on_sdxl() -> dict[str, tuple[Callable[..., Any], Any]]:
    import shapes

    settings = _config
    return {
        "floor": (shapes.floor, settings()),
        "balanced": (shapes.ours, settings()),
        "balanced, no entropy": (shapes.ours, settings(entropy_weight=0.0)),
        "fixed": (shapes.ours, settings("fixed")),
        "fixed, no entropy": (shapes.ours, settings("fixed", entropy_weight=0.0)),
        "peft": (shapes.peft_lora, settings("fixed")),
    }


def _config(mode: str = "balanced", **changes: Any) -> Any:
    from lora2_pack.lora2_core.config.ranks import RankConfig
    from lora2_pack.lora2_core.config.train import TrainConfig

    rank = RankConfig.for_mode(mode, target_rank=16.0)
    return TrainConfig(**{"resolution": 1024, "probes": 0, "rank": rank, **changes})


def memory() -> dict[str, float]:
    """Bytes alive at the peak of a step on SDXL's shapes, bf16, 1024 px, batch 1, checkpointed."""
    runtime.enter()
    import shapes
    import torch
    from lora2_pack.lora2_core.config.train import OptimizerConfig

    found: dict[str, float] = {}
    common = {"gradient_checkpointing": True}
    for name, optimizer in (("floor", None), ("adamw", "adamw"), ("adamw8bit", "adamw8bit")):
        base = shapes.model_of("SDXL", torch.bfloat16)
        if optimizer is None:
            step, learnt, remembered = shapes.floor(base, _config(**common)), [], []
        else:
            config = _config(**common, optimizer=OptimizerConfig(name=optimizer))
            network, step, remembered = shapes.ours(base, config)
            learnt = network.weights()
            found["parameters"] = sum(weight.numel() for weight in learnt)
        trace = Trace()
        trace.hold([*base.parameters(), *base.buffers(), *learnt, *remembered])
        with trace.watching():
            for _ in range(_WARM_UP):
                step()
        found[name] = trace.peak
    return found


def _table(found: dict[str, Any]) -> str:
    lines = []
    for model in ("demo", "sdxl"):
        if model not in found:
            continue
        by_precision = found[model]
        lines += [f"{model}: kernels of one step, and of the floor's", ""]
        names = list(by_precision["bf16"])
        for name in names:
            cells = []
            for precision in by_precision:
                count, floor = by_precision[precision][name], by_precision[precision]["floor"]
                cells.append(f"{precision} {count:>7,} {count / floor:>6.3f}")
            lines.append(f"  {name:<24}" + "   ".join(cells))
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runtime.rerun_in_environment()
    main()
