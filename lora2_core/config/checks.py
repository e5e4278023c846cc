"""Checks of settings: each names the setting, its value, the valid range and the fix."""

from __future__ import annotations

import math


class ConfigError(ValueError):
    """A setting is out of range; the message names it, its value, the range and the fix."""


def number(name: str, value: object, low: float, high: float, fix: str) -> None:
    """A finite number from ``low`` to ``high``, both included."""
    found = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(found) and low <= found <= high):
        upper = f"to {high:g}" if math.isfinite(high) else "or more"
        raise ConfigError(f"{name} is {value!r}; it must be a number from {low:g} {upper}: {fix}.")


def whole(name: str, value: object, low: int, high: int, fix: str) -> None:
    """A whole number from ``low`` to ``high``, both included."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(
            f"{name} is {value!r}; it must be a whole number from {low} to {high}: {fix}."
        )


def choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    """One of the ``valid`` texts."""
    if value not in valid:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(valid)}.")


def is_a(name: str, value: object, kind: type) -> None:
    """An instance of ``kind``."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r}; it must be a {kind.__name__}: leave it out.")
