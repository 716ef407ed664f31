"""What a fit minimises, as an explicit choice: it is part of the result."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeAlias

import numpy as np

from landscape_ray.errors import UserError

Name: TypeAlias = Literal["huber", "least_absolute", "least_squares"]

LAD_DELTA = 4.7e-9
"""A Huber threshold so far below any residual that the fit is one of least absolute deviations; it is the one of the
replication of Hoffmann et al. by Besiroglu et al. 2024 (arXiv 2404.10102), whose digits it reproduces."""


@dataclasses.dataclass(frozen=True, slots=True)
class Objective:
    """The sum over points of huber(residual), of the logarithm or raw as the law says.

    Attributes:
        name: huber; least_absolute; least_squares.
        delta: threshold of huber, in units of the residual, > 0.
    """

    name: Name = "huber"
    delta: float = 1e-3

    def __post_init__(self) -> None:
        if self.name not in ("huber", "least_absolute", "least_squares"):
            raise UserError(
                f"objective must be one of huber, least_absolute, least_squares, got '{self.name}'; huber is usual"
            )
        if not self.delta > 0:
            raise UserError(f"huber_delta must be > 0, got {self.delta}; 1e-3 is usual, inf is least squares")

    @property
    def threshold(self) -> float:
        """The Huber threshold that stands for it."""
        if self.name == "least_absolute":
            return LAD_DELTA
        return self.delta if self.name == "huber" else math.inf

    def value(self, objective: float) -> float:
        """Return the sum in the objective's own scale: of |r| for least absolute deviations."""
        return objective / LAD_DELTA if self.name == "least_absolute" else objective

    @classmethod
    def of(cls, name: str, delta: float = 1e-3) -> Objective:
        """Return the objective of a name; huber with an infinite threshold is least squares."""
        if name == "huber" and np.isposinf(delta):
            return cls("least_squares")
        return cls(name, delta)  # type: ignore[arg-type]  # checked on construction
