"""A prompt that waits for its training: progress, its place in the queue, and Cancel."""

import logging
from contextlib import suppress

from ..lora2_core import comfy_host
from ..lora2_core.jobs.queue import Entry, JobQueue, WrongState
from ..lora2_core.jobs.saving import TrainedLoRA
from .train_notes import Notes

_POLL_SECONDS = 0.1


def wait_for(queue: JobQueue, entry: Entry, notes: Notes) -> TrainedLoRA:
    """Show progress until the training ends; Cancel stops it after its current step and saves.

    One that waits its turn is taken off the queue by Cancel.
    """
    job = entry.job
    bar = comfy_host.progress_bar(job.config.steps)
    shown = 0
    try:
        while not queue.wait(entry.id, _POLL_SECONDS):
            if job.progress.step != shown:
                shown = job.progress.step
                bar(shown)
            notes.show(job.progress.message)
            notes.stand(_standing(queue, entry))
            comfy_host.raise_if_cancelled()
    except BaseException:
        with suppress(WrongState):  # it has just ended by itself
            queue.stop(entry.id)
        queue.wait(entry.id)
        if job.progress.error is not None:
            logging.error("LoRA²: stopped, but not saved: %s", job.progress.error)
        job.slim()
        raise
    notes.stand("")
    bar(job.progress.step)
    result, error = job.result, job.progress.error
    job.slim()  # from here on the list needs no more of it
    if error is not None:
        raise error
    if result is None:
        raise RuntimeError("The training was stopped before its first step; there is no LoRA.")
    return result


def _standing(queue: JobQueue, entry: Entry) -> str:
    """How things stand while there is no progress to see."""
    if entry.state == "paused":
        return "Paused; it goes on from the LoRA² tab."
    position, current = queue.position(entry.id), queue.current()
    if position is None or current is None:
        return ""
    paused = ", which is paused" if current.state == "paused" else ""
    others = f" and {position - 1} more" if position > 1 else ""
    return f"Waits its turn: behind {current.origin.name}{paused}{others} (see the LoRA² tab)."
