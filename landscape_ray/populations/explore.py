"""The explore step of population-based training: new values near those of the member that was copied.

References:
    Jaderberg et al. 2017, arXiv 1711.09846, section 3: perturb by a factor, or resample from the prior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from landscape_ray.domains import Domain, Value


class Explorer(Protocol):
    """Where copies get their values from, in place of a perturbation."""

    def explore(self, values: dict[str, Value]) -> dict[str, Value]:
        """Return the values that a copy goes on with, inside their domains, given those of its donor."""

    def learn(self, values: dict[str, Value], rate: float) -> None:
        """Take note how fast the logarithm of the loss fell under these values; nan where the run diverged.

        Rates are for the whole horizon: a tenth of it at rate 1 makes a loss smaller by a factor exp(-.1).
        """

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later values depend on, JSON-able."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""


def explore(
    values: dict[str, Value],
    space: dict[str, Domain],
    generator: np.random.Generator,
    *,
    factors: Sequence[float],
    resample_probability: float,
) -> dict[str, Value]:
    """Return mutated values that lie inside their domains.

    A numeric value is multiplied by one of `factors` and clipped to its domain, an integer moving by at least one; a
    choice moves to a neighbour. With `resample_probability`, a value is instead drawn anew from its domain. Values
    without a domain stay.

    Args:
        values: the donor's values.
        space: domains by name.
        generator: source of the draws; advanced.
        factors: perturbation factors, such as (0.8, 1.25).
        resample_probability: in [0, 1], for each value on its own.
    """
    mutated = dict(values)
    for name in sorted(space.keys() & values.keys()):  # one order, so that one seed gives one history
        domain, value = space[name], values[name]
        resample, direction, position = generator.random(3)
        if resample < resample_probability:
            mutated[name] = domain.at(position)
        elif domain.choices is not None:
            index = domain.choices.index(value) + (1 if direction < 0.5 else -1)
            mutated[name] = domain.choices[min(max(index, 0), len(domain.choices) - 1)]
        else:
            factor = factors[min(int(direction * len(factors)), len(factors) - 1)]
            mutated[name] = domain.clip(_multiplied(float(value), factor, whole=domain.integers is not None))
    return mutated


def _multiplied(value: float, factor: float, *, whole: bool) -> float:
    """Return value * factor; a whole number moves by at least one, so that rounding cannot undo the mutation.

    >>> _multiplied(2.0, 0.8, whole=True), _multiplied(2.0, 1.25, whole=True), _multiplied(2.0, 1.25, whole=False)
    (1.0, 3.0, 2.5)
    """
    moved = value * factor
    if not whole or factor == 1:
        return moved
    upwards = (factor > 1) == (value >= 0)
    return max(moved, value + 1) if upwards else min(moved, value - 1)


def position(domain: Domain, value: Value) -> float:
    """Return where in [0, 1] of its domain a value lies: the middle of what `Domain.at` maps to it.

    >>> position(Domain(log_uniform=[1e-4, 1e-2]), 1e-3), position(Domain(choices=["a", "b"]), "b")
    (0.5, 0.75)
    """
    if domain.choices is not None:
        return (domain.choices.index(value) + 0.5) / len(domain.choices)
    (low, high), number = domain.bounds, float(value)
    if domain.integers is not None:
        return (number - low + 0.5) / (high - low + 1)
    share = math.log(number / low) / math.log(high / low) if domain.log_uniform else (number - low) / (high - low)
    return min(max(share, 0.0), 1.0)


def initial_members(
    space: dict[str, Domain], num_members: int, generator: np.random.Generator
) -> list[dict[str, Value]]:
    """Return starting values of each member: a Latin hypercube, so that every domain is covered evenly.

    >>> space = {"lr": Domain(log_uniform=[1e-4, 1e-2])}
    >>> members = initial_members(space, 4, np.random.default_rng(0))
    >>> sorted(int(4 * np.log(m["lr"] / 1e-4) / np.log(100)) for m in members)
    [0, 1, 2, 3]
    """
    columns = {
        name: (generator.permutation(num_members) + generator.random(num_members)) / num_members
        for name in sorted(space)
    }
    return [{name: space[name].at(float(columns[name][i])) for name in space} for i in range(num_members)]
