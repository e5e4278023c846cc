"""What a run leaves behind: its file, and what is known of how it came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import lora_file
from ..config.train import TrainConfig
from ..files.component import Component
from ..files.metadata import describe_run
from ..files.read import ComponentInfo
from ..training.setup import TrainingSetup
from ..training.trainer import StepEvent


@dataclass(frozen=True)
class TrainedLoRA:
    """What a run leaves behind; the value of the LORA2 socket."""

    path: Path
    file: lora_file.LoRAFile  # exactly what was written
    components: tuple[ComponentInfo, ...]
    config: TrainConfig
    events: tuple[StepEvent, ...]  # the steps, without their ranks
    nbytes: int = 0  # of the file


def save_lora(
    path: Path,
    setup: TrainingSetup,
    components: Sequence[Component],
    events: Sequence[StepEvent],
    steps: int,
    run_hash: str,
    new: bool,
    strength: float = 1.0,
) -> TrainedLoRA:
    """Write ``components``, learnt in the first ``steps`` of ``events``.

    ``new``: nothing is replaced. ``strength``: of what was trained, in them already. Raises
    LoRAFileError, and NameTaken as ``lora_file.save`` does.
    """
    config = setup.config
    learnt = events[:steps]
    text = describe_run(
        config=config,
        captions=setup.captions,
        base_hash=setup.base_hash,
        ranks=[int(c.importance.numel()) for c in components],
        losses=[event.loss for event in learnt],
        probes=[event.probe for event in learnt if event.probe is not None],
        title=path.stem,
        run=run_hash,
        strength=strength,
    )
    rank = config.rank
    written = lora_file.write(path, components, text, rank.target_megabytes, rank.min_rank, new)
    return TrainedLoRA(
        path=path,
        file=written.file,
        components=written.components,
        config=config,
        events=tuple(replace(event, ranks=()) for event in events),
        nbytes=written.nbytes,
    )
