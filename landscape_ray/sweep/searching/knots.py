"""Whole shapes of schedules as domains: a curve that falls, by coordinates that may be chosen one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYS = ("monotone_knots", "warmup", "when")
DEFAULT_WARMUP = [0.0, 0.1]
MAX_KNOTS = 32


def is_knots(entry: Any) -> bool:
    """Return whether an entry of [space] stands for the knots of a curve."""
    return isinstance(entry, Mapping) and "monotone_knots" in entry


def expand(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the domains that an entry of knots stands for; see `landscape_ray.schedules.monotone_points`.

    Args:
        name: of the entry, `schedule.points`.
        entry: `monotone_knots` (how many), optionally `warmup` ([low, high], shares of the run) and `when`.

    Raises:
        ValueError: not such an entry, or not of points.

    >>> list(expand("schedule.points", {"monotone_knots": 2}))
    ['schedule.points.warmup', 'schedule.points.ratio_1', 'schedule.points.ratio_2']
    """
    if name.rpartition(".")[2] != "points":
        raise ValueError(
            f"space.{name} cannot have monotone_knots, which are points of a schedule; 'schedule.points' can"
        )
    if unknown := [key for key in entry if key not in KEYS]:
        raise ValueError(f"space.{name} with monotone_knots must have {', '.join(KEYS)}, got '{unknown[0]}'; remove it")
    number = entry["monotone_knots"]
    if type(number) is not int or not 1 <= number <= MAX_KNOTS:
        raise ValueError(f"space.{name}.monotone_knots must be a whole number from 1 to {MAX_KNOTS}, got {number!r}")
    when = {"when": entry["when"]} if "when" in entry else {}
    ratios = {f"{name}.ratio_{k}": {"uniform": [0.0, 1.0], **when} for k in range(1, number + 1)}
    return {f"{name}.warmup": {"uniform": entry.get("warmup", DEFAULT_WARMUP), **when}, **ratios}
