"""What the paper leaves open, or says otherwise than we do, and no setting of ours changes.

For the sweep that the default is chosen by: each is a change of ``balanced`` while it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...lora2_core import adaptive_rank
from ...lora2_core.adapters import budget as rank_budget
from ...lora2_core.adapters.network import AdaptiveRankNetwork

_START_RANK = 9.0  # of the run that "Λ over f₁ at the start" is for


@contextmanager
def applied(name: str) -> Iterator[None]:
    """Within it the change of that name; the empty name changes nothing."""
    if not name:
        yield
        return
    with CHANGES[name]():
        yield


def _importance(scale: Callable[[Tensor], Tensor]) -> Any:
    """Λ = e^{−ν(j−1)} times a scale that depends on ν."""

    def importance_at(nu: Tensor, position: Tensor, mode: str = "paper") -> Tensor:
        return torch.exp(-nu * (position - 1)) * scale(nu)

    return lambda: mock.patch.object(adaptive_rank, "importance_at", importance_at)


def _first(nu: Tensor) -> Tensor:
    return torch.exp(-nu) * -torch.expm1(-nu)  # f(1; ν)


_AT_START = torch.tensor(adaptive_rank.nu_for_rank(_START_RANK, 0.9))


def _parameter(to_nu: Callable[[Tensor], Tensor], from_nu: Callable[[Tensor], Tensor]) -> Any:
    """ν learnt as another function of its parameter than exp."""
    original = AdaptiveRankNetwork.__init__

    def begin(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        self.log_nu = nn.Parameter(from_nu(self.log_nu.detach().exp()))
        low, high = (from_nu(bound.exp()) for bound in self._log_nu_bounds)
        self._log_nu_bounds = low, high

    @contextmanager
    def change() -> Iterator[None]:
        nu = property(lambda self: to_nu(self.log_nu))
        with (
            mock.patch.object(AdaptiveRankNetwork, "__init__", begin),
            mock.patch.object(AdaptiveRankNetwork, "nu", nu),
        ):
            yield

    return change


@contextmanager
def _papers_start() -> Iterator[None]:
    """A ~ N(0, √2/√Σ Λ²), the paper's rule with our Λ in the place of its f."""
    original = adaptive_rank.init_std

    def init_std(nu: Tensor, rank: int | Tensor) -> Tensor:
        return original(nu, rank) * _first(nu.double()).float()

    with (
        mock.patch.object(adaptive_rank, "init_std", init_std),
        mock.patch.object(AdaptiveRankNetwork, "_down_std", lambda self, std: float(std)),
    ):
        yield


def _headroom(times: float) -> Any:
    return lambda: mock.patch.object(rank_budget, "HEADROOM", times)


CHANGES: dict[str, Callable[[], Any]] = {
    "Λ = f": _importance(_first),
    "Λ = f/f₁ at the start": _importance(lambda nu: _first(nu) / _first(_AT_START)),
    "ΣΛ = 1": _importance(lambda nu: -torch.expm1(-nu)),
    "ΣΛ² = 1": _importance(lambda nu: (-torch.expm1(-2 * nu)).sqrt()),
    "ν itself": _parameter(lambda nu: nu, lambda nu: nu),
    "ν = softplus": _parameter(F.softplus, lambda nu: torch.log(torch.expm1(nu))),
    "A as in the paper": _papers_start,
    **{f"room × {times:g}": _headroom(times) for times in (1.25, 1.5, 2.0, 3.0, 4.0)},
}
