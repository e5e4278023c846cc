"""The paper's figures with our data, as PNGs."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..methods import IN_RANKS, KEPT, OURS, SMALLER, Method, uniform
from ..records import results
from ..records.results import Interval, Result, kinds_of

_FIXED, _OURS, _PEFT, _CUT, _INK = "#5b6b7b", "#c8372d", "#2a7f9e", "#d08a1d", "#222831"
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "grid.color": "#e7ebef",
    "axes.axisbelow": True,
    "figure.dpi": 144,
    "savefig.facecolor": "white",
}
_KEY = re.compile(r"lora_unet_(.+)_transformer_blocks_(\d+)_attn([12])_to_(q|k|v|out)(?:_0)?$")
_COLUMNS = [f"{kind} {side}" for kind in ("self", "cross") for side in ("q", "k", "v", "out")]


def _figure(*counts: int, figsize: tuple[float, float], layout: Any = None, **more: Any) -> Any:
    """A figure of no window, and its axes."""
    made = Figure(figsize=figsize, layout=layout)
    return made, made.subplots(*(counts or (1, 1)), **more)


def colour(name: str, method: Method) -> str:
    if name.startswith(OURS) or method.mode == "paper":
        return _OURS
    return {"ours": _FIXED, "peft": _PEFT, "cut": _CUT}[method.kind]


def front(found: Sequence[Result], methods: Mapping[str, Method], file: Path) -> None:
    """Figure 5: scores against bytes; fixed ranks as a line, every other method as a point."""
    shown = results.complete(found, methods, OURS)
    points = {point.method: point for point in results.points(found, shown)}
    asked = any(point.prompt is not None for point in points.values())
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(1, 2 if asked else 1, figsize=(11 if asked else 6, 4.6))
        panels = list(axes) if asked else [axes]
        for axis, (value, title) in zip(
            panels,
            (
                (lambda point: point.likeness, "Likeness to the subject"),
                (lambda point: point.prompt, "Prompt score"),
            ),
            strict=False,
        ):
            _front_panel(axis, points, methods, value, title)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=8.5)
        figure.tight_layout(rect=(0, 0.05 + 0.045 * math.ceil(len(labels) / 5), 1, 1))
        figure.savefig(file)


_MARKERS = {
    OURS: "*", SMALLER: "*", IN_RANKS: "X", "balanced-no-rank": "o", "balanced-no-entropy": "p",
    "balanced-neither": "h", "paper": "P", "adalora": "s", "dora": "D",
}  # fmt: skip


def _front_panel(
    axis: Any, points: Mapping[str, Any], methods: Mapping[str, Method], value: Any, title: str
) -> None:
    fixed = [points[name] for name in methods if methods[name].plain and name in points]
    sizes = [point.nbytes / 1e6 for point in fixed]
    axis.plot(sizes, [value(one) for one in fixed], "o-", color=_FIXED, lw=1.5, ms=5,
              label="LoRA of a fixed rank")  # fmt: skip
    for point in fixed:
        rank = point.method.rpartition("-")[2]
        place = (point.nbytes / 1e6, value(point))
        axis.annotate(rank, place, xytext=(0, -14), textcoords="offset points", ha="center",
                      fontsize=8, color=_FIXED)  # fmt: skip
    others = iter("^v<>")
    for name, point in points.items():
        method = methods[name]
        if method.plain or value(point) is None:
            continue
        marker = _MARKERS.get(name) or next(others, "8")
        ours = name == OURS
        axis.plot(
            point.nbytes / 1e6, value(point), marker, color=colour(name, method),
            ms={OURS: 15, SMALLER: 10}.get(name, 7), mec="white", mew=0.8, ls="",
            alpha=1 if ours or method.kind != "ours" else 0.6, label=_label(method),
            zorder=5 if ours else 3,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("file, MB")
    axis.margins(y=0.12)  # the numbers under the points stay off the edge
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)


def _label(method: Method) -> str:
    return method.label.replace("…", "LoRA²")


def pairs(found: Sequence[Result], methods: Mapping[str, Method], file: Path) -> None:
    """By how much ``balanced`` is above every other method, paired by subject, with intervals."""
    run = {one.method for one in found}
    names = [name for name in methods if name in run and name != OURS]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(1, 2, figsize=(11, 0.36 * len(names) + 1.4), sharey=True)
        for axis, (value, title) in zip(axes, results.MEASURES, strict=True):
            for row, name in enumerate(reversed(names)):
                gap = results.paired(found, name, OURS, value)
                if gap is not None:
                    _bar(axis, row, gap, colour(name, methods[name]))
            axis.axvline(0, color=_INK, lw=1)
            axis.set_title(f"{title}: LoRA² balanced minus …", loc="left", fontsize=11,
                           fontweight="bold", color=_INK)  # fmt: skip
        axes[0].set_yticks(range(len(names)), [_label(methods[n]) for n in reversed(names)])
        figure.tight_layout()
        figure.savefig(file)


def strength(found: Sequence[Result], methods: Mapping[str, Method], file: Path) -> None:
    """Likeness against prompt, for each kind of subjects: from full to calibrated strength."""
    groups = kinds_of(found)
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(1, len(groups), figsize=(5.8 * len(groups), 5), squeeze=False)
        for axis, (kind, group) in zip(axes[0], groups.items(), strict=True):
            run = {point.method: point for point in results.points(group, methods)}
            for name in (name for name in run if name + KEPT in run):
                ends = [(run[one].prompt, run[one].likeness) for one in (name, name + KEPT)]
                shade, label = colour(name, methods[name]), _label(methods[name])
                axis.plot(*zip(*ends, strict=True), "-", color=shade, lw=1.2, alpha=0.6)
                axis.plot(*ends[0], "o", mfc="white", mec=shade, ms=6)
                marker = _MARKERS.get(name, "o")
                axis.plot(*ends[1], marker, color=shade, ms=14 if name == OURS else 7)
                axis.annotate(label, ends[1], xytext=(7, 3), textcoords="offset points",
                              fontsize=7.5, color=shade)  # fmt: skip
            axis.set_title(kind, loc="left", fontsize=11, fontweight="bold", color=_INK)
            axis.set_xlabel("prompt score")
            axis.set_ylabel("likeness")
            axis.margins(x=0.25)
        figure.tight_layout()
        figure.savefig(file)


def _bar(axis: Any, row: int, gap: Interval, shade: str) -> None:
    axis.plot([gap.low, gap.high], [row, row], color=shade, lw=3, solid_capstyle="round", alpha=0.5)
    axis.plot(gap.mean, row, "o", color=shade, ms=6)


def by_subject(found: Sequence[Result], methods: Mapping[str, Method], file: Path) -> None:
    """Figure 7: every subject's score by rank, its best in red, the usual rank on a grey band."""
    plain = [name for name in methods if methods[name].plain]
    names = [name for name in (*plain, OURS) if any(one.method == name for one in found)]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(1, 2, figsize=(11, 4.6))
        for axis, (value, title) in zip(axes, results.MEASURES, strict=True):
            tables = [results.by_subject(found, name, value) for name in names]
            for subject in tables[-1]:
                told = [table.get(subject, math.nan) for table in tables]
                axis.plot(range(len(names)), told, "-", color=_FIXED, lw=0.9, alpha=0.45)
                best = int(np.nanargmax(told))
                axis.plot(range(len(names)), told, "o", color=_FIXED, ms=3)
                axis.plot(best, told[best], "o", color=_OURS, ms=6)
            if (usual := uniform(methods)) in names:
                axis.axvspan(names.index(usual) - 0.4, names.index(usual) + 0.4, color="#eceff2")
            labels = [_label(methods[name]).removeprefix("LoRA, ") for name in names]
            axis.set_xticks(range(len(names)), labels, rotation=25, ha="right")
            axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
            axis.grid(axis="x", visible=False)
        figure.tight_layout()
        figure.savefig(file)


def sizes(found: Sequence[Result], methods: Mapping[str, Method], file: Path) -> None:
    """Figure 9: the file of every subject, with and without the terms of the loss."""
    names = [name for name in methods if methods[name].adaptive]
    tables = {name: results.by_subject(found, name, lambda one: one.nbytes) for name in names}
    tables = {name: table for name, table in tables.items() if table}
    subjects = list(next(iter(tables.values())))
    with mpl.rc_context(_STYLE):
        figure, axis = _figure(figsize=(11, 3.8))
        wide = 0.8 / len(tables)
        shades = ["#c8372d", "#e5958f", "#8f6fa8", "#c9b7d6", "#5b6b7b"]
        for index, ((name, table), shade) in enumerate(zip(tables.items(), shades, strict=False)):
            places = [
                place + wide * (index - (len(tables) - 1) / 2) for place in range(len(subjects))
            ]
            heights = [table.get(subject, 0) / 1e6 for subject in subjects]
            axis.bar(places, heights, wide * 0.92, color=shade, label=_label(methods[name]))
        axis.set_xticks(range(len(subjects)), subjects, rotation=35, ha="right")
        axis.set_ylabel("file, MB")
        axis.grid(axis="x", visible=False)
        axis.legend(frameon=False, ncols=len(tables), loc="lower left", bbox_to_anchor=(0, 1),
                    fontsize=9)  # fmt: skip
        figure.tight_layout()
        figure.savefig(file)


def heat(found: Sequence[Result], method: str, file: Path, many: int = 5) -> bool:
    """Figure 8: learnt ranks by layer and projection, for some subjects; False without ranks."""
    told: dict[str, list[dict[str, int]]] = {}
    for one in found:
        if one.method == method and one.ranks:
            told.setdefault(one.subject, []).append(one.ranks)
    if not told:
        return False
    chosen = dict(list(told.items())[:: max(1, len(told) // many)][:many])
    rows = list(dict.fromkeys(_row(key) for ranks in next(iter(chosen.values())) for key in ranks))
    rows = sorted((row for row in rows if row), key=_forward)
    grids = {subject: _grid(runs, rows) for subject, runs in chosen.items()}
    top = max(max(map(max, grid)) for grid in grids.values())
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure, axes = _figure(
            1, len(grids), figsize=(2.5 * len(grids) + 1.6, 0.3 * len(rows) + 1.6), sharey=True,
            layout="constrained", squeeze=False,
        )  # fmt: skip
        scale = LogNorm(1, max(2, top))
        shown: Any = None
        for axis, (subject, grid) in zip(axes[0], grids.items(), strict=True):
            shown = axis.imshow(grid, norm=scale, cmap="cividis", aspect="auto")
            axis.axvline(3.5, color="white", lw=2)
            axis.set_title(subject, fontsize=10, color=_INK)
            axis.set_xticks(range(8), _COLUMNS, rotation=90, fontsize=8)
            axis.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=8)
        bar = figure.colorbar(shown, ax=axes[0], label="rank", pad=0.01)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:g}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        figure.savefig(file)
    return True


Row = tuple[str, int]


def _row(key: str) -> Row | None:
    found = _KEY.match(key)
    return (found[1], int(found[2])) if found else None


def _forward(row: Row) -> tuple[int, list[int], int]:
    part = ("input", "middle", "output").index(row[0].split("_")[0])
    return part, [int(number) for number in re.findall(r"\d+", row[0])], row[1]


def _name(row: Row) -> str:
    part, *numbers = row[0].replace("blocks_", "").replace("block_", "").split("_")
    short = {"input": "down", "middle": "mid", "output": "up"}[part]
    return f"{short} {'.'.join(numbers)} · {row[1]}"


def _grid(runs: Sequence[Mapping[str, int]], rows: Sequence[Row]) -> list[list[float]]:
    """Ranks, the mean over runs, by row and column."""
    grid = [[1.0] * len(_COLUMNS) for _ in rows]
    for key in runs[0]:
        match, row = _KEY.match(key), _row(key)
        if match is not None and row is not None:
            kind = "self" if match[3] == "1" else "cross"
            column = _COLUMNS.index(f"{kind} {match[4]}")
            grid[rows.index(row)][column] = statistics.fmean(
                max(1, run.get(key, 1)) for run in runs
            )
    return grid
