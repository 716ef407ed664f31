"""Trace and Frobenius norm of a symmetric matrix that is known by its products with random vectors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from landscape_ray.errors import UserError
from landscape_ray.probes.spectrum.sign_samples import MIN_SAMPLES, SignSamples, error_of_mean, random_signs
from landscape_ray.probes.spectrum.subspace import Subspace, residual_square

Method: TypeAlias = Literal["hutchinson", "hutch++", "xtrace", "auto"]
"""How a trace is estimated; see :func:`stochastic_trace`."""

FIRST_SKETCH = 8
LARGEST_SKETCH = 32
"""Products that method auto keeps, as far as there is room."""

SKETCH_BYTES = 2**30
"""Room for what method auto keeps; six vectors for each product at the worst moment."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TraceResult:
    """Trace and squared Frobenius norm, from the same products.

    Attributes:
        value: the trace; nan if the operator returned something that is not finite.
        standard_error: of the trace; 0 where it is exact. Widened for few samples: as for a normal variable, the truth
            lies within one of them in 68 %.
        frobenius_squared: sum of the squared entries.
        frobenius_squared_error: its standard error, from the spread of the samples alone: rougher.
        num_matvecs: products spent.
        num_samples: random vectors whose mean the trace is.
        converged: the standard error met the tolerance.
        route: hutchinson, hutch++, xtrace, or columns (every column of a small matrix).
    """

    value: float
    standard_error: float
    frobenius_squared: float
    frobenius_squared_error: float
    num_matvecs: int
    num_samples: int
    converged: bool
    route: str


def stochastic_trace(
    matvec: Callable[[Tensor], Tensor],
    size: int,
    *,
    method: Method = "auto",
    tol: float = 0.05,
    max_matvecs: int = 100,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TraceResult:
    """Return the trace of a symmetric matrix A to a relative standard error, with its squared Frobenius norm.

    Methods:
        hutchinson: the mean of v'Av over random signs v. A sample has the variance 2 (||A||_F^2 - sum_i A_ii^2), which
            is estimated element by element (:class:`SignSamples`), so that three samples can be enough, honestly.
            Memory: three vectors.
        hutch++: the trace on a subspace Q that random products span, exactly, and Hutchinson on the rest,
            (I - QQ')A(I - QQ'). The subspace grows until sampling the rest is expected to cost no more than it did, or
            to a third of max_matvecs. Memory: six vectors for each of its dimensions.
        xtrace: as before, but each random vector is the sample for the subspace that the others span. Doubled until the
            error is met. The random signs are not rescaled as in the paper, which matters only for subspaces of nearly
            all dimensions. Memory: three vectors for each product.
        auto: Hutchinson, with the products of the first 8 to 32 samples kept, as far as a gibibyte takes them (32 up to
            1.4 million rows in float32, none above 5.6 million). They predict, at no further product, what each way
            would still cost: going on; turning the kept ones into xtrace; or that and then hutch++. On neural networks
            the latter two win where outliers dominate ||A||_F. Where it is cheaper than either to read off all columns,
            exactly, that is done.

    A matrix of up to 8 rows is read off column by column by all methods but the first.

    Args:
        matvec: `A v` for v of shape (size,).
        size: number of rows, >= 1.
        method: see above.
        tol: standard error to reach, relative to the trace, > 0. A trace near zero never reaches it.
        max_matvecs: most products, >= 2; for hutch++ and xtrace >= 8.
        seed: of the random signs.
        dtype: of the vectors.
        device: of the vectors.

    Raises:
        UserError: an argument out of its range.

    References:
        Hutchinson, A stochastic estimator of the trace of the influence matrix, Comm. Stat. Sim. 19(2), 1990.
        Meyer, Musco, Musco and Woodruff, Hutch++, 2021, arXiv:2010.09649; adaptive: Persson, Cortinovis and Kressner,
        2022, arXiv:2109.10659.
        Epperly, Tropp and Webber, XTrace, 2024, arXiv:2301.07825.

    >>> diagonal = torch.tensor([-9.0, 1.0, 2.0, 4.0])  # random signs have no variance here
    >>> stochastic_trace(lambda v: diagonal * v, 4, method="hutchinson").value
    -2.0
    """
    _check(size, method, tol, max_matvecs)
    run = _Run(matvec, size, tol, max_matvecs, seed, dtype, torch.device(device))
    if method != "hutchinson" and size <= min(FIRST_SKETCH, max_matvecs):
        return run.columns()
    if method == "xtrace":
        return run.xtrace()
    return run.sample(method)


class _Run:
    """One estimation: what was asked for, and what was drawn and spent so far."""

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        size: int,
        tol: float,
        max_matvecs: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.matvec, self.size, self.tol, self.max_matvecs = matvec, size, tol, max_matvecs
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)
        self.num_matvecs = 0

    @property
    def left(self) -> int:
        return self.max_matvecs - self.num_matvecs

    @property
    def room(self) -> int:
        """Products that method auto may keep."""
        return min(LARGEST_SKETCH, SKETCH_BYTES // (6 * self.size * self.dtype.itemsize))

    def product(self, vector: Tensor) -> Tensor:
        self.num_matvecs += 1
        return self.matvec(vector)

    def draw(self) -> Tensor:
        return random_signs(self.size, self.generator, self.dtype, self.device)

    def result(self, value: float, error: float, squares: Sequence[float], num_samples: int, route: str) -> TraceResult:
        """Return the result, with the Frobenius norm as the mean of `squares`."""
        mean = sum(squares) / len(squares)
        return TraceResult(
            value=value,
            standard_error=error,
            frobenius_squared=mean,
            frobenius_squared_error=error_of_mean(squares),
            num_matvecs=self.num_matvecs,
            num_samples=num_samples,
            converged=error <= self.tol * abs(value),
            route=route,
        )

    def reached(self, samples: SignSamples, known: float = 0.0) -> bool:
        """Return whether the samples are exact enough for their mean plus what is known."""
        return len(samples.forms) >= MIN_SAMPLES and samples.standard_error <= self.tol * abs(known + samples.trace)

    def columns(self) -> TraceResult:
        """Return the exact result."""
        unit = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        diagonal, squares = [], []
        for i in range(self.size):
            unit[i] = 1
            column = self.product(unit)
            unit[i] = 0
            diagonal.append(float(column[i]))
            squares.append(_square(column))
        return dataclasses.replace(
            self.result(sum(diagonal), 0.0, [sum(squares)] * 2, self.size, "columns"), converged=True
        )

    # Hutchinson, and hutch++ begun by it

    def sample(self, method: Method) -> TraceResult:
        """Return the result of Hutchinson's samples, or of what they were found to be the better beginning of."""
        samples, squares = SignSamples(), list[float]()
        vectors, products = list[Tensor](), list[Tensor]()
        sketching = method == "hutch++" or (method == "auto" and self.room >= FIRST_SKETCH)
        checkpoint = FIRST_SKETCH if method == "auto" else 2
        while self.left > 0 and samples.finite:
            if method != "hutch++" and self.reached(samples):
                break
            signs = self.draw()
            product = self.product(signs)
            samples.add(signs, product)
            squares.append(_square(product))
            if sketching:
                vectors.append(signs)
                products.append(product)
            if sketching and len(vectors) == checkpoint:
                step = self.next_step(samples, products, method)
                if step == "columns":
                    return self.columns()
                if step == "project":
                    return self.project(vectors, products, method)
                if step == "sample":
                    sketching = False
                    vectors.clear()
                    products.clear()
                checkpoint *= 2
        return self.result(samples.trace, samples.standard_error, squares, len(samples.forms), "hutchinson")

    def next_step(
        self, samples: SignSamples, products: list[Tensor], method: Method
    ) -> Literal["columns", "project", "sample", "sketch"]:
        """Return what is expected to reach the tolerance at the least cost, or the least error where nothing does."""
        k, left = len(products), self.left
        wanted = self.tol * samples.trace
        target = max(wanted * wanted, torch.finfo(torch.float64).tiny)
        rest = 2 * residual_square(products)
        on, rest_samples = samples.variance / target - k, max(rest / target, MIN_SAMPLES)
        may_grow = 4 * k <= min(left + k, self.size) and (method == "hutch++" or 2 * k <= self.room)
        if method == "hutch++":
            return "sketch" if rest_samples > 2 * k and may_grow and 6 * k <= self.max_matvecs else "project"
        projected = k if rest_samples <= k else k + rest_samples
        if self.size <= min(on, projected, left):
            return "columns"
        if may_grow and min(on, rest_samples) > k:
            return "sketch"
        if min(on, projected) <= left:
            return "sample" if on <= projected else "project"
        return "project" if left > k and rest / (left - k) < samples.variance / (left + k) else "sample"

    def project(self, vectors: list[Tensor], products: list[Tensor], method: Method) -> TraceResult:
        """Return the result of the subspace that the products span: xtrace if that is good enough, else hutch++."""
        squares = [_square(product) for product in products]
        sketch, drawn = torch.stack(products), torch.stack(vectors)
        vectors.clear()
        products.clear()
        space = Subspace(self.product, sketch[0])
        space.extend(sketch)
        exchanged: TraceResult | None = None
        if method == "auto":
            value, error = space.leave_one_out(drawn, sketch)
            exchanged = self.result(value, error, squares, len(sketch), "xtrace")
            if exchanged.converged or self.left < 2:
                return exchanged
        del sketch, drawn

        samples, squares = SignSamples(), []
        inside, seen = float(space.matrix.trace()), space.seen
        while self.left > 0 and samples.finite:
            if self.reached(samples, inside):
                break
            signs = self.draw()
            product = self.product(space.without(signs))
            squares.append(seen + _square(product))
            samples.add(signs, space.without(product))
        found = self.result(inside + samples.trace, samples.standard_error, squares, len(samples.forms), "hutch++")
        if exchanged is not None and exchanged.standard_error < found.standard_error:
            return dataclasses.replace(exchanged, num_matvecs=self.num_matvecs)
        return found

    def xtrace(self) -> TraceResult:
        """Return the result of xtrace alone."""
        space = Subspace(self.product, torch.empty(self.size, dtype=self.dtype, device=self.device))
        vectors, products = list[Tensor](), list[Tensor]()
        most = min(self.max_matvecs // 2, self.size)
        while True:
            wanted = min(max(4, 2 * len(vectors)), most)
            fresh = [self.draw() for _ in range(wanted - len(vectors))]
            vectors += fresh
            products += [self.product(v) for v in fresh]
            space.extend(torch.stack(products[-len(fresh) :]))
            value, error = space.leave_one_out(torch.stack(vectors), torch.stack(products))
            done = error <= self.tol * abs(value) or not math.isfinite(value)
            if done or len(vectors) == most:
                squares = [_square(product) for product in products]
                return self.result(value, error, squares, len(vectors), "xtrace")


def _square(vector: Tensor) -> float:
    length = float(torch.linalg.vector_norm(vector))
    return length * length  # where ** would raise what overflows


def _check(size: int, method: str, tol: float, max_matvecs: int) -> None:
    if size < 1:
        raise UserError(f"size must be at least 1, got {size}")
    check_settings(method, tol, max_matvecs)


def check_settings(method: str, tol: float, max_matvecs: int) -> None:
    """Check what the caller of a trace chooses.

    Raises:
        UserError: something is out of its range.
    """
    if method not in get_args(Method):
        raise UserError(f"method must be one of {', '.join(get_args(Method))}, got '{method}'; auto suits all")
    if not (math.isfinite(tol) and tol > 0):
        raise UserError(f"tol must be positive and finite, got {tol}; 0.05 is a relative standard error of 5 percent")
    least = 8 if method in ("hutch++", "xtrace") else 2
    if max_matvecs < least:
        raise UserError(f"max_matvecs must be at least {least} for method {method}, got {max_matvecs}; 100 is usual")
