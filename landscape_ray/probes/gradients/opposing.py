"""Outliers with opposing signals: the examples that an update helps most and harms most, and whether they oppose."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss, observing
from landscape_ray.probes.gradients.per_example import ExampleGradients, example_losses
from landscape_ray.probes.gradients.units import MAX_BYTES, check_max_bytes, gathered, jackknife_error
from landscape_ray.probes.losses import DetailedLoss, detailed
from landscape_ray.probes.probe import Host, Need, Probe


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpposingGroups:
    """The two tails of the examples by the change of their loss in an update; all of it exact for these examples.

    `landscape_ray.probes.gradients.per_example.examples_at(batches, found.decreasing)` are the examples themselves.

    Attributes:
        decreasing: the k examples whose loss fell most, most first, (k,) int64: numbers over all micro-batches.
        increasing: the k whose loss rose most (or fell least), most first, (k,) int64.
        loss_changes: of every example, after minus before, (m,) float64.
        cosine: of the two groups' mean gradients after the update, in [-1, 1]; its standard error is that of the
            jackknife over the members of the groups. Unknown where a loss or gradient is not finite, and where all
            gradients of a group are zero; nothing else counts then.
        p_value: of their opposition beyond that along the update, by :func:`opposition_p_value`.
        movement_share: of the two groups in sum |loss change|.
        curvature_share: of the two groups in the curvature of the loss along the update, |c_1| + |c_2| of
            |c_1| + |c_2| + |c_rest|, where c is d' H d summed over the examples of a group, averaged over the step d.
    """

    decreasing: Tensor
    increasing: Tensor
    loss_changes: Tensor
    cosine: Estimate
    p_value: Estimate
    movement_share: float
    curvature_share: float

    def opposing(self, level: float = 0.05) -> bool:
        """Return whether the groups' mean gradients point apart, and not by chance at that level."""
        return self.cosine.value < 0 and self.p_value.value <= level


def opposing_groups(
    module: nn.Module,
    loss: DetailedLoss,
    batches: Batches,
    update: Sequence[Tensor] | Tensor,
    *,
    fraction: float = 0.05,
    num_permutations: int = 999,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
) -> OpposingGroups:
    """Return the examples that an update helped and harmed most, and whether their gradients oppose.

    Groups of outliers with large gradients in opposite directions make the loss steep across the valley between them:
    an update along it lowers the loss of one group and raises that of the other. They are found by forwards alone:
    the loss of each example before and after. Measured in eval mode, at the price of two forwards, a gradient at both
    weights, and those of the groups' examples.

    Args:
        module: any module, float32 or float64, after the update.
        loss: see :class:`landscape_ray.probes.fixed_loss.DetailedLoss`.
        batches: of `(inputs, targets)`, with 4 examples at least; the whole of them in this process.
        update: what was added to the trainable parameters: tensors in their shapes, or one flat vector; not zero.
        fraction: size k of each group as a share of the examples, in (0, 0.5]; never fewer than 4 examples, or half of
            them: two groups of 3 can be divided in 10 ways only, which no p-value below 0.1 comes from.
        num_permutations: random divisions to compare with, >= 19.
        max_bytes: of gradients that are kept.
        seed: of the random divisions.

    Returns:
        The groups.

    Raises:
        UserError: an argument out of its range, an update of another module, a loss that cannot be taken apart, several
            processes, or weights that are not finite.

    References:
        Rosenfeld and Risteski, Outliers with opposing signals have an outsized effect on neural network optimization,
        2023, arXiv:2311.04163.

    >>> from landscape_ray.probes import OutputLoss
    >>> module = nn.Linear(3, 1, bias=False)
    >>> _ = nn.init.zeros_(module.weight)
    >>> loss = OutputLoss(lambda outputs, targets: 0.5 * (outputs - targets) ** 2)
    >>> inputs = torch.tensor([[5.0, 5.0, 0.0], [5.0, 5.0, 0.0], [5.0, 5.0, 0.0], [5.0, 5.0, 0.0], [0.0, 0.0, 1.0]])
    >>> targets = torch.tensor([[1.0], [1.0], [-1.0], [-1.0], [1.0]])
    >>> found = opposing_groups(module, loss, [(inputs, targets)], torch.tensor([0.1, 0.0, 0.1]))
    >>> found.decreasing, found.increasing, round(found.cosine.value, 3)
    (tensor([0, 1]), tensor([3, 2]), -1.0)
    """
    _check(fraction, num_permutations)
    began = time.perf_counter()
    with observing(module, loss, batches) as function:
        if not function.finite:
            raise UserError("weights must be finite, got some that are not; take those of an earlier checkpoint")
        found = _groups(function, _flat(function, update), fraction, num_permutations, max_bytes, seed)
    cosine = dataclasses.replace(
        found.cosine, price_gradients=function.spent_gradients, cost_seconds=time.perf_counter() - began
    )
    return dataclasses.replace(found, cosine=cosine)


def _flat(function: FixedLoss, update: Sequence[Tensor] | Tensor) -> Tensor:
    vector = update.detach().to(function.dtype) if isinstance(update, Tensor) else function.flatten(update)
    if vector.shape != (function.size,):
        raise UserError(
            f"update must have {function.size} entries, one for each trainable weight, got shape {tuple(vector.shape)}"
        )
    if not (bool(vector.isfinite().all()) and bool(vector.any())):
        raise UserError("update must be finite and not zero; take that of a step with a positive learning rate")
    return vector.to(function.device)


def _groups(
    function: FixedLoss, update: Tensor, fraction: float, num_permutations: int, max_bytes: int, seed: int
) -> OpposingGroups:
    loss = detailed(function.loss, "changes of single examples")
    losses = example_losses(function, loss)
    num = len(losses)
    if len(gathered(losses)[0]) > num:
        raise UserError("opposing signals must be measured in one process, got several; leave the probe out")
    if num < 4:
        raise UserError(f"batches must hold at least 4 examples, got {num}; two groups are to be compared")
    size = max(round(fraction * num), min(4, num // 2))
    _, gradient = function.gradient()
    with function.moved_by(-update):
        changes = losses - example_losses(function, loss)
        curvature = num * float(update @ (gradient - function.gradient()[1]))
    order = changes.argsort(stable=True)
    decreasing, increasing = order[:size], order[-size:].flip(0)
    tails, place = torch.cat([decreasing, increasing]).sort()
    place = place.argsort()  # of each member among the sorted ones, in which the gradients come
    of_tails = _restricted(function, tails)
    after = ExampleGradients(of_tails, loss, max_bytes=max_bytes)
    gram = after.gram()[place][:, place]
    along = after.products(update)[0][place]
    with function.moved_by(-update):
        before = ExampleGradients(of_tails, loss, route=after.route, max_bytes=max_bytes)
        curvatures = along - before.products(update)[0][place]
    function.spent_gradients += of_tails.spent_gradients * len(tails) / num
    sound = bool(changes.isfinite().all() & curvatures.isfinite().all())
    length = float(torch.linalg.vector_norm(update))
    p_value = opposition_p_value(gram, along / length, num_permutations=num_permutations, seed=seed)
    groups = [float(curvatures[:size].sum()), float(curvatures[size:].sum())]
    return OpposingGroups(
        decreasing=decreasing,
        increasing=increasing,
        loss_changes=changes,
        cosine=_cosine_of_sums(gram, after.route) if sound else UNKNOWN,
        p_value=Estimate(value=p_value, standard_error=math.sqrt(p_value * (1 - p_value) / num_permutations)),
        movement_share=_share(changes[tails].abs().sum(), changes.abs().sum()),
        curvature_share=_share(
            abs(groups[0]) + abs(groups[1]), abs(groups[0]) + abs(groups[1]) + abs(curvature - groups[0] - groups[1])
        ),
    )


def _restricted(function: FixedLoss, indices: Tensor) -> FixedLoss:
    """Return the mean loss of some examples, by their ascending numbers over all micro-batches."""
    batches: list[tuple[tuple[Tensor, Tensor], int]] = []
    begin = 0
    for (inputs, targets), _ in function.batches:
        rows = indices[(indices >= begin) & (indices < begin + len(inputs))] - begin
        if len(rows):
            batches.append(((inputs[rows], targets[rows]), len(rows)))
        begin += len(inputs)
    return FixedLoss(function.module, function.loss, batches, parameters=function.parameters, seed=function.seed)


def _share(part: Tensor | float, total: Tensor | float) -> float:
    return float(part) / float(total) if float(total) > 0 else 0.0


def _cosine_of_sums(gram: Tensor, route: str) -> Estimate:
    """Return the cosine between the sums of the first and the second half, with the jackknife over the rows of both."""
    first, across, _, second = (part for half in gram.chunk(2) for part in half.chunk(2, dim=1))
    if not (float(first.sum()) > 0 and float(second.sum()) > 0):
        return dataclasses.replace(UNKNOWN, route=route)
    without_one = _cosines(across.sum() - across.sum(1), _without_each(first), second.sum())
    without_other = _cosines(across.sum() - across.sum(0), first.sum(), _without_each(second))
    return Estimate(
        value=float(_cosines(across.sum(), first.sum(), second.sum())),
        standard_error=math.hypot(float(jackknife_error(without_one)), float(jackknife_error(without_other))),
        route=route,
    )


def _without_each(gram: Tensor) -> Tensor:
    """Return the squared norm of the sum of all rows but one, for each."""
    return gram.sum() - 2 * gram.sum(0) + gram.diagonal()


def _cosines(products: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return products / sqrt(first second) within [-1, 1]; 0 where a square is not positive."""
    squares = first * second
    positive = (first > 0) & (second > 0)
    return torch.where(positive, products / torch.where(positive, squares, 1.0).sqrt(), 0.0).clamp(-1.0, 1.0)


def opposition_p_value(gram: Tensor, along: Tensor, *, num_permutations: int = 999, seed: int = 0) -> float:
    """Return how often chance makes two tails oppose as they do, apart from the direction that they were chosen by.

    Tails are chosen by the change of the loss, which to first order is the gradient's part along the update: along it
    they oppose in any data. So that part is taken out of all gradients. If the tails differ in nothing else, which of
    the two an example is in is chance, and the cosine of their mean gradients is one of those that random divisions of
    the same examples into two groups give:

        p = (1 + number of random divisions whose cosine is not above that of the tails) / (1 + num_permutations)

    To compare with random groups of all examples would be wrong in two ways. Random groups do not oppose along the
    update: of data without any structure, 80 gradients of 30 independent normal entries, 77 % were found opposing at
    the level of 5 % in that way. And tails consist of large gradients, which add up to zero with the others at a
    minimum of their mean, and so tend to oppose each other.

    The other side of it: groups that oppose along the update and nowhere else are not found, and p is 1 where nothing
    is left of the gradients.

    Args:
        gram: inner products of the gradients of 2k examples, those of the one tail first, (2k, 2k) float64.
        along: their parts along the update, g_i . d / |d|, (2k,) float64.
        num_permutations: random divisions, >= 1.
        seed: of these.

    >>> signs = torch.tensor([1.0] * 8 + [-1.0] * 8).double()
    >>> gram = torch.outer(signs, signs) + torch.eye(16).double()
    >>> opposition_p_value(gram, torch.zeros(16).double())
    0.001
    """
    rest = gram - torch.outer(along, along)
    if float(rest.trace()) <= 1e-4 * float(gram.trace()):  # of which roundings in float32 may be a part
        return 1.0
    num, k = len(gram), len(gram) // 2
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(num_permutations, num, generator=generator, dtype=torch.float64)
    picked = torch.cat([torch.arange(k)[None], keys.argsort(1)[:, :k]]).to(gram.device)  # the tails come first
    first = torch.zeros(len(picked), num, dtype=gram.dtype, device=gram.device).scatter_(1, picked, 1.0)
    second = 1.0 - first
    from_first, from_second = first @ rest, second @ rest
    cosines = _cosines((from_first * second).sum(1), (from_first * first).sum(1), (from_second * second).sum(1))
    # the same division comes again in another order: equal up to rounding counts as equal
    return float(1 + (cosines[1:] <= cosines[0] + 1e-12).sum()) / (1 + num_permutations)


def _check(fraction: float, num_permutations: int) -> None:
    if not 0 < fraction <= 0.5:
        raise UserError(f"fraction must be above 0 and at most 0.5, got {fraction}; 0.05 is usual")
    if num_permutations < 19:
        raise UserError(f"num_permutations must be at least 19, got {num_permutations}; 999 is usual")


class OpposingSignalsProbe(Probe):
    """Whether the examples that the last update helped and harmed most have opposing gradients.

    The groups themselves come from :func:`opposing_groups`.
    """

    name = "opposing_signals"
    needs: ClassVar[frozenset[Need]] = frozenset({"update"})
    examples_apart = True
    STATE: ClassVar[tuple[str, ...]] = ("_price_gradients",)

    def __init__(
        self,
        batches: Batches,
        *,
        fraction: float = 0.05,
        num_permutations: int = 999,
        max_bytes: int = MAX_BYTES,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`opposing_groups`; the same at every measurement.
            fraction: see :func:`opposing_groups`.
            num_permutations: see :func:`opposing_groups`.
            max_bytes: see :func:`opposing_groups`.
            seed: of the random divisions, others each time.

        Raises:
            UserError: an argument out of its range.
        """
        _check(fraction, num_permutations)
        check_max_bytes(max_bytes)
        super().__init__(batches, seed=seed)
        self.fraction, self.num_permutations, self.max_bytes = fraction, num_permutations, max_bytes
        self._price_gradients = 3.5

    @property
    def price_gradients(self) -> float:
        """What the last measurement cost, in gradients on the batches of the probe; a typical price before any."""
        return self._price_gradients

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        """Return nothing before the first update, and where it was zero."""
        if host.update is None or not any(bool(part.any()) for part in host.update):
            return {self.name: UNKNOWN}
        found = _groups(
            function,
            _flat(function, host.update),
            self.fraction,
            self.num_permutations,
            self.max_bytes,
            self.seed + self._num_measured,
        )
        if not math.isfinite(found.cosine.value):
            return {self.name: UNKNOWN}
        self._price_gradients = function.spent_gradients
        return {
            self.name: found.cosine,
            f"{self.name}/p_value": found.p_value,
            f"{self.name}/movement_share": Estimate(value=found.movement_share),
            f"{self.name}/curvature_share": Estimate(value=found.curvature_share),
        }
