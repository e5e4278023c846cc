"""Jobs and LoRA files as plain values for a screen; docs/api.md describes each.

Pure functions: what a host knows, such as the name of a file in its lists, comes in.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...lora2_core import lora_file
from ...lora2_core.files.header import LoRAFileError
from ...lora2_core.files.read import ComponentInfo
from ...lora2_core.jobs.job import TrainingJob
from ...lora2_core.jobs.queue import Entry
from ...lora2_core.jobs.sampling import SampleEvent
from ...lora2_core.jobs.store import INTERRUPTED, Kept
from ...lora2_core.reports import inspector
from ...lora2_core.reports.report import rank_picture, training_picture
from ...lora2_core.reports.summary import summarize
from .curves import keep_peaks, rounded
from .watch import Curves, JobWatch, MapCell, map_cells

HISTORY_POINTS, EVENT_POINTS, LOG_LINES = 2000, 50, 100
ADDRESS = "/lora2/jobs"
_MESSAGE, _ERROR, _LINE = 500, 2000, 500  # characters that are sent at most
# Only what is known to tell nothing of its maker's machine: files of others hold their folders.
_SHOWN = re.compile(
    r"lora2\.(mode|quantile|seed|steps|mean_rank|format_version|loss)"
    r"|modelspec\.(title|author|description|date|license|tags|architecture|resolution"
    r"|trigger_phrase|usage_hint)"
    r"|ss_(steps|max_train_steps|num_epochs|network_dim|network_alpha|network_module|learning_rate"
    r"|unet_lr|text_encoder_lr|optimizer|lr_scheduler|resolution|num_train_images|seed"
    r"|mixed_precision|base_model_version|output_name)"
)


@dataclass(frozen=True)
class Host:
    """What only the host knows."""

    file_name: Callable[[Path], str | None]  # as in the list of LoRAs, None when not listed
    clean: Callable[[str], str]  # a text without the host's own folders


def summary(entry: Entry, watch: JobWatch, position: int | None, host: Host) -> dict[str, Any]:
    """The short form of a job of this process."""
    job = entry.job
    progress, rank = job.progress, job.config.rank
    # Before the steps: a run that waits or is over has no step to come that this would miss.
    state, waits = str(entry.state), progress.waits
    glance = watch.look()
    megabytes = rank.target_megabytes
    left = (job.config.steps - glance.step) * glance.pace if state == "running" else None
    return {
        "id": entry.id,
        "name": entry.origin.name,
        "node_id": str(entry.origin.node_id),
        "state": state,
        "background": bool(entry.background),
        "created": rounded(entry.created, 14),
        "step": glance.step,
        "steps": job.config.steps,
        "seconds_left": rounded(left, 4),
        "loss": rounded(glance.loss),
        "smoothed": rounded(glance.smoothed),
        "mean_rank": rounded(glance.mean_rank),
        "target_rank": rounded(rank.target_rank) if megabytes is None else None,
        "bytes": glance.nbytes,
        "target_bytes": None if megabytes is None else int(megabytes * 1e6),
        "message": host.clean(progress.message)[:_MESSAGE],
        "error": _error(progress.error, host),
        "position": position,
        "waits": waits,
        "resumable": state == "paused",
        "file": host.file_name(job.result.path) if job.result is not None else None,
        "samples": len(progress.samples),
    }


def kept_summary(kept: Kept, host: Host, nbytes: int | None) -> dict[str, Any]:
    """The short form of a job of an earlier process; ``nbytes``: the size of its file."""
    name = host.file_name(Path(kept.file)) if kept.file else None
    return {
        "id": kept.id,
        "name": kept.name,
        "node_id": str(kept.node_id),
        "state": kept.state,
        "background": kept.background,
        "created": rounded(kept.created, 14),
        "step": kept.step,
        "steps": kept.steps,
        **dict.fromkeys(("seconds_left", "loss", "smoothed", "mean_rank", "target_rank")),
        "bytes": nbytes if name else None,
        "target_bytes": None,
        "message": "",
        "error": host.clean(kept.error)[:_ERROR] if kept.error else None,
        "position": None,
        "waits": False,
        "resumable": kept.state == INTERRUPTED and bool(kept.prompt),
        "file": name,
        "samples": 0,
    }


def details(entry: Entry, watch: JobWatch, position: int | None, host: Host) -> dict[str, Any]:
    """All of a job of this process."""
    short = summary(entry, watch, position, host)
    return {
        **short,
        "history": history(watch.curves_now()),
        "components": job_components(watch),
        "samples": [sample(entry.id, event) for event in list(entry.job.progress.samples)],
        "log": log_lines(list(getattr(entry.job.progress, "log", ())), host),
    }


def kept_details(kept: Kept, host: Host, nbytes: int | None) -> dict[str, Any]:
    """All that is left of a job of an earlier process: its file, if it has one."""
    short = kept_summary(kept, host, nbytes)
    components: list[dict[str, Any]] = []
    if short["file"] and kept.file:
        try:
            infos, _ = lora_file.inspect(Path(kept.file))
        except LoRAFileError:
            infos = []
        components = file_components(infos)
        short["mean_rank"] = _mean(infos)
    empty = history(Curves())
    return {**short, "history": empty, "components": components, "samples": [], "log": []}


def history(curves: Curves) -> dict[str, list[Any]]:
    """The curves in at most HISTORY_POINTS points each, every peak of the loss among them."""
    kept = keep_peaks(curves.loss, HISTORY_POINTS)
    probes = keep_peaks(curves.probe_loss, HISTORY_POINTS)
    return {
        "steps": [curves.steps[index] for index in kept],
        "loss": [rounded(curves.loss[index]) for index in kept],
        "smoothed": [rounded(curves.smoothed[index]) for index in kept],
        "mean_rank": [rounded(curves.mean_rank[index]) for index in kept],
        "probe_steps": [curves.probe_steps[index] for index in probes],
        "probe_loss": [rounded(curves.probe_loss[index]) for index in probes],
    }


def job_components(watch: JobWatch) -> list[dict[str, Any]]:
    """The components of a job in the order of the screen; none before there is a network."""
    glance, plan = watch.look(), watch.plan
    if plan is None:
        return []
    ranks = glance.ranks or (0,) * len(plan.places)
    columns = zip(plan.places, ranks, plan.max_ranks, watch.nus(), watch.nbytes(), strict=True)
    return [_component(*column) for column in columns]


def file_components(components: Sequence[ComponentInfo]) -> list[dict[str, Any]]:
    """The components of a file in the order of the screen."""
    by_key = {component.key: component for component in components}
    found = []
    for place in map_cells(components):
        info = by_key[place.key]
        found.append(_component(place, info.rank, None, info.nu, info.nbytes))
    return found


def _component(
    place: MapCell, rank: int, max_rank: int | None, nu: float | None, nbytes: int
) -> dict[str, Any]:
    return {
        "module": place.key,
        "label": place.label,
        "row": place.row,
        "column": place.column,
        "rank": rank,
        "max_rank": max_rank,
        "nu": rounded(nu),
        "bytes": nbytes,
    }


def sample(job_id: str, event: SampleEvent) -> dict[str, Any]:
    """What was painted after a step, and where the pictures are."""
    urls = [f"{ADDRESS}/{job_id}/samples/{event.step}/{n}" for n in range(len(event.pictures))]
    return {"step": event.step, "prompts": list(event.prompts), "urls": urls}


def sample_png(samples: Sequence[SampleEvent], step: int, n: int) -> bytes | None:
    """One of the pictures as a PNG; None when there is none of this step and number."""
    event = next((found for found in samples if found.step == step), None)
    if event is None or not 0 <= n < len(event.pictures):
        return None
    return png(Image.fromarray(np.asarray(event.pictures[n])))


def report_png(job: TrainingJob, host: Host) -> bytes | None:
    """The report of a job whose file is written; None before."""
    result = job.result
    if result is None:
        return None
    title = host.file_name(result.path) or result.path.name
    headline = lora_file.headline(result.file.metadata)
    stem = Path(title).stem
    return png(training_picture(result.components, result.history, stem, headline))


def file_report_png(path: Path) -> bytes:
    """The rank picture of a file, for jobs whose curves are gone."""
    components, metadata = lora_file.inspect(path)
    return png(rank_picture(components, path.stem, lora_file.headline(metadata)))


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def inspected(name: str, path: Path) -> dict[str, Any]:
    """What is in a LoRA file, by its header. Raises LoRAFileError where it is none."""
    found = inspector.inspect(path)
    metadata = found.metadata
    return {
        "name": name,
        "bytes": found.nbytes,
        "mean_rank": _mean(found.components),
        "trigger": found.trigger[:_LINE],
        # Not the base's file name, which may hold a folder of its maker's machine.
        "base": found.family.text,
        "kinds": found.kinds,
        "hashes": found.hashes,
        "components": file_components(found.components),
        "headline": lora_file.headline(metadata)[:_LINE],
        "thumbnail": metadata["modelspec.thumbnail"] if found.thumbnail() else None,
        "metadata": short_metadata(metadata),
    }


def short_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a person may want to know of a file, a line each."""
    return {name: text[:_LINE] for name, text in sorted(metadata.items()) if _SHOWN.fullmatch(name)}


def points(curves: Curves) -> list[list[float | int | None]]:
    """(step, loss, mean rank) of the steps in ``curves``, EVENT_POINTS at most."""
    return [
        [curves.steps[n], rounded(curves.loss[n]), rounded(curves.mean_rank[n], 4)]
        for n in keep_peaks(curves.loss, EVENT_POINTS)
    ]


def log_lines(lines: Sequence[str], host: Host) -> list[str]:
    """The newest lines of a log, oldest first."""
    return [host.clean(line)[:_LINE] for line in lines[-LOG_LINES:]]


def _error(error: BaseException | None, host: Host) -> str | None:
    if error is None:
        return None
    return host.clean(str(error) or type(error).__name__)[:_ERROR]


def _mean(components: Sequence[ComponentInfo]) -> float | None:
    return rounded(summarize(components).rank_mean) if components else None
