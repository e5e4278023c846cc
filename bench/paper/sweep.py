"""The choices that the paper leaves open, each tried alone on subjects that are in no table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import results, verdict
from .methods import Method
from .results import Result

MEGABYTES = 0.625  # of a file of the demo base with rank 9 in every layer


def variants(balanced: Method) -> dict[str, Method]:
    """``balanced`` with its budget in ranks, and with one thing changed each, by name."""

    def ranks(**settings: Any) -> Method:
        return replace(balanced, rank={**balanced.rank, **settings})

    def room(times: float) -> tuple[str, Method]:
        sized = {key: value for key, value in balanced.rank.items() if key != "target_rank"}
        method = replace(
            balanced, rank={**sized, "target_megabytes": MEGABYTES}, change=f"room × {times:g}"
        )
        return f"trained at {times:g} × the ranks, then one SVD", method

    def changed(change: str, **settings: Any) -> Method:
        return replace(ranks(**settings), change=change)

    found: dict[str, tuple[str, Method]] = {
        "as-it-is": ("as it is", balanced),
        "svd-2": room(2),
        "scale-f": ("Λ = f, as in the paper", changed("Λ = f")),
        "quantile-0.5": ("q = 0.5", ranks(quantile=0.5)),
        "scale-square": ("ΣΛ² = 1", changed("ΣΛ² = 1")),
        "nu-rate-0.04": ("ν's rate 0.04", ranks(rank_learning_rate=4e-2)),
        "svd-3": room(3),
        "nu-rate-0.01": ("ν's rate 0.01", ranks(rank_learning_rate=1e-2)),
        "start-maximum": ("start at the maximum", ranks(start="maximum")),
        "scale-at-start": ("Λ = f/f₁ with ν of the start", changed("Λ = f/f₁ at the start")),
        "scale-sum": ("ΣΛ = 1", changed("ΣΛ = 1")),
        "entropy-0": ("λ_e = 0", replace(balanced, entropy=0.0)),
        "entropy-0.001": ("λ_e = 0.001", replace(balanced, entropy=1e-3)),
        "half-frozen": ("ν held for half of the run", ranks(freeze_fraction=0.5)),
        "softplus": ("ν = softplus of what is learnt", changed("ν = softplus")),
        # Whose steps are not in proportion to ν: at its own best rate on the toy of method 2.
        "plain-nu": ("ν learnt itself, rate 0.002", changed("ν itself", rank_learning_rate=2e-3)),
        "start-of-a": ("A as in 3.3.1, for our Λ", changed("A as in the paper")),
        "quantile-0.99": ("q = 0.99", ranks(quantile=0.99)),
        "random-growth": ("new columns of B random", ranks(growth="random")),
        "no-hysteresis": ("no hysteresis", ranks(hysteresis=False)),
        "kappa-high": ("κ starts tenfold", ranks(rank_weight=5e-2)),
        "kappa-low": ("κ starts at a tenth", ranks(rank_weight=5e-4)),
        "entropy-0.01": ("λ_e = 0.01", replace(balanced, entropy=1e-2)),
        "never-frozen": ("ν free to the end", ranks(freeze_fraction=0.0)),
        "svd-1.25": room(1.25),
        "svd-1.5": room(1.5),
        "nu-rate-0.005": ("ν's rate 0.005", ranks(rank_learning_rate=5e-3)),
        "nu-rate-0.08": ("ν's rate 0.08", ranks(rank_learning_rate=8e-2)),
        "svd-4": room(4),
        "target-4.5": ("target 4.5", ranks(target_rank=4.5)),
        "target-18": ("target 18", ranks(target_rank=18.0)),
    }
    return {name: replace(method, label=label) for name, (label, method) in found.items()}


def table(found: Sequence[Result], known: Mapping[str, Method]) -> str:
    """Markdown: a row a variant, by likeness, with the difference to ``balanced`` as it is."""
    plain = next(iter(known))
    rows: list[tuple[float, str]] = []
    for name, method in known.items():
        likeness = results.by_subject(found, name, verdict.likeness)
        if not likeness:
            continue
        prompt, sizes = (
            statistics.fmean(results.by_subject(found, name, value).values())
            for value in (verdict.prompt, lambda one: one.nbytes)
        )
        gap = results.paired(found, plain, name, verdict.likeness)
        told = f"{gap.mean:+.3f}" if gap and name != plain else ""
        each = ", ".join(f"{value:.2f}" for value in likeness.values())
        mean = statistics.fmean(likeness.values())
        row = (
            f"| {method.label} | {mean:.3f} | {told} | {each} | {prompt:.3f} | {sizes / 1e6:.2f} |"
        )
        rows.append((-mean, row))
    heads = "| variant | likeness | difference | by subject | prompt | MB |"
    return "\n".join(
        [heads, "| --- | --- | --- | --- | --- | --- |", *(row for _, row in sorted(rows))]
    )
