"""Functions for columns of laws that overflow when written plainly; analytic, so that complex steps pass through."""

from __future__ import annotations

from typing import Any

import numpy as np


def softplus(z: Any) -> Any:
    """Return log(1 + e^z) without overflow.

    >>> softplus(np.array([-1000.0, 0.0, 1000.0])).round(6).tolist()
    [0.0, 0.693147, 1000.0]
    """
    above = np.real(z) > 0
    return np.where(above, z, 0.0) + np.log1p(np.exp(np.where(above, -z, z)))


def log_sum(a: Any, b: Any) -> Any:
    """Return log(e^a + e^b) without overflow.

    >>> round(float(log_sum(1000.0, 1000.0)), 6)
    1000.693147
    """
    return a + softplus(b - a)
