"""What every probe returns: a number, how far it can be trusted, and what it cost."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One measurement.

    Attributes:
        value: the estimate; nan where weights or loss are not finite.
        standard_error: how far off the value may be; 0 where it is exact up to rounding. A standard error for probes
            that sample. For an eigenvalue by Lanczos, which samples nothing, it is the residual `||H v - value v||`:
            some eigenvalue of H lies within that distance of the value. That it is the wanted one is not in the bound.
            The true error is usually far smaller, about residual^2 / gap.
        num_matvecs: products with a curvature matrix spent, checks included.
        price_gradients: what was spent, in gradients (forward and backward) on the batches of the probe; of several
            estimates from one measurement, the first bears it all.
        cost_seconds: wall-clock seconds, everything included; likewise.
        converged: whether the requested accuracy was reached.
        route: which way the value was found, where there is a choice; "" where there is none.
        vector: the eigenvector that belongs to the value, flat over the trainable parameters; None where there is none.
    """

    value: float
    standard_error: float = 0.0
    num_matvecs: int = 0
    price_gradients: float = 0.0
    cost_seconds: float = 0.0
    converged: bool = True
    route: str = ""
    vector: Tensor | None = dataclasses.field(default=None, repr=False, compare=False)


UNKNOWN = Estimate(value=math.nan, standard_error=math.nan, converged=False)
"""Of what could not be measured."""
