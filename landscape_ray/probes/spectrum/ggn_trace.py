"""The trace of the Gauss-Newton matrix, for a fraction of what products with it would cost."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import FORWARD, Batches, FixedLoss, observing
from landscape_ray.probes.gradients.per_example import inputs_and_targets
from landscape_ray.probes.losses import DetailedLoss, Loss, detailed
from landscape_ray.probes.operators.gauss_newton import closed_form_hessian, holds
from landscape_ray.probes.probe import Host, Probe
from landscape_ray.probes.spectrum.ghost_norms import Tape, verified
from landscape_ray.probes.spectrum.sign_samples import random_signs, student

EXACT_AT_ONCE = 7.0
"""What the exact trace may cost, in gradients, to be taken at once: sampling would hardly be cheaper. Sixteen classes
on a multilayer perceptron, seven on most convolutional networks."""

CHUNKS = 8
"""Of each micro-batch, whose gradients are taken apart."""

CHUNK_PRICE = 1.5
"""Of the gradients of all chunks: 1 where a chunk is work enough, 1.8 to 2.5 where the whole gradient takes 10 ms."""


def ggn_trace(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    tol: float = 0.05,
    max_gradients: float = 50.0,
    seed: int = 0,
    eval_mode: bool = True,
) -> Estimate:
    """Return the trace of the Gauss-Newton matrix of the mean loss, by the cheapest route to a relative error.

    With M targets t, Jacobians J_t of the outputs, and a root B_t B_t' of the Hessian of target t's loss over them,

        tr G = 1/M sum_t |J_t' B_t|_F^2 = 1/M sum_(units u) E |sum_(t in u) J_t' B_t s_t|^2

    for independent random signs s_t and any grouping of the targets. For softmax with probabilities p,
    `B = (I - p 1') diag(sqrt p)`, for a gaussian the identity. Sampled labels, y ~ p, have the same expectation; on an
    MLP that fits most digits, theirs was six times the variance over single examples, and twice over the batch. Every
    micro-batch enters with its share. For piecewise linear networks without normalisation this
    is also the trace of the Hessian.

    Routes, all unbiased:
        exact: a backward pass for each column of B, with the norms of single examples from the layers' inputs and
            output gradients (:mod:`landscape_ray.probes.spectrum.ghost_norms`). For one target for each example and
            layers that are known there. Taken with few columns, or where sampling would need more passes.
        examples: the same norms under random signs, one backward pass a sample.
        chunks: gradients of 8 parts of each micro-batch under random signs, for every other network. The parts are
            independent, which takes the variance down to an eighth at best, and tells it after one sample. In train
            mode the parts are the micro-batches.

    The error comes from the spread of the units' samples, each around its own mean; after a single one from their
    spread around the common mean, which is larger.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: a `DetailedLoss` with a likelihood; batches are pairs of tensors, one row for each example.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        tol: standard error to reach, relative to the trace, > 0.
        max_gradients: most to spend, > 0; a single sample is always taken.
        seed: of the random signs.
        eval_mode: measure in eval mode: no dropout, running batch statistics. False keeps the modes of the host.

    Raises:
        UserError: an argument out of its range, a loss without likelihood, or with another one than it says.

    >>> from landscape_ray.probes.losses import OutputLoss
    >>> module = nn.Linear(2, 1, bias=False)
    >>> loss = OutputLoss(lambda outputs, targets: 0.5 * (outputs - targets).square(), "gaussian")
    >>> batch = (torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.zeros(2, 1))
    >>> ggn_trace(module, loss, [batch]).value  # the mean of |x|^2
    7.0
    """
    began = time.perf_counter()
    _check(tol, max_gradients)
    with observing(module, loss, batches, eval_mode=eval_mode) as function:
        found = UNKNOWN
        if function.finite:
            found = measured_ggn_trace(function, tol, max_gradients, seed, check_deterministic=True)
    return dataclasses.replace(
        found, price_gradients=function.spent_gradients, cost_seconds=time.perf_counter() - began
    )


def measured_ggn_trace(
    function: FixedLoss, tol: float, max_gradients: float, seed: int, *, check_deterministic: bool = False
) -> Estimate:
    """Return the trace at finite weights; the cost is counted by `function`."""
    loss = detailed(function.loss, "the trace of the Gauss-Newton matrix")
    if loss.likelihood is None:
        raise UserError(
            "loss.likelihood must be categorical or gaussian for the trace of the Gauss-Newton matrix, got None; "
            "trace(..., curvature='ggn') needs none"
        )
    most = function.spent_gradients + max_gradients
    for batch, _ in function.batches:
        inputs_and_targets(batch)  # whose errors say more than that of a loss
    if check_deterministic:
        function.check_deterministic()
    sampling = GGNTraceSampling(function, loss, seed)

    def estimate(value: float, error: float, route: str) -> Estimate:
        if not math.isfinite(value):
            return UNKNOWN
        return Estimate(value=value, standard_error=error, converged=error <= tol * value, route=route)

    exact_price = sampling.exact_price if function.spent_gradients + sampling.exact_price <= most else math.inf
    if exact_price <= EXACT_AT_ONCE:
        return estimate(sampling.exact(), 0.0, "exact")
    while True:
        sampling.sample()
        value, error = sampling.value_and_error()
        if not error > tol * value or function.spent_gradients + sampling.price > most:
            return estimate(value, error, sampling.route)
        short = error / max(tol * value, 1e-300)
        more = sampling.num * (short * short - 1)
        if sampling.num == 4 and exact_price < more * sampling.price:
            return estimate(sampling.exact(), 0.0, "exact")


class GGNTraceSampling:
    """Samples of the trace, by the norms of single examples where they are to be had, and else by chunks.

    Attributes:
        ghosts: whether norms of single examples are to be had.
        columns: of an exact trace, 0 where that is not to be had.
        price_of_norms: of all examples, once, in gradients; see :class:`Tape`.
    """

    def __init__(self, function: FixedLoss, loss: DetailedLoss, seed: int) -> None:
        """Find out what is known of the module; no sample is taken yet."""
        self.function, self.loss = function, loss
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if there else 0
        self.generator = torch.Generator().manual_seed(seed + 1_000_003 * rank)
        self.pairs: list[tuple[Tensor, Tensor, float]] = [
            (*inputs_and_targets(batch), share) for batch, share in function.batches
        ]
        self.apart = not any(member.training for member in function.module.modules())
        self._samples = _Samples(function)
        self._kept: list[tuple[Tape, Tensor, float]] | None = None
        self._checked = False
        first = self.pairs[0][0]
        known = verified(function, first[:2]) if self.apart else None
        num = sum(len(inputs) for inputs, _, _ in self.pairs)
        norms = known.price if known is not None else 0.0
        sums = torch.tensor([float(known is None), float(num), 1.0, norms], dtype=torch.float64, device=function.device)
        without, num_examples, num_processes, norms = function.reduce(sums).tolist()
        self.ghosts = not without  # the processes must go the same way, and so count the same prices
        # two examples: once together and once alone, or a forward that finds a parameter of an unknown layer
        function.spent_gradients += (4.0 if self.ghosts else 2 * FORWARD) * num_processes / num_examples
        self.price_of_norms: float = norms / num_processes
        self.columns = known.shape[0] if known is not None and self.ghosts and len(known.shape) == 1 else 0

    @property
    def route(self) -> str:
        """How samples are taken: examples or chunks."""
        return "examples" if self.ghosts else "chunks"

    @property
    def num(self) -> int:
        """Samples so far."""
        return self._samples.num

    @property
    def price(self) -> float:
        """Of the next sample, in gradients."""
        if self.ghosts:
            return self.price_of_norms + (0.0 if self.function.single and self._kept is not None else FORWARD)
        return CHUNK_PRICE if self.apart else 1.0

    @property
    def exact_price(self) -> float:
        """Of the exact trace, in gradients; infinite where it is not to be had."""
        return FORWARD + self.columns * self.price_of_norms if self.columns else math.inf

    def value_and_error(self) -> tuple[float, float]:
        """Return the mean of the samples and its standard error, infinite after one sample of a single term."""
        return self._samples.value_and_error()

    def sample(self) -> None:
        """Take one more sample; the cost is counted by the function."""
        function = self.function
        with function.surroundings():
            if self.ghosts:
                terms = []
                for tape, targets, weight in self._tapes():
                    signs = self._draw(tape.outputs)
                    terms.append(weight * tape.squared_norms(self._root(tape.outputs, targets, signs)))
                function.spent_gradients += self.price_of_norms
                self._samples.add(torch.cat(terms))
            else:
                self._samples.add(torch.stack([square for pair in self.pairs for square in self._chunks(*pair)]))
                function.spent_gradients += self.price

    def exact(self) -> float:
        """Return the sum over all columns of the roots."""
        function = self.function
        total = torch.zeros((), dtype=torch.float64, device=function.device)
        with function.surroundings():
            for tape, targets, weight in self._tapes():
                unit = torch.zeros_like(tape.outputs)
                for column in range(unit.shape[-1]):
                    unit.zero_()[..., column] = 1
                    total += weight * tape.squared_norms(self._root(tape.outputs, targets, unit)).sum()
        function.spent_gradients += self.columns * self.price_of_norms
        return float(function.reduce(total))

    def _root(self, outputs: Tensor, targets: Tensor, signs: Tensor) -> Tensor:
        """Return B s for each target, in the shape of the outputs (B, ..., C)."""
        outputs = outputs.detach()
        if not self._checked:
            hessian = closed_form_hessian(self.loss, outputs)
            assert hessian is not None
            if not holds(hessian, self.loss, outputs, targets):
                raise UserError(
                    f"loss.likelihood must be that of the loss, got '{self.loss.likelihood}', whose Hessian in the "
                    "outputs is another; leave out class weights, ignored targets and penalties, halve squared errors"
                )
            self._checked = True
        if self.loss.likelihood == "gaussian":
            return signs
        p = outputs.softmax(-1)
        scaled = p.sqrt() * signs
        return scaled - p * scaled.sum(-1, keepdim=True)

    def _draw(self, outputs: Tensor) -> Tensor:
        return random_signs(outputs.numel(), self.generator, outputs.dtype, outputs.device).view(outputs.shape)

    def _tapes(self) -> Iterator[tuple[Tape, Tensor, float]]:
        """Yield each micro-batch's tape, targets and weight of an example's squared norm; a single one is kept."""
        if self._kept is not None:
            yield from self._kept
            return
        self.function.spent_gradients += FORWARD
        for inputs, targets, share in self.pairs:
            tape = Tape(self.function, inputs)
            found = tape, targets, share * tape.outputs.shape[-1] / tape.outputs.numel()
            if self.function.single:
                self._kept = [found]
            yield found

    def _chunks(self, inputs: Tensor, targets: Tensor, share: float) -> Iterator[Tensor]:
        """Yield the contributions of the parts of one micro-batch."""
        function = self.function
        length = -(-len(inputs) // CHUNKS) if self.apart else len(inputs)
        for part, labels in zip(torch.split(inputs, length), torch.split(targets, length), strict=True):
            function.seed_noise()
            outputs = function.module(part)
            signs = self._draw(outputs)
            gradient = torch.autograd.grad(
                outputs, function.parameters, self._root(outputs, labels, signs), materialize_grads=True
            )
            per_example = outputs.numel() // outputs.shape[-1] // len(part)
            squared = torch.stack([torch.linalg.vector_norm(g).to(torch.float64) ** 2 for g in gradient]).sum()
            yield squared * share / (per_example * len(inputs))


class _Samples:
    """Samples of a sum of independent terms, and the error of their mean.

    Attributes:
        num: samples.
    """

    def __init__(self, function: FixedLoss) -> None:
        self.function, self.num = function, 0
        self._mean = torch.zeros(0)
        self._deviations = torch.zeros(0)

    def add(self, terms: Tensor) -> None:
        """Take in the terms (U,) float64 of one sample."""
        self.num += 1
        if self.num == 1:
            self._mean, self._deviations = terms.clone(), torch.zeros_like(terms)
            return
        before = terms - self._mean
        self._mean += before / self.num
        self._deviations += before * (terms - self._mean)

    def value_and_error(self) -> tuple[float, float]:
        """Return the mean and its standard error, infinite after one sample of a single term."""
        sums = [self._mean.sum(), self._mean.square().sum(), self._mean.new_tensor(float(len(self._mean)))]
        if self.num > 1:
            variances = self._deviations / ((self.num - 1) * self.num)
            sums += [variances.sum(), variances.square().sum()]
        value, square, units, *spread = self.function.reduce(torch.stack(sums)).tolist()
        if spread:
            variance, square_of_variances = spread
            # Welch and Satterthwaite: terms of unequal variance count as fewer
            degrees = (self.num - 1) * variance * variance / square_of_variances if square_of_variances > 0 else 1.0
            return value, student(degrees) * math.sqrt(variance)
        if units < 2:
            return value, math.inf
        return value, student(units - 1) * math.sqrt(max(square - value * value / units, 0.0) * units / (units - 1))


def _check(tol: float, max_gradients: float) -> None:
    if not (math.isfinite(tol) and tol > 0):
        raise UserError(f"tol must be positive and finite, got {tol}; 0.05 is a relative standard error of 5 percent")
    if not max_gradients > 0:
        raise UserError(f"max_gradients must be positive, got {max_gradients}; 50 is usual")


class GGNTraceProbe(Probe):
    """The trace of the Gauss-Newton matrix along a training run, as `ggn_trace`.

    Every measurement draws random signs of its own.
    """

    name = "ggn_trace"
    examples_apart = True
    STATE: ClassVar[tuple[str, ...]] = ("_price_gradients",)

    def __init__(
        self,
        batches: Batches,
        *,
        tol: float = 0.05,
        max_gradients: float = 50.0,
        eval_mode: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`ggn_trace`; the same at every measurement.
            tol: see :func:`ggn_trace`.
            max_gradients: see :func:`ggn_trace`.
            eval_mode: see :func:`ggn_trace`.
            seed: of the random signs, others at each measurement.

        Raises:
            UserError: an argument out of its range.
        """
        _check(tol, max_gradients)
        super().__init__(batches, eval_mode=eval_mode, seed=seed)
        self.tol, self.max_gradients = tol, max_gradients
        self._price_gradients = 4.0

    @property
    def price_gradients(self) -> float:
        """What the last measurement cost, in gradients on the batches of the probe; a typical price before any."""
        return self._price_gradients

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        """Return the trace at the present weights."""
        most = min(self.max_gradients, max(host.allowance_gradients - function.spent_gradients, 0.0))
        found = measured_ggn_trace(function, self.tol, most, self.seed + self._num_measured)
        if math.isfinite(found.value):
            self._price_gradients = function.spent_gradients
        return {self.name: found}
