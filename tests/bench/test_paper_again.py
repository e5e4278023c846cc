"""The tables of README and docs once more: from the records, by NumPy and SciPy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora2_pack.bench.paper.records import archive
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "paper" / "results"
RECORDS = RESULTS / "demo.jsonl"


def _table(file: Path = RECORDS) -> dict[tuple[str, str, int], dict[str, float]]:
    """Scores by method, subject and seed, straight from the records."""
    found = {}
    for record in archive.read(file):
        if "failed" in record:
            continue
        own, judges = record["settings"], record["scores"].values()
        means = {
            key: np.mean([np.mean(told[key]) for told in judges if key in told])
            for key in ("likeness", "place", "object")
            if any(key in told for told in judges)
        }
        asked = [means[key] for key in ("place", "object") if key in means]
        found[own["method"], own["subject"], own["seed"]] = {
            "likeness": means["likeness"],
            "prompt": np.mean(asked) if asked else np.nan,
            "bytes": record.get("bytes", np.nan),
            "drawn": "object" in means,
        }
    return found


def _gap(table: Any, rival: str, ours: str, key: str, drawn: bool) -> tuple[float, float, float]:
    gaps: dict[str, list[float]] = {}
    for (method, subject, seed), told in table.items():
        mine = table.get((ours, subject, seed))
        if method == rival and mine is not None and told["drawn"] == drawn:
            gaps.setdefault(subject, []).append(mine[key] - told[key])
    values = [np.mean(each) for each in gaps.values()]
    reach = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return float(np.mean(values)), float(reach.low), float(reach.high)


_NUMBERS = re.compile(r"([-+][\d.]+) \(([-+][\d.]+) to ([-+][\d.]+)\)")
_COMPARED = {
    "LoRA, rank 64 (": ("fixed-64", "balanced"),
    "budget in ranks": ("balanced-in-ranks", "balanced"),
    "LoRA² paper": ("paper", "balanced"),
    "to train, ours cut": ("adalora", "balanced-cut"),
    "AdaLoRA (PEFT) (0.48 MB, 1.21 × the memory to train)": ("adalora", "balanced"),
    "DoRA": ("dora", "balanced"),
    "rank 64, then SVD": ("svd-64", "balanced"),
    "rank 16, then SVD": ("svd-16", "balanced"),
}


_SEVERAL = {
    "LoRA, rank 64 (": ("fixed-64", "balanced"),
    "LoRA, rank 8 (": ("fixed-8", "balanced"),
    "LoRA, rank 64, then SVD": ("svd-64", "balanced"),
    "ranks of a finished": ("frozen", "balanced"),
    "Ranks can be told apart": ("fixed-2", "fixed-64"),
}


def _check(cell: str, wanted: list[tuple[float, float, float]]) -> None:
    """A cell's numbers, and its sign: likeness, then the prompt where it has that."""
    told = _NUMBERS.findall(cell)
    assert told, cell
    for numbers, each in zip(told, wanted, strict=False):
        assert [float(one) for one in numbers] == pytest.approx(each, abs=6e-4), cell
    ways = {(low > 0) - (high < 0) for _, low, high in wanted[: len(told)]}
    sign = "≈" if ways in ({0}, {-1, 1}, {-1, 0, 1}) else "✘" if -1 in ways else "✔"
    assert cell.startswith(sign), cell


def _rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ") and "likeness" in line]


def _gaps(table: Any, rival: str, ours: str, drawn: bool) -> list[tuple[float, float, float]]:
    return [_gap(table, rival, ours, key, drawn) for key in ("likeness", "prompt")]


def test_every_figure_and_sign_of_the_readme_comes_out_again():
    """By NumPy and SciPy from the records, with none of the report's arithmetic."""
    lines, table = _rows((ROOT / "README.md").read_text("utf-8")), _table()
    for part, (rival, ours) in _COMPARED.items():
        (line,) = [line for line in lines if part in line]
        for drawn, cell in zip((True, False), line.strip("| ").split(" | ")[1:], strict=True):
            assert len(_NUMBERS.findall(cell)) == 2, "likeness and prompt"
            _check(cell, _gaps(table, rival, ours, drawn))
    (gate,) = [line for line in lines if "Ranks can be told apart" in line]
    for drawn, cell in zip((True, False), gate.strip("| ").split(" | ")[1:], strict=True):
        wanted = _gap(table, "fixed-2", "fixed-64", "likeness", drawn)
        assert [float(x) for x in _NUMBERS.search(cell).groups()] == pytest.approx(wanted, abs=6e-4)
        assert cell.startswith("✔" if wanted[1] > 0 else "✘")


def test_every_figure_of_several_subjects_comes_out_again():
    """Those of docs/benchmark.md, a group the unit."""
    text, table = _docs("## Several subjects"), _table(RESULTS / "several.jsonl")
    lines = _rows(text)
    for part, (rival, ours) in _SEVERAL.items():
        (line,) = [line for line in lines if line.startswith(f"| {part}")]
        _check(line.strip("| ").split(" | ")[1], _gaps(table, rival, ours, True))
    assert len(_SEVERAL) == len(lines) - 1, "all but the front between two ranks"
    low = _gap(table, "fixed-2", "fixed-64", "likeness", True)[1]
    assert low > 0, "the gate: ranks can be told apart"
    flowing = " ".join(text.split())
    for one, other in (("fixed-8", "frozen"), ("fixed-8", "svd-64")):
        told = "{:+.3f} ({:+.3f} to {:+.3f})".format(*_gap(table, one, other, "likeness", True))
        assert f"is {told} from rank 8" in flowing, told


def test_what_the_tuning_groups_reached_comes_out_again():
    text = " ".join(_docs("## Several subjects").split())
    found = {
        (own["method"], own["rate"], own["how"].get("room")): float(
            np.mean([np.mean(judge["likeness"]) for judge in record["scores"].values()
                     if "likeness" in judge])
        )
        for name in ("several-tune", "several-sweep")
        for record in archive.read(RESULTS / f"{name}.jsonl")
        if "failed" not in record
        for own in [record["settings"]]
        if own["subject"] == "16-subjects-tuning"
    }  # fmt: skip
    for key, words in (
        (("balanced", 0.004, 1.25), "at {} with room for a quarter"),
        (("balanced", 0.002, 4.0), "at {} with four times"),
        (("balanced", 0.002, 8.0), "at {} with eight times"),
        (("quantile-0.5", 0.004, None), "at {} with q = 0.5"),
        (("adalora", 0.016, None), "AdaLoRA but for tuning ({} there)"),
    ):
        assert words.format(f"{found[key]:.3f}") in text, (key, found[key])


def test_the_ceiling_of_the_prompt_score_comes_out_again():
    own = [
        {
            key: np.mean([np.mean(judge[key]) for judge in record["scores"].values()])
            for key in ("place", "object")
        }
        for record in archive.read(RECORDS)
        if record["settings"]["method"] == "own"
    ]
    place, thing = (np.array([one[key] for one in own]) for key in ("place", "object"))
    told = f"place {place.mean():.3f}, object {thing.mean():.3f} (from {thing.min():.3f} of the can"
    assert f"{told} to {thing.max():.3f})" in " ".join(_docs("## Subjects and judges").split())


def _docs(start: str) -> str:
    text = (ROOT / "docs" / "benchmark.md").read_text("utf-8")
    return text[text.index(start) :]


def test_the_front_of_fixed_ranks_comes_out_again():
    readme, table = (ROOT / "README.md").read_text("utf-8"), _table()
    (line,) = [line for line in readme.splitlines() if line.startswith("| LoRA of one rank")]
    run = {method for method, *_ in table}
    ranks = [f"fixed-{2**power}" for power in range(7) if f"fixed-{2**power}" in run]
    for drawn, cell in zip((True, False), line.strip("| ").split(" | ")[1:], strict=True):
        subjects = sorted({s for (m, s, _), told in table.items() if told["drawn"] == drawn})
        for key, told in zip(("likeness", "prompt"), _NUMBERS.findall(cell), strict=True):

            def mean(method: str, what: str, chosen: list[str]) -> float:
                each = [
                    [v[what] for (m, s, _), v in table.items() if (m, s) == (method, subject)]
                    for subject in chosen
                ]
                return float(np.mean([np.mean(values) for values in each]))

            def gap(chosen: list[str], key: str = key) -> float:
                sizes = [np.log(mean(rank, "bytes", chosen)) for rank in ranks]
                best = np.maximum.accumulate([mean(rank, key, chosen) for rank in ranks])
                at = np.log(mean("balanced", "bytes", chosen))
                return mean("balanced", key, chosen) - float(np.interp(at, sizes, best))

            count = len(subjects)
            left = [gap([other for other in subjects if other != one]) for one in subjects]
            error = np.sqrt((count - 1) / count * np.sum((left - np.mean(left)) ** 2))
            reach = stats.t.ppf(0.975, count - 1) * error
            wanted = gap(subjects), gap(subjects) - reach, gap(subjects) + reach
            assert [float(one) for one in told] == pytest.approx(wanted, abs=6e-4)
