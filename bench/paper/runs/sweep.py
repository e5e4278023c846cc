"""The choices that the paper leaves open and a setting has, each tried alone.

On subjects that are in no table. Some more were tried once, by changes of the code: docs/method.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..methods import Method
from ..records import results
from ..records.results import Result, likeness, prompt


def variants(balanced: Method) -> dict[str, Method]:
    """``balanced`` with its budget in ranks, and with one thing changed each, by name."""

    def ranks(**settings: Any) -> Method:
        return replace(balanced, rank={**balanced.rank, **settings})

    found: dict[str, tuple[str, Method]] = {
        "as-it-is": ("as it is", balanced),
        "quantile-0.5": ("q = 0.5", ranks(quantile=0.5)),
        "nu-rate-0.04": ("ν's rate 0.04", ranks(rank_learning_rate=4e-2)),
        "nu-rate-0.01": ("ν's rate 0.01", ranks(rank_learning_rate=1e-2)),
        "start-maximum": ("start at the maximum", ranks(start="maximum")),
        "entropy-0": ("λ_e = 0", replace(balanced, entropy=0.0)),
        "entropy-0.001": ("λ_e = 0.001", replace(balanced, entropy=1e-3)),
        "half-frozen": ("ν held for half of the run", ranks(freeze_fraction=0.5)),
        "quantile-0.99": ("q = 0.99", ranks(quantile=0.99)),
        "random-growth": ("new columns of B random", ranks(growth="random")),
        "no-hysteresis": ("no hysteresis", ranks(hysteresis=False)),
        "kappa-high": ("κ starts tenfold", ranks(rank_weight=5e-2)),
        "kappa-low": ("κ starts at a tenth", ranks(rank_weight=5e-4)),
        "entropy-0.01": ("λ_e = 0.01", replace(balanced, entropy=1e-2)),
        "never-frozen": ("ν free to the end", ranks(freeze_fraction=0.0)),
        "nu-rate-0.005": ("ν's rate 0.005", ranks(rank_learning_rate=5e-3)),
        "nu-rate-0.08": ("ν's rate 0.08", ranks(rank_learning_rate=8e-2)),
        "target-4.5": ("target 4.5", ranks(target_rank=4.5)),
        "target-18": ("target 18", ranks(target_rank=18.0)),
    }
    named = {name: replace(method, label=label) for name, (label, method) in found.items()}
    return named | _weaker(next(iter(named)))


def _weaker(of: str) -> dict[str, Method]:
    """What ``of`` has trained, at smaller strengths: given ones, and by the rule."""
    given = {f"strength-{at:g}": ("strength", {"strength": at}) for at in (0.9, 0.8, 0.7, 0.6)}
    ruled = {f"kept-{of:g}": ("gain kept", {"kept": of}) for of in (0.99, 0.98, 0.96, 0.94, 0.9)}
    return {
        name: Method(f"{word} {next(iter(how.values())):g}", "cut", mode="strength", of=of, **how)
        for name, (word, how) in {**given, **ruled}.items()
    }


def table(found: Sequence[Result], known: Mapping[str, Method]) -> str:
    """Markdown: a row a variant, by likeness, with the difference to ``balanced`` as it is."""
    plain = next(iter(known))
    rows: list[tuple[float, str]] = []
    for name, method in known.items():
        scores = results.by_subject(found, name, likeness)
        if not scores:
            continue
        obeyed, sizes = (
            statistics.fmean(results.by_subject(found, name, value).values())
            for value in (prompt, lambda one: one.nbytes)
        )
        gap = results.paired(found, plain, name, likeness)
        told = f"{gap.mean:+.3f}" if gap and name != plain else ""
        mean = statistics.fmean(scores.values())
        row = f"| {method.label} | {mean:.3f} | {told} | {obeyed:.3f} | {sizes / 1e6:.2f} |"
        rows.append((-mean, row))
    heads = "| variant | likeness | difference | prompt | MB |"
    return "\n".join([heads, "| --- | --- | --- | --- | --- |", *(row for _, row in sorted(rows))])
