"""The one queue of trainings of this process."""

from functools import cache

from ..lora2_core import comfy_host
from ..lora2_core.jobs.checkpoints import CheckpointFolder
from ..lora2_core.jobs.queue import JobQueue
from ..lora2_core.jobs.store import JobStore


@cache
def job_queue() -> JobQueue:
    """Made when it is first asked for, while ComfyUI loads the pack."""
    checkpoints = CheckpointFolder(comfy_host.checkpoint_folder())
    return JobQueue(JobStore(comfy_host.jobs_folder()), checkpoints)
