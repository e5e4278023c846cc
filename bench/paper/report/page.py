"""One page of HTML with its pictures beside it, from a run's records; nothing from a network."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....lora2_core.files.atomic import replacing
from ..methods import BASE, GAIN, KEPT, OURS, OWN, Method
from ..records import results
from ..records.results import Result, Value, likeness, prompt
from . import plots, verdict

_DIGITS = 3  # of a score
_SIGNS = {"holds": "✔", "open": "≈", "fails": "✘"}
_WORDS = {
    "holds": "better in one score and worse in none",
    "open": "cannot be told, or a trade of one score for the other",
    "fails": "worse in one score and better in none",
}
_CSS = """
:root { --ink: #1d232b; --muted: #66717d; --line: #e2e7ec; --best: #c8372d; --page: #fff; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1160px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 21px; margin: 44px 0 8px; }
h3 { font-size: 16px; margin: 28px 0 4px; }
p, li { max-width: 860px; } .muted { color: var(--muted); }
img { max-width: 100%; display: block; margin: 8px 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 4px 7px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--page); }
th { font-weight: 600; vertical-align: bottom; white-space: normal; max-width: 84px; }
td.best { color: var(--best); font-weight: 700; }
tr.mean td { border-top: 2px solid var(--line); font-weight: 600; }
table.verdict td, table.verdict th { white-space: normal; text-align: left;
  vertical-align: top; max-width: none; }
table.verdict td:first-child { max-width: 300px; } table.verdict b { font-size: 16px; }
.holds b { color: #2b8a3e; } .open b { color: #b7791f; } .fails b { color: var(--best); }
"""


def write(
    found: Sequence[Result],
    methods: Mapping[str, Method],
    about: str,
    folder: Path,
    shown: Mapping[str, Path] | None = None,
) -> Path:
    """Write ``index.html`` and its PNGs; returns the page. Raises ValueError without results.

    ``shown``: pictures that lie in ``folder`` already, by subject.
    """
    run = {one.method for one in found}
    known = {name: method for name, method in methods.items() if name in run}
    if not known:
        raise ValueError("there is no record yet: run the benchmark first.")
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>LoRA² against everything else</h1><p class=muted>{html.escape(about)}</p>"]
    for number, (title, some) in enumerate(views(found).items()):
        parts += _compared(some, known, title, folder, number)
    if any(one.method == OURS + KEPT for one in found):
        parts.append(
            _picture(folder, "strength.png", "Strength", _STRENGTH, found, known, plots.strength)
        )
    known = {name: method for name, method in known.items() if not name.endswith(KEPT)}
    parts += _in_detail(found, known, folder, shown or {})
    body = "\n".join(parts)
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
        f"content='width=device-width'><title>LoRA² benchmark</title><style>{_CSS}</style>{body}"
    )
    target = folder / "index.html"
    with replacing(target) as out:
        out.write(page.encode())
    return target


def _in_detail(
    found: Sequence[Result],
    known: Mapping[str, Method],
    folder: Path,
    shown: Mapping[str, Path],
) -> list[str]:
    """What was painted, subject by subject and judge by judge, terms of the loss, and ranks."""
    run = {one.method for one in found}
    parts: list[str] = []
    for subject, file in shown.items():
        name = html.escape(subject)
        parts.append(f"<h3>Painted: {name}</h3><img src={html.escape(file.name)} alt='{name}'>")
    if OURS in run and any(method.plain for method in known.values()):
        draw = plots.by_subject
        parts.append(
            _picture(folder, "subjects.png", "By subject", _BY_SUBJECT, found, known, draw)
        )
    terms = {name: method for name, method in known.items() if method.adaptive}
    if len(terms) > 1:
        parts.append(f"<h2>Terms of the loss</h2><p>{_TERMS}</p>{_summary(found, terms, {})}")
    parts.append(f"<h2>By judge</h2><p>{_JUDGES}</p>{_by_judge(found, known)}")
    for value, title in results.MEASURES:
        table = _by_subject(found, known, value)
        parts.append(f"<h2>{title}, by subject</h2>{table}" if table else "")
    if terms:
        parts.append(
            _picture(folder, "sizes.png", "File by subject", _SIZES, found, known, plots.sizes)
        )
    if OURS in run and plots.heat(found, OURS, folder / "ranks.png"):
        parts.append(f"<h2>Learnt ranks</h2><p>{_RANKS}</p><img src=ranks.png alt=''>")
    return parts


def views(found: Sequence[Result]) -> dict[str, list[Result]]:
    """The results at full strength and, first, those at calibrated strength, as far as there are
    any; a title each."""
    every = {
        "At calibrated strength": verdict.calibrated(found),
        "At full strength": [one for one in found if not one.method.endswith(KEPT)],
    }
    return {title: some for title, some in every.items() if some}


def _compared(
    found: Sequence[Result], methods: Mapping[str, Method], title: str, folder: Path, number: int
) -> list[str]:
    """Verdict, pictures of each kind of subjects, and all methods."""
    run = {one.method for one in found}
    known = {name: method for name, method in methods.items() if name in run}
    parts = [_verdict(found, verdict.rows(found, known), title)]
    for place, (kind, some) in enumerate(results.kinds_of(found).items()):
        for name, text, draw in (("front", _FRONT, plots.front), ("pairs", _PAIRS, plots.pairs)):
            if name == "front" or (OURS in run and len(known) > 1):
                head, file = f"{_TITLES[name]}: {kind}", f"{name}-{number}-{place}.png"
                parts.append(_picture(folder, file, head, text, some, known, draw))
    return [*parts, f"<h3>All methods</h3>{_summary(found, known)}"]


_TITLES = {"front": "Scores against bytes", "pairs": "Method by method"}
_STRENGTH = (
    f"From full strength, hollow, to the smallest that keeps {GAIN:.0%} of what the run gained on "
    "fixed noise: what likeness costs, and what the prompt wins."
)
_FRONT = (
    "Each point is the mean over subjects and seeds, of methods that all subjects were run with. "
    "Higher is better, further left is smaller; the number at a grey point is its rank. Files are "
    "in fp16: the paper's sizes (2.8 GB for rank 512 on SDXL) are of fp32, twice as large."
)
_PAIRS = (
    "The difference to every other method, subject by subject, and where its mean would lie with "
    "other subjects of this kind (95 %, Student's t). Right of the line LoRA² is ahead."
)
_BY_SUBJECT = (
    "A line a subject, its best in red; the fixed rank whose file is as large as LoRA²'s may be "
    "lies on grey. The paper's figure 7."
)
_TERMS = "The paper's table 1, with the budget in ranks; one in bytes holds every file to its size."
_JUDGES = (
    "Figures of two judges cannot be compared with each other; likeness elsewhere on this page is "
    "the mean of the demo's two, or DINO's alone."
)
_SIZES = "With and without the terms of the loss; the paper's figure 9."
_RANKS = (
    "The mean over seeds, for some subjects: rows are the transformer blocks in the order in which "
    "they run, columns the projections of self- and cross-attention; the paper's figure 8."
)


def _verdict(found: Sequence[Result], said: Sequence[verdict.Row], title: str) -> str:
    if not said:
        return f"<h2>{title}</h2>"

    def cell(told: verdict.Cell | None) -> str:
        if told is None:
            return "<td>–</td>"
        sign = f"<b title='{_WORDS[told.verdict]}'>{_SIGNS[told.verdict]}</b>"
        return f"<td class={told.verdict}>{sign} {html.escape(told.text)}</td>"

    top = "".join(f"<th>{html.escape(head)}</th>" for head in ("", *verdict.heads(found)))
    body = "".join(
        f"<tr><td>{html.escape(row.about)}</td>{''.join(map(cell, row.cells))}</tr>" for row in said
    )
    legend = ", ".join(f"{_SIGNS[one]} {_WORDS[one]}" for one in _SIGNS)
    return (
        f"<h2>{title}</h2><p class=muted>LoRA² balanced beside others. {legend}; in brackets 95 % "
        f"intervals over subjects.</p><div class=wide><table class=verdict><tr>{top}</tr>{body}"
        "</table></div>"
    )


def markdown(found: Sequence[Result], methods: Mapping[str, Method]) -> str:
    """The verdict as a table for a README."""
    said = verdict.rows(found, methods)
    if not said:
        return f"No verdict: that takes records of {OURS} and of a fixed rank.\n"
    top = " | ".join(["| balanced beside …", *verdict.heads(found)]) + " |"
    lines = [
        " | ".join([f"| {row.about}", *("–" if one is None else _told(one) for one in row.cells)])
        + " |"
        for row in said
    ]
    rule = "| --- " * (1 + len(verdict.heads(found))) + "|"
    return "\n".join([top, rule, *lines]) + "\n"


def _told(cell: verdict.Cell) -> str:
    return f"{_SIGNS[cell.verdict]} {cell.text}"


def _picture(
    folder: Path, name: str, title: str, text: str, found: Sequence[Result],
    methods: Mapping[str, Method], draw: Any,
) -> str:  # fmt: skip
    draw(found, methods, folder / name)
    return f"<h3>{title}</h3><p>{text}</p><img src={name} alt='{title}'>"


_LEVELS = {BASE: "no LoRA", OWN: "the subject itself"}


def _summary(
    found: Sequence[Result], methods: Mapping[str, Method], levels: Mapping[str, str] = _LEVELS
) -> str:
    heads = ("", "MB", "mean rank", "likeness", "95 %", "prompt", "place", "object", "seconds",
             "MB above base", "subjects × seeds")  # fmt: skip
    rows = [_row(found, name, method.label) for name, method in methods.items()]
    run = {one.method for one in found}
    rows += [_row(found, name, label) for name, label in levels.items() if name in run]
    return _table(heads, rows)


def _row(found: Sequence[Result], name: str, label: str) -> list[str]:
    mine = [one for one in found if one.method == name]

    def mean(value: Value, form: str) -> str:
        told = results.by_subject(mine, name, value)
        return format(statistics.fmean(told.values()), form) if told else "–"

    spread = results.interval(list(results.by_subject(mine, name, likeness).values()))
    return [
        html.escape(label),
        mean(lambda one: one.nbytes / 1e6 if one.nbytes else None, ".2f"),
        mean(lambda one: statistics.fmean(one.ranks.values()) if one.ranks else None, ".1f"),
        mean(likeness, ".3f"),
        f"{spread.low:.3f} – {spread.high:.3f}",
        mean(prompt, ".3f"),
        mean(lambda one: one.place, ".3f"),
        mean(lambda one: one.thing, ".3f"),
        mean(lambda one: one.seconds, ".0f"),
        mean(lambda one: one.peak_megabytes, ".0f"),
        f"{len({one.subject for one in mine})} × {len({one.seed for one in mine})}",
    ]


def _by_subject(found: Sequence[Result], methods: Mapping[str, Method], value: Value) -> str:
    """Figure 7 as a table: a row a subject, its best marked."""
    tables = {name: results.by_subject(found, name, value) for name in methods}
    tables = {name: table for name, table in tables.items() if table}
    subjects = list(dict.fromkeys(subject for table in tables.values() for subject in table))
    if not subjects:
        return ""
    rows: list[list[str]] = []
    for subject in subjects:
        told = [table.get(subject) for table in tables.values()]
        rows.append([html.escape(subject), *_marked(told)])
    means = [  # over fewer subjects is another mean
        statistics.fmean(table.values()) if len(table) == len(subjects) else None
        for table in tables.values()
    ]
    heads = ["", *(html.escape(methods[name].label) for name in tables)]
    return _table(heads, rows, ["Mean", *_marked(means)])


def _by_judge(found: Sequence[Result], methods: Mapping[str, Method]) -> str:
    names = dict.fromkeys(name for one in found for name in one.judges)
    rows: list[list[str]] = []
    for method in methods:
        mine = [one for one in found if one.method == method]
        tables = [results.by_subject(mine, method, _judged(name)) for name in names]
        means = [f"{statistics.fmean(one.values()):.3f}" if one else "–" for one in tables]
        rows.append([html.escape(methods[method].label), *means])
    return _table(("", *names), rows)


def _judged(name: str) -> Value:
    return lambda one: one.judges.get(name)


def _marked(told: Sequence[float | None]) -> list[str]:
    best = max((round(one, _DIGITS) for one in told if one is not None), default=None)
    return [
        "–" if one is None
        else f"*{one:.{_DIGITS}f}" if round(one, _DIGITS) == best
        else f"{one:.{_DIGITS}f}"
        for one in told
    ]  # fmt: skip


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], last: Sequence[str] = ()) -> str:
    def cell(text: str) -> str:
        return f"<td class=best>{text[1:]}</td>" if text.startswith("*") else f"<td>{text}</td>"

    top = "".join(f"<th>{_folded(head)}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    foot = f"<tr class=mean>{''.join(map(cell, last))}</tr>" if last else ""
    return f"<div class=wide><table><tr>{top}</tr>{body}{foot}</table></div>"


def _folded(head: str) -> str:
    head = head.replace("rank ", "rank&nbsp;").replace("then ", "then&nbsp;")
    return head.replace(", ", ",<br>").replace(" (", "<br>(").replace("… without ", "without<br>")
