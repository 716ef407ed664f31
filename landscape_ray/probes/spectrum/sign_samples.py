"""Quadratic forms of random signs, and what they tell about their own error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MIN_SAMPLES = 3
"""Fewer are not believed. With three, one standard error covers the truth in 68 % for all spectra that were tried,
where the number is fixed; in about 60 % where they stop by themselves at a tolerance of 20 % on a single outlier."""


def student(degrees: float) -> float:
    """Return by how much a standard error must be widened to cover 68.3 %, where so many degrees of freedom gave it.

    The quantile of Student's t at one standard deviation, by its expansion in 1/degrees: 2 % short at degrees = 1.

    >>> round(student(4), 3)
    1.142
    """
    return 1 + 0.5 / degrees + 0.25 / degrees**2 + 0.0625 / degrees**3


def random_signs(size: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a vector of signs, the same on every device: those of the bits of random words.

    Drawing each sign by itself takes five times as long on a processor, and eight times as much goes to a device.
    """
    words = torch.randint(-(2**63), 2**63 - 1, (-(-size // 64),), generator=generator)
    octets = words.view(torch.uint8).to(device, torch.int32)
    return SIGNS_OF_BYTES.to(device, dtype).index_select(0, octets).view(-1)[:size]


SIGNS_OF_BYTES = (2 * (torch.arange(256)[:, None] >> torch.arange(8) & 1) - 1).to(torch.int8)
"""Row i holds the bits of i as signs, (256, 8)."""


def error_of_mean(values: Sequence[float]) -> float:
    """Return the standard error of the mean from the spread of the values, widened; nan from fewer than two."""
    n = len(values)
    if n < 2:
        return math.nan
    return student(n - 1) * float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(n)


class SignSamples:
    """Quadratic forms v'Bv of random signs v, and the error of their mean.

    The elements of d = v * (B v) have the diagonal of B as their mean. For a symmetric B the variance of their sum,
    the sample, is twice the sum of their variances: entry B_ij makes d_i and d_j vary, both the same way. That is an
    average over all elements, and known after two products better than a spread of sums is after ten.

    Attributes:
        forms: the samples.
        mean: of d, (size,): the diagonal.
        deviations: sum of the squared deviations of d from its mean, (size,), if asked for.
    """

    def __init__(self, *, elementwise: bool = False) -> None:
        self.forms: list[float] = []
        self.mean: Tensor | None = None
        self.deviations: Tensor | None = None
        self.elementwise = elementwise
        self._spread = 0.0

    def add(self, signs: Tensor, product: Tensor) -> None:
        """Take in signs v and product B v, each (size,)."""
        terms = signs * product
        self.forms.append(float(terms.sum(dtype=torch.float64)))
        if self.mean is None:
            self.mean = terms
            self.deviations = torch.zeros_like(terms) if self.elementwise else None
            return
        before = terms - self.mean
        self.mean.add_(before, alpha=1 / len(self.forms))
        after = terms.sub_(self.mean)
        self._spread += float(before @ after)
        if self.deviations is not None:
            self.deviations.addcmul_(before, after)

    @property
    def finite(self) -> bool:
        """Whether the last sample is."""
        return not self.forms or math.isfinite(self.forms[-1])

    @property
    def trace(self) -> float:
        """The mean of the samples."""
        return sum(self.forms) / len(self.forms)

    @property
    def variance(self) -> float:
        """Of one sample; nan from fewer than two."""
        n = len(self.forms)
        return 2 * max(self._spread, 0.0) / (n - 1) if n > 1 else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean; nan from fewer than two samples."""
        n = len(self.forms)
        return student(n - 1) * math.sqrt(self.variance / n) if n > 1 else math.nan
