"""One update of several members: its hyperparameters, and from gradients clipping, then the optimizer, by rows.

The values of an update (learning rate, weight decay, betas) are read from the parameter groups of each member's own
optimizer, so that factors of the parametrisation and the coupling of the decay are what they are in a run alone. The
kernels of the CPU are torch's as well: `_fused_adamw_` and `_fused_sgd_` on rows, one call for a member and group.
Measured there, that is 6 times faster than the same formula over all members with columns of hyperparameters, which
takes a dozen passes over memory; elsewhere it is the other way round (`across`).

A member whose loss or gradient is not finite keeps its row as it is. Nothing here mixes rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from landscape_ray.training.cohort import across
from landscape_ray.training.cohort.buffers import Buffers, Section
from landscape_ray.training.cohort.sequence import Graph, Number, Step, graph_of
from landscape_ray.training.state import TrainState

BY_ROW = ("cpu",)
"""Devices on which a kernel for each member is faster than one for all."""

DIVIDING = (torch.optim.AdamW, torch.optim.SGD)
"""Optimizers whose kernel for a row can divide the gradient by a number on its way through."""

NUMBERS = ("lr", "beta1", "beta2", "weight_decay", "eps")
"""What torch's kernel of AdamW calls the hyperparameters."""


class Clip:
    """Clips the gradients of some members, as the configuration of each says.

    Attributes:
        together: whether all are clipped at once, by their norms if at all, so that nothing is remembered.
    """

    def __init__(self, members: Sequence[TrainState], gradients: Tensor) -> None:
        """Take c runs, and where their gradients will be, (c, P)."""
        self._members, self._gradients = members, gradients
        clippings = [member.config.clipping for member in members]
        self._kinds = {clipping.name for clipping in clippings}
        self.together = self._kinds <= {"none", "norm"}
        bounds = [clipping.threshold if clipping.name == "norm" else math.inf for clipping in clippings]
        self._bounds = torch.tensor(bounds, device=gradients.device)

    @torch.no_grad()
    def __call__(self, active: Sequence[bool]) -> Tensor:
        """Clip the gradient of each member in place; return the norms before, (c,).

        Args:
            active: who is to be updated; the norms of others do not enter their histories.
        """
        gradients = self._gradients
        if not self.together:
            rows = zip(gradients.unbind(), self._members, active, strict=True)
            return torch.stack([_clip_row(row, member) if moves else row.new_zeros(()) for row, member, moves in rows])
        norms: Tensor = torch.linalg.vector_norm(gradients, dim=1)
        if self._kinds != {"none"}:
            scales = torch.where(norms.isfinite(), (self._bounds / (norms + 1e-6)).clamp_(max=1.0), 1.0)
            gradients.mul_(scales[:, None])
        return norms

    def divisors(self) -> tuple[Tensor, Tensor]:
        """Return the norms of the gradients, and by how much to divide those that are finite to clip them, (c,) each.

        For members that are clipped `together`.
        """
        norms: Tensor = torch.linalg.vector_norm(self._gradients, dim=1)
        return norms, ((norms + 1e-6) / self._bounds).clamp_(min=1.0)


def _clip_row(row: Tensor, member: TrainState) -> Tensor:
    holder = torch.empty_like(row)
    holder.grad = row
    return member.clipper([holder])


class Updater:
    """Clips the gradients of some neighbouring rows and updates their weights."""

    def __init__(self, buffers: Buffers, members: Sequence[TrainState], rows: slice, gradients: Tensor) -> None:
        """Take the rows of `members` (all of the cohort's), and the place of their gradients, (c, P)."""
        self._members = members[rows]
        self._clip = Clip(self._members, gradients)
        self._updates = buffers.updates[rows]
        kinds: dict[type[torch.optim.Optimizer], Callable[..., None]] = {
            torch.optim.AdamW: self._adamw,
            torch.optim.SGD: self._sgd,
            torch.optim.Muon: self._muon,
        }
        parts = self._members[0].optimizer.parts
        self._sections = [
            (kinds[type(parts[section.part])], _Columns(buffers, section, rows, gradients))
            for section in buffers.sections
        ]
        self._by_row = gradients.device.type in BY_ROW
        # a pass over the gradients less: small networks wait for their memory
        self._divides = self._by_row and self._clip.together and all(type(part) in DIVIDING for part in parts)
        self._joint = self._divides and all(type(part) is torch.optim.AdamW for part in parts)
        self._divisors = torch.ones(len(self._members), device=gradients.device)
        self._leader = self

    def follow(self, leader: Updater) -> None:
        """Share what can be shared with an updater that is called before this one."""
        if len(leader._members) == len(self._members):
            self._leader = leader

    @torch.no_grad()
    def __call__(self, losses: Tensor, active: Sequence[bool]) -> Tensor:
        """Update the active members whose loss and gradient are finite; return the norms of their gradients, (c,).

        Args:
            losses: (c,).
            active: who is to be updated. Gradients may be used up all the same.
        """
        if self._divides:
            norms, by = self._clip.divisors()
            self._divisors.copy_(by)
        else:
            norms = self._clip(active)
        apply: list[bool] | None = None  # elsewhere nobody waits for the answer
        if self._by_row:
            values = zip(active, losses.tolist(), norms.tolist(), strict=True)
            apply = [moves and math.isfinite(loss) and math.isfinite(norm) for moves, loss, norm in values]
            finite = torch.tensor(apply)
        else:
            finite = losses.isfinite() & norms.isfinite()
            if not all(active):
                finite &= torch.tensor(active).to(finite.device, non_blocking=True)
        self._updates.add_(finite[:, None])
        groups = [
            [member.optimizer.parts[columns.part].param_groups[columns.group] for member in self._members]
            for _, columns in self._sections
        ]
        if self._joint and apply is not None and all(apply):
            with torch.inference_mode():
                self._adamw_of_all(*(number for own in groups for group in own for number in _numbers(group)))
            return norms
        for (kernel, columns), own in zip(self._sections, groups, strict=True):
            kernel(columns, own, finite, apply)
        return norms

    @functools.cached_property
    def _adamw_of_all(self) -> Callable[..., Any]:
        """What updates all rows in one call; it takes `_numbers` of each row, section by section."""
        return self._leader._graph.on(self._steps())

    @functools.cached_property
    def _graph(self) -> Graph:
        return graph_of(self._steps())

    def _steps(self) -> list[Step]:
        fixed = {"amsgrad": False, "maximize": False}
        return [
            Step(
                torch.ops.aten._fused_adamw_.default,
                row,
                {name: Number() for name in NUMBERS} | fixed | {"grad_scale": divisor},
            )
            for _, columns in self._sections
            for row, divisor in zip(columns.rows, self._divisors.unbind(), strict=True)
        ]

    def _adamw(
        self,
        columns: _Columns,
        groups: list[dict[str, Any]],
        finite: Tensor,
        apply: list[bool] | None,
    ) -> None:
        if apply is None:
            mean, square = (columns.blocks[name] for name in ("exp_avg", "exp_avg_sq"))
            across.adamw(columns.block, columns.gradient, mean, square, columns.count, groups, finite)
            return
        for moves, row, group, divisor in zip(apply, columns.rows, groups, self._divisors.unbind(), strict=True):
            if moves:
                numbers: dict[str, Any] = dict(zip(NUMBERS, _numbers(group), strict=True))
                torch._fused_adamw_(*row, **numbers, amsgrad=False, maximize=False, grad_scale=divisor)

    def _sgd(
        self,
        columns: _Columns,
        groups: list[dict[str, Any]],
        finite: Tensor,
        apply: list[bool] | None,
    ) -> None:
        _shrink(columns, [group["shrinks"] for group in groups], finite)
        if apply is None:
            across.sgd(columns.block, columns.gradient, columns.blocks["momentum_buffer"], groups, finite)
            return
        for moves, (weights, gradients, velocities, *_), group, divisor in zip(
            apply, columns.rows, groups, self._divisors.unbind(), strict=True
        ):
            if moves:
                momentum = group["momentum"]
                torch._fused_sgd_(
                    weights,
                    gradients,
                    velocities if momentum else [],
                    weight_decay=group["weight_decay"],
                    momentum=momentum,
                    lr=group["lr"],
                    dampening=0.0,
                    nesterov=group["nesterov"],
                    maximize=False,
                    is_first_step=False,
                    grad_scale=divisor,
                )

    def _muon(
        self,
        columns: _Columns,
        groups: list[dict[str, Any]],
        finite: Tensor,
        apply: list[bool] | None,
    ) -> None:
        first = groups[0]
        _shrink(columns, [group["lr"] * group["weight_decay"] for group in groups], finite)
        device = finite.device
        share = _sent([1.0 - group["momentum"] for group in groups], device)[:, None, None]
        rates = _sent([group["lr"] for group in groups], device)[:, None, None]
        keep = ~finite[:, None, None]
        for weight, gradient, velocity in columns.matrices("momentum_buffer"):
            gradient = gradient.masked_fill(keep, 0.0)
            velocity.copy_(torch.where(keep, velocity, velocity.lerp(gradient, share)))
            update = gradient.lerp(velocity, 1.0 - share) if first["nesterov"] else velocity
            update = orthogonalised(update, first["ns_coefficients"], first["ns_steps"], first["eps"])
            rows, cols = weight.shape[1:]
            weight.sub_((update * (rates * math.sqrt(max(1.0, rows / cols)))).masked_fill(keep, 0.0))


def _numbers(group: dict[str, Any]) -> tuple[float, ...]:
    """Return the values of `NUMBERS`."""
    return (group["lr"], *group["betas"], group["weight_decay"], group["eps"])


class _Columns:
    """The columns of one section, cut into rows once."""

    def __init__(self, buffers: Buffers, section: Section, rows: slice, gradients: Tensor) -> None:
        self.part, self.group = section.part, section.group
        self._section = section
        self.block = buffers.weights[rows, section.start : section.stop]
        self.gradient = gradients[:, section.start : section.stop]
        self.blocks = {name: buffers.state(section, name)[rows] for name in buffers.states[section.part]}
        # one count stands for the group: every update moves all parameters
        self.count = buffers.updates[rows, section.slots[0].number]
        # for each member what torch's kernels take: lists of weights, gradients, one or two states, maxima, counts
        several = (self.block, self.gradient, *self.blocks.values())
        self.rows = [
            (*([row] for row in tensors[:-1]), [], [tensors[-1]])
            for tensors in zip(*(matrix.unbind() for matrix in several), self.count.unbind(), strict=True)
        ]

    def matrices(self, name: str) -> list[tuple[Tensor, ...]]:
        """Return weights, gradients and one state of each parameter of the section, (c, rows, columns)."""
        blocks = (self.block, self.gradient, self.blocks[name])
        base = self._section.start
        return [
            tuple(block[:, slot.start - base : slot.stop - base].view(len(block), *slot.shape) for block in blocks)
            for slot in self._section.slots
        ]


def _shrink(columns: _Columns, decays: list[float], finite: Tensor) -> None:
    """Multiply the finite rows by 1 - decay."""
    if any(decays):
        factors = _sent([1.0 - decay for decay in decays], finite.device)
        columns.block.mul_(torch.where(finite, factors, 1.0)[:, None])


def _sent(values: list[float], device: torch.device) -> Tensor:
    """Return one value for each member on the device, for which the host does not wait."""
    return torch.tensor(values).to(device, non_blocking=True)


def orthogonalised(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return each matrix of a stack (c, rows, columns) with its singular values near 1, as torch's Muon does it.

    Newton-Schulz iterations in bfloat16 (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    """
    a, b, c = coefficients
    wide = x.bfloat16() if x.shape[1] <= x.shape[2] else x.bfloat16().mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(wide, wide.mT)
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[1] <= x.shape[2] else wide.mT
