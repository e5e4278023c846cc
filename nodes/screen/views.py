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
from ...lora2_core.files.header import LoRAFileError, shown_key
from ...lora2_core.files.read import ComponentInfo
from ...lora2_core.jobs.queue import Entry
from ...lora2_core.jobs.sampling import SampleEvent
from ...lora2_core.jobs.saving import TrainedLoRA
from ...lora2_core.jobs.store import INTERRUPTED, Kept
from ...lora2_core.reports import inspector
from ...lora2_core.reports.report import rank_picture, training_picture
from ...lora2_core.reports.summary import summarize
from .curves import keep_peaks, rounded, training_history
from .watch import Curves, JobWatch, Look, MapCell, map_cells

HISTORY_POINTS, EVENT_POINTS, LOG_LINES = 2000, 50, 100
ADDRESS = "/lora2/jobs"
_BESIDE = 100  # things that lie beside a file's components
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


_NAMES = {"ss_output_name", "modelspec.title"}


@dataclass(frozen=True)
class Host:
    """What only the host knows."""

    file_name: Callable[[Path], str | None]  # as in the list of LoRAs, None when not listed
    clean: Callable[[str], str]  # a text without the host's own folders


def summary(entry: Entry, look: Look, position: int | None, host: Host) -> dict[str, Any]:
    """The short form of a job of this process; ``position``: while it waits its turn."""
    run, glance, config = look.run, look.glance, entry.job.config
    megabytes = config.rank.target_megabytes
    left = (config.steps - glance.step) * glance.pace if run.state == "running" else None
    return {
        "id": entry.id,
        "name": entry.origin.name,
        "node_id": str(entry.origin.node_id),
        "state": run.state,
        "background": bool(entry.background),
        "created": rounded(entry.created, 14),
        "step": glance.step,
        "steps": config.steps,
        "seconds_left": rounded(left, 4),
        "loss": rounded(glance.loss),
        "smoothed": rounded(glance.smoothed),
        "mean_rank": rounded(glance.mean_rank),
        "target_rank": rounded(config.rank.target_rank) if megabytes is None else None,
        "bytes": glance.nbytes,
        "target_bytes": None if megabytes is None else int(megabytes * 1e6),
        "message": host.clean(run.message)[:_MESSAGE],
        "error": _error(run.error, host),
        "position": position if run.state == "queued" else None,
        "waits": run.waits,
        "resumable": run.state == "paused",
        "file": host.file_name(run.result.path) if run.result is not None else None,
        "samples": len(run.samples),
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
    look = watch.look(after=0)
    return {
        **summary(entry, look, position, host),
        "history": history(look.curves),
        "components": job_components(look, watch.nus(look)),
        "samples": [sample(entry.id, event) for event in look.run.samples],
        "log": log_lines(look.run.log, host),
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
    shown = curves.thinned(HISTORY_POINTS)
    return {
        "steps": shown.steps.tolist(),
        "loss": [rounded(value) for value in shown.loss],
        "smoothed": [rounded(value) for value in shown.smoothed],
        "mean_rank": [rounded(value) for value in shown.mean_rank],
        "probe_steps": shown.probe_steps.tolist(),
        "probe_loss": [rounded(value) for value in shown.probe_loss],
    }


def job_components(look: Look, nus: Sequence[float | None]) -> list[dict[str, Any]]:
    """The components of a job in the order of the screen; none before there is a network."""
    plan = look.plan
    if plan is None:
        return []
    ranks = look.glance.ranks or (0,) * len(plan.places)
    columns = zip(plan.places, ranks, plan.max_ranks, nus, look.nbytes(), strict=True)
    return [_component(*column) for column in columns]


def file_components(components: Sequence[ComponentInfo]) -> list[dict[str, Any]]:
    """The components of a file in the order of the screen."""
    by_key: dict[str, list[ComponentInfo]] = {}
    for component in components:  # factors and the difference of a bias may have one key
        by_key.setdefault(component.key, []).append(component)
    # Among those of one key the cells have the order of the components.
    pairs = [(place, by_key[place.key].pop(0)) for place in map_cells(components)]
    return [
        _component(place, info.rank, None, info.nu, info.nbytes)
        | ({} if info.ranked else {"kind": info.kind})
        for place, info in pairs
    ]


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
    event = next((sample for sample in samples if sample.step == step), None)
    if event is None or not 0 <= n < len(event.pictures):
        return None
    return png(Image.fromarray(np.asarray(event.pictures[n])))


def report_png(trained: TrainedLoRA, host: Host) -> bytes:
    """The report of a job whose file is written."""
    title = host.file_name(trained.path) or trained.path.name
    headline = lora_file.headline(trained.file.metadata)
    stem, history = Path(title).stem, training_history(trained)
    return png(training_picture(trained.components, history, stem, headline))


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
    report = inspector.inspect(path)
    metadata = report.metadata
    return {
        "name": name,
        "bytes": report.nbytes,
        "mean_rank": _mean(report.components),
        "trigger": report.trigger[:_LINE],
        # Not the base's file name, which may hold a folder of its maker's machine.
        "base": report.family.text,
        "kinds": report.kinds,
        "beside": [
            {
                "kind": one.kind,
                "name": shown_key(_last(one.name)),
                "tensors": one.tensors,
                "bytes": one.nbytes,
            }
            for one in report.beside[:_BESIDE]
        ],
        "hashes": report.hashes,
        "components": file_components(report.components),
        "headline": lora_file.headline(metadata)[:_LINE],
        "thumbnail": metadata["modelspec.thumbnail"] if report.thumbnail() else None,
        "metadata": short_metadata(metadata),
    }


def short_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a person may want to know of a file, a line each."""
    shown = {
        name: text[:_LINE] for name, text in sorted(metadata.items()) if _SHOWN.fullmatch(name)
    }
    # Trainers put the path of a file here as they were given it.
    return {name: _last(text) if name in _NAMES else text for name, text in shown.items()}


def _last(text: str) -> str:
    """``C:\\Ada\\cat`` → ``cat``; what is no path stays."""
    folders = re.match(r"([A-Za-z]:)?[/\\]|\.{1,2}[/\\]|~[/\\]|\\\\", text)
    return re.split(r"[/\\]", text)[-1] if folders else text


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
    figures = summarize(components)
    return rounded(figures.rank_mean) if figures.unranked < figures.count else None
