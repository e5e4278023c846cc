"""A LoRA of ours, trained as the node trains it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....lora2_core import lora_file
from ....lora2_core.config.train import TrainConfig
from ....lora2_core.files.encode import kohya_key
from ....lora2_core.files.metadata import describe_run
from ....lora2_core.training import trainer
from ....tools.tiny_sdxl.evaluation.parts import Parts
from ....tools.tiny_sdxl.world.subjects import View
from . import allocation


def train(
    parts: Parts,
    photos: Sequence[View],
    config: TrainConfig,
    file: Path,
    ranks: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Train on pictures and their captions, write the LoRA, and return what it took.

    ``ranks``: by component, to begin with.
    """
    setup = parts.prepared(photos, config)
    if ranks is not None:
        given = [ranks[kohya_key(one.name, one.root)] for one in setup.network.targets]
        allocation.give(setup.network, given)
    events = list(trainer.train(setup.network, setup.task, setup.config, setup.entropy))
    components = setup.network.components()
    about = describe_run(
        config=setup.config,
        captions=[view.caption for view in photos],
        base_hash=setup.base_hash,
        ranks=[int(component.importance.numel()) for component in components],
        losses=[event.loss for event in events],
        probes=[],
        title=file.stem,
    )
    ranks = setup.config.rank
    lora_file.save(file, components, about, ranks.target_megabytes, ranks.min_rank)
    last = events[-max(1, len(events) // 5) :]
    return {
        "loss": statistics.fmean(event.loss for event in last),  # of the last fifth
        "mean_rank": events[-1].mean_rank,
        # Before a decomposition cuts the file to its size: those are not what was learnt.
        "learnt": {kohya_key(one.name, one.root): one.rank for one in components},
        "megabytes": file.stat().st_size / 1e6,
        "seconds": sum(event.seconds for event in events),
    }
