"""ComfyUI's Cancel ends the prompt that runs and never a training thread beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management as management
import pytest
from lora2_pack.lora2_core.comfy_host import deaf_to_cancel, raise_if_cancelled

COMFYS_OWN = management.throw_exception_if_processing_interrupted


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    management.interrupt_current_processing(False)
    assert management.throw_exception_if_processing_interrupted is COMFYS_OWN


def _hears_cancel() -> bool:
    """Whether an operation of ComfyUI in this thread would be ended by Cancel."""
    try:
        management.throw_exception_if_processing_interrupted()
    except management.InterruptProcessingException:
        return True
    return False


def _in_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join(10)
    return results[0]


class Beside:
    """A thread that stays inside the guard until it is told to leave."""

    def __init__(self) -> None:
        self.inside, self.leave = threading.Event(), threading.Event()
        self.heard: list[bool] = []
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with deaf_to_cancel():
            self.inside.set()
            while not self.leave.wait(0.001):
                self.heard.append(_hears_cancel())
        self.heard_after = _hears_cancel()

    def __enter__(self) -> Beside:
        self.thread.start()
        assert self.inside.wait(10)
        return self

    def __exit__(self, *_error: object) -> None:
        self.leave.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


def test_the_guarded_thread_neither_obeys_nor_uses_up_a_cancel():
    with Beside() as training:
        for _ in range(20):
            management.interrupt_current_processing(True)
            while len(training.heard) % 5 != 4:
                pass  # the training asks meanwhile
            assert _hears_cancel(), "the training used up the prompt's Cancel"
            assert not _hears_cancel()
    assert training.heard and not any(training.heard)


def test_another_thread_without_the_guard_hears_it():
    with Beside():
        management.interrupt_current_processing(True)
        assert _in_thread(_hears_cancel)


def test_after_the_guard_a_thread_hears_again():
    with deaf_to_cancel():
        management.interrupt_current_processing(True)
        assert not _hears_cancel()
    assert _hears_cancel()


def test_nested_guards():
    with deaf_to_cancel():
        with deaf_to_cancel():
            management.interrupt_current_processing(True)
            assert not _hears_cancel()
        assert not _hears_cancel(), "leaving the inner guard opened the outer one"
    assert _hears_cancel()


def test_two_trainings_that_overlap():
    first, second = Beside(), Beside()
    with first:
        second.__enter__()
    management.interrupt_current_processing(True)
    second.__exit__()
    assert not any(first.heard + second.heard)
    management.interrupt_current_processing(True)
    assert _hears_cancel()


def test_an_error_inside_leaves_everything_as_before():
    with pytest.raises(RuntimeError), deaf_to_cancel():
        raise RuntimeError
    assert management.throw_exception_if_processing_interrupted is COMFYS_OWN


def test_the_waiting_node_raises_comfyui_s_own_interruption():
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        raise_if_cancelled()
    raise_if_cancelled()  # once is enough
