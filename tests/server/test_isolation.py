"""Whatever ends a training run, the user's model is as before and nothing is left running."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors
from lora2_pack.tests.server.graphs import changed, painting, training
from lora2_pack.tests.server.studio import Studio

# Passes through the model before the fault: 24 steps, and 8 for the probe before the first step,
# after it and after step 20.
PASSES = 24 + 3 * 8


def _failing(seed: int, error: str, passes: int) -> dict[str, Any]:
    inputs = {"model": ["1", 0], "error": error, "passes": passes}
    workflow = {
        **training(seed),
        "f": {"class_type": "LoRA2TestFailingModel", "inputs": inputs},
    }
    return changed(workflow, "3", model=["f", 0])


class Cancelled:
    """Starts a long training and presses Cancel after some steps."""

    def __init__(self, studio: Studio, after: int) -> None:
        self.studio, self.after = studio, after
        self.pressed = 0.0

    def on_progress(self, event: str, data: dict[str, Any]) -> None:
        if event == "progress" and data["value"] >= self.after and not self.pressed:
            self.pressed = time.monotonic()
            self.studio.server.interrupt()

    def run(self, workflow: dict[str, Any]) -> float:
        """Seconds from Cancel to the end."""
        from lora2_tools.client import WorkflowInterrupted

        with pytest.raises(WorkflowInterrupted):
            self.studio.run(workflow, on_progress=self.on_progress)
        return time.monotonic() - self.pressed


def _clean(witness: dict[str, Any]) -> None:
    assert not [name for name in witness["threads"] if name.startswith("LoRA²")]
    assert witness["cancel_is_comfys"]
    assert not [name for name in witness["classes"] if "Adaptive" in name]
    assert not witness["gradients"]


def _same_model(studio: Studio, seed: int, train: Callable[[], None]) -> None:
    """The picture and the weights of the base model are bit-identical before and after."""
    paint = painting(seed, ["1", 0])
    before = studio.picture(studio.run(paint), "p")
    untouched = studio.witness(seed)
    train()
    witness = studio.witness(seed)
    _clean(witness)
    history = studio.run(paint)
    [cached] = [data["nodes"] for kind, data in _messages(history) if kind == "execution_cached"]
    assert "1" in cached, "a new model was made, so this proves nothing"
    assert "k" not in cached, "the old picture was shown again, so this proves nothing"
    np.testing.assert_array_equal(studio.picture(history, "p"), before)
    assert witness["weights"] == untouched["weights"]
    assert witness["copies"] == untouched["copies"], "the private copy is still in memory"


def _messages(history: dict[str, Any]) -> list[Any]:
    return history["status"]["messages"]


def _file_works(studio: Studio, seed: int, name: str) -> dict[str, str]:
    """The file is there, whole, and loads through the stock loader; its metadata."""
    assert name in studio.lora_files()
    load = {"model": ["1", 0], "lora_name": name, "strength_model": 1.0}
    loader = {"class_type": "LoraLoaderModelOnly", "inputs": load}
    studio.run(painting(seed, ["x", 0], x=loader))
    with safetensors.safe_open(studio.loras / name, "pt") as file:
        return file.metadata()


def test_after_training(studio: Studio):
    _same_model(studio, 21, lambda: studio.run(training(21)))
    assert _file_works(studio, 21, "tests/21_00001_.safetensors")["ss_steps"] == "4"


def test_after_cancel(studio: Studio):
    run = Cancelled(studio, after=3)
    seconds: list[float] = []

    def train() -> None:
        seconds.append(run.run(training(22, steps=100_000)))

    _same_model(studio, 22, train)
    assert seconds[0] < 10
    steps = int(_file_works(studio, 22, "tests/22_00001_.safetensors")["ss_steps"])
    assert 3 <= steps < 1000


def test_cancel_ends_only_the_prompt_that_runs(studio: Studio):
    waiting: list[str] = []

    class Queueing(Cancelled):
        def on_progress(self, event: str, data: dict[str, Any]) -> None:
            if event == "progress" and not waiting:
                waiting.append(studio.server.submit(painting(23, ["1", 0])))
            super().on_progress(event, data)

    Queueing(studio, after=2).run(training(23, steps=100_000))
    assert studio.server.wait(waiting[0], timeout=60)["status"]["completed"]


@pytest.mark.parametrize(
    ("seed", "error", "passes", "saved"),
    [
        (24, "RuntimeError", 0, False),
        (25, "RuntimeError", PASSES, True),
        (26, "OutOfMemoryError", PASSES, True),
        (27, "MemoryError", PASSES, True),
        (28, "NaN", PASSES, True),
    ],
)
def test_after_a_fault(studio: Studio, seed: int, error: str, passes: int, saved: bool):
    message: list[str] = []

    def train() -> None:
        refusal = studio.refusal(changed(_failing(seed, error, passes), "3", steps=500))
        assert refusal.node_id == "3"
        message.append(refusal.message)

    _same_model(studio, seed, train)
    if error == "NaN":
        assert "learning_rate" in message[0] and "nan" in message[0]
    elif "Memory" in error:
        assert "Out of memory in step 25 even with gradient checkpointing" in message[0]
        assert "What would fit: " in message[0]
    else:
        assert "a fault made by the tests" in message[0]
    name = f"tests/{seed}_00001_.safetensors"
    if saved:
        assert int(_file_works(studio, seed, name)["ss_steps"]) >= 1
    else:
        assert not {file for file in studio.lora_files() if str(seed) in file}


def test_the_same_seed_gives_the_same_file(studio: Studio):
    def train(seed: int) -> bytes:
        studio.run(training(30, seed=seed))
        [file] = [name for name in studio.lora_files() if name.startswith("tests/30_")]
        data = (studio.loras / file).read_bytes()
        (studio.loras / file).unlink()  # so that the next one gets the same name
        return data

    first = train(0)
    other = train(1)
    assert train(0) == first, "ComfyUI ran the training again, with another result"
    assert other != first
