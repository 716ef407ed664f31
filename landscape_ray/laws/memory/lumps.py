"""Sums over all earlier updates, for every point of a curve, without going through all of them.

Laws with memory sum over the past of a run: for a point with forward area T (sum of the learning rate so far),

    sum_k w_k f(q_k, T - P_k),

P_k the area before update k, w_k its weight, q_k something else known of it (the logarithm of its rate), and f smooth
wherever T - P_k > 0. Updates that lie far back compared with how long they last together are replaced by a few of
them: the weights are carried over by polynomial interpolation, so that a long decay of thousands of updates costs some
hundred terms a point, to nine digits or better. Updates whose weight is 0 cost nothing.

References:
    Barnes and Hut 1986 (summing what is far in lumps); Berrut and Trefethen 2004 (barycentric interpolation).
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Index: TypeAlias = NDArray[np.int64]

ORDER = 8
"""Updates that stand for a lump."""

NEARNESS = 1.0
"""A lump may last this many times the area that has passed since its end."""

SMOOTHNESS = 1e-7
"""Largest error of interpolating area (over that of the lump) and q (absolute) in a lump."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lumps:
    """The terms of the sums of several points, one after the other.

    Attributes:
        weight: (t,) of every term.
        q: (t,) of every term.
        age: (t,) T - P of every term.
        first: (n,) where the terms of every point begin; every point has at least one, of weight 0 if need be.
    """

    weight: Array
    q: Array
    age: Array
    first: Index

    def sum(self, values: Array) -> Array:
        """Return the sums (batch, n) of weight times values (batch, t)."""
        return np.asarray(np.add.reduceat(self.weight * values, self.first, axis=-1))

    @classmethod
    def join(cls, parts: list[Lumps]) -> Lumps:
        """Return the lumps of the points of several curves."""
        counts = np.cumsum([0, *(len(part.weight) for part in parts)])
        first = np.concatenate([part.first + start for part, start in zip(parts, counts[:-1], strict=True)])
        weight, q, age = (np.concatenate([getattr(part, name) for part in parts]) for name in ("weight", "q", "age"))
        return cls(weight, q, age, first.astype(np.int64))


def lump(weight: Array, q: Array, place: Array, step: Index, now: Array) -> Lumps:
    """Return the lumps of the points of one curve.

    Args:
        weight: (S,) of every update.
        q: (S,) finite.
        place: (S,) P of every update, not decreasing.
        step: (k,) completed updates at the points, increasing: such a point sees the updates 0 ... step - 1.
        now: (k,) T at the points.
    """
    kept = np.flatnonzero(weight)
    num_seen = np.searchsorted(kept, step)
    weight, q, before = weight[kept], q[kept], place[kept]
    points, terms, weights = [np.arange(len(step))], [np.zeros(len(step), dtype=np.int64)], [np.zeros(len(step))]
    if not len(kept):
        weight, q, before = np.zeros(1), np.zeros(1), place[:1]
    stack = [(0, len(kept), np.arange(len(step)))]
    while stack:
        start, stop, asking = stack.pop()
        asking = asking[num_seen[asking] > start]
        if not len(asking) or start == stop:
            continue
        size = stop - start
        if size <= ORDER:
            seen = num_seen[asking, None] > np.arange(start, stop)
            who, which = np.nonzero(seen)
            points.append(asking[who])
            terms.append(start + which)
            weights.append(weight[start + which])
            continue
        last = before[stop - 1]
        far = (num_seen[asking] >= stop) & (now[asking] - last >= (last - before[start]) / NEARNESS)
        if far.any():
            nodes, matrix = _interpolation(size)
            if _is_smooth(q[start:stop], before[start:stop], nodes, matrix):
                carried = weight[start:stop] @ matrix
                points.append(np.repeat(asking[far], ORDER))
                terms.append(np.tile(start + nodes, int(far.sum())))
                weights.append(np.tile(carried, int(far.sum())))
                asking = asking[~far]
        middle = (start + stop) // 2
        stack += [(start, middle, asking), (middle, stop, asking)]
    point, term = np.concatenate(points), np.concatenate(terms)
    order = np.argsort(point, kind="stable")
    point, term = point[order], term[order]
    return Lumps(
        weight=np.concatenate(weights)[order],
        q=q[term],
        age=np.maximum(now[point] - before[term], 0.0),  # a filler may lie ahead
        first=np.searchsorted(point, np.arange(len(step))),
    )


@lru_cache(maxsize=64)
def _interpolation(size: int) -> tuple[Index, Array]:
    """Return ORDER of `size` places, dense at the ends, and the matrix (size, ORDER) that interpolates from them."""
    nodes = np.round((size - 1) * 0.5 * (1 - np.cos(np.pi * (np.arange(ORDER) + 0.5) / ORDER))).astype(np.int64)
    nodes = (
        np.unique(nodes) if len(np.unique(nodes)) == ORDER else np.round(np.linspace(0, size - 1, ORDER)).astype(int)
    )
    place, x = np.arange(size)[:, None] / size, nodes / size
    apart = x[:, None] - x + np.eye(ORDER)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = 1 / apart.prod(axis=1) / (place - x)
        matrix = terms / terms.sum(axis=1, keepdims=True)
    matrix[nodes] = np.eye(ORDER)
    return nodes.astype(np.int64), matrix


def _is_smooth(q: Array, area: Array, nodes: Index, matrix: Array) -> bool:
    missed = np.abs(matrix @ q[nodes] - q).max()
    span = area[-1] - area[0]
    return bool(
        missed <= SMOOTHNESS
        and np.abs(matrix @ (area[nodes] - area[0]) + area[0] - area).max() <= SMOOTHNESS * max(span, 1e-300)
    )
