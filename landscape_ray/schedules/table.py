"""A schedule given as data: the corners of a piecewise linear curve."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

from landscape_ray.errors import UserError

Points: TypeAlias = tuple[tuple[float, float], ...]
"""Corners: pairs of progress (step / num_steps, increasing from 0 to 1) and height (value / peak, in [0, 1])."""


def check_points(points: Points) -> None:
    """Check the corners of a table.

    Raises:
        UserError: fewer than two points, a point that is not a pair of numbers, progress that does not increase from
            0 to 1, or a height outside [0, 1].
    """
    if len(points) < 2 or not all(_is_pair(point) for point in points):
        raise UserError(
            f"points must be two or more pairs of progress and height, got {_short(points)}; "
            "`landscape-ray refine` prints those of a run"
        )
    progress = [point[0] for point in points]
    rises = all(before < after for before, after in pairwise(progress))
    if not (rises and progress[0] == 0 and progress[-1] == 1):
        raise UserError(
            f"points must have progress that increases from 0 to 1, got {_short(progress)}; "
            "progress is the step over the number of steps"
        )
    for place, (_, height) in enumerate(points):
        if not 0 <= height <= 1:
            raise UserError(
                f"points must have heights in [0, 1], got {height} at position {place}; "
                "a height is the value over the peak"
            )


START_HEIGHT = 0.1
"""Height at which a warm-up of :func:`monotone_points` begins."""


def monotone_points(ratios: Sequence[float], warmup: float = 0.0) -> Points:
    """Return the corners of a curve that falls from the peak, made of coordinates that may be chosen freely.

    After a straight rise over the share `warmup` of the run, knots at even distances up to its end; each is as high as
    the one before times its ratio. Every curve that never rises has such coordinates, whatever they are none rises, and
    none needs to know another's: what a search of shapes wants.

    Args:
        ratios: height of each knot over that of the one before, in [0, 1]; at least one.
        warmup: share of the run before the peak, in [0, 1).

    Raises:
        UserError: no ratio, or one outside its range.

    >>> monotone_points([0.5, 0.5])
    ((0.0, 1.0), (0.5, 0.5), (1.0, 0.25))
    """
    if not ratios or not all(0 <= ratio <= 1 for ratio in ratios):
        raise UserError(f"points must have ratios in [0, 1], at least one, got {list(ratios)}; 1 keeps the height")
    if not 0 <= warmup < 1:
        raise UserError(f"points.warmup must be in [0, 1), got {warmup}; it is a share of the run")
    points = [(0.0, START_HEIGHT), (warmup, 1.0)] if warmup > 0 else [(0.0, 1.0)]
    for place, ratio in enumerate(ratios, start=1):
        progress = 1.0 if place == len(ratios) else warmup + (1 - warmup) * place / len(ratios)
        points.append((progress, points[-1][1] * ratio))
    return tuple(points)


def _is_pair(point: object) -> bool:
    return isinstance(point, tuple) and len(point) == 2 and all(_is_number(value) for value in point)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(values: object) -> str:
    text = repr(values)
    return text if len(text) <= 80 else f"{text[:77]}..."
