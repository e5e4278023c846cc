"""A file of the size that was asked for, after a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora2_pack.lora2_core import comfy_host
from lora2_pack.lora2_core.config.ranks import RankConfig
from lora2_pack.lora2_core.config.train import TrainConfig
from lora2_pack.lora2_core.jobs.job import TrainingJob
from lora2_pack.tests.host.demo import photos

MEGABYTES = 0.5
SMALLEST = 0.485  # 3 % below


@pytest.mark.parametrize(("rate", "steps"), [(1e-4, 100), (4e-3, 150)])
def test_a_run_meets_half_a_megabyte(
    parts: tuple[Any, Any, Any], tmp_path: Path, rate: float, steps: int
):
    config = TrainConfig(
        steps=steps,
        learning_rate=rate,
        resolution=64,
        probes=1,
        rank=RankConfig.balanced(target_megabytes=MEGABYTES),
    )
    with torch.inference_mode():  # as ComfyUI runs nodes
        setup = comfy_host.prepare_training(*parts, photos(), config)
    path = tmp_path / "small.safetensors"
    job = TrainingJob(setup, path)
    job.start()
    assert job.wait(300) and job.progress.error is None
    assert SMALLEST <= path.stat().st_size / 1e6 <= MEGABYTES
    ranks = [component.rank for component in job.result.components]
    assert len(set(ranks)) > 1, "every layer got the same rank: nothing was chosen"
