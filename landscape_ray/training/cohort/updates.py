"""One update of several members: its hyperparameters, and from gradients clipping, then the optimizer, by rows.

The values of an update (learning rate, weight decay, betas) are read from the parameter groups of each member's own
optimizer, so that factors of the parametrisation and the coupling of the decay are what they are in a run alone. The
kernels of the CPU are torch's as well: `_fused_adamw_` and `_fused_sgd_` on rows, one call for a member and group.
Measured there, that is 6 times faster than the same formula over all members with columns of hyperparameters, which
takes a dozen passes over memory; elsewhere it is the other way round (`across`).

A member whose loss or gradient is not finite keeps its row as it is. Nothing here mixes rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from landscape_ray.training.cohort import across
from landscape_ray.training.cohort.buffers import Buffers, Section
from landscape_ray.training.state import TrainState

BY_ROW = ("cpu",)
"""Devices on which a kernel for each member is faster than one for all."""


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
        if self._kinds == {"none"}:
            return norms
        scales = torch.where(norms.isfinite(), (self._bounds / (norms + 1e-6)).clamp_(max=1.0), 1.0)
        if gradients.device.type != "cpu":
            gradients.mul_(scales[:, None])
            return norms
        clipped = [row for row, scale in enumerate(scales.tolist()) if scale < 1.0]
        if 2 * len(clipped) > len(self._members):
            gradients.mul_(scales[:, None])
        else:  # most are not clipped late in training, and a pass over memory is what an update costs
            for row in clipped:
                gradients[row].mul_(scales[row])
        return norms


def _clip_row(row: Tensor, member: TrainState) -> Tensor:
    holder = torch.empty_like(row)
    holder.grad = row
    return member.clipper([holder])


class Updater:
    """Applies updates to some neighbouring rows.

    Attributes:
        clip: what clips their gradients before.
    """

    def __init__(self, buffers: Buffers, members: Sequence[TrainState], rows: slice, gradients: Tensor) -> None:
        """Take the rows of `members` (all of the cohort's), and the place of their gradients, (c, P)."""
        self._members = members[rows]
        self.clip = Clip(self._members, gradients)
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

    @torch.no_grad()
    def __call__(self, finite: Tensor) -> None:
        """Update the members where `finite`, (c,) bool, from their gradients, which may be used up."""
        self._updates.add_(finite[:, None])
        # elsewhere nobody waits for the answer
        apply = finite.tolist() if finite.device.type in BY_ROW else None
        for kernel, columns in self._sections:
            groups = [member.optimizer.parts[columns.part].param_groups[columns.group] for member in self._members]
            kernel(columns, groups, finite, apply)

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
        means, squares = columns.states["exp_avg"], columns.states["exp_avg_sq"]
        for row, group in enumerate(groups):
            if apply[row]:
                beta1, beta2 = group["betas"]
                torch._fused_adamw_(
                    [columns.weights[row]],
                    [columns.gradients[row]],
                    [means[row]],
                    [squares[row]],
                    [],
                    [columns.updates[row]],
                    lr=group["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )

    def _sgd(
        self,
        columns: _Columns,
        groups: list[dict[str, Any]],
        finite: Tensor,
        apply: list[bool] | None,
    ) -> None:
        velocities = columns.states["momentum_buffer"]
        _shrink(columns, [group["shrinks"] for group in groups], finite)
        if apply is None:
            across.sgd(columns.block, columns.gradient, columns.blocks["momentum_buffer"], groups, finite)
            return
        for row, group in enumerate(groups):
            if apply[row]:
                momentum = group["momentum"]
                torch._fused_sgd_(
                    [columns.weights[row]],
                    [columns.gradients[row]],
                    [velocities[row]] if momentum else [],
                    weight_decay=group["weight_decay"],
                    momentum=momentum,
                    lr=group["lr"],
                    dampening=0.0,
                    nesterov=group["nesterov"],
                    maximize=False,
                    is_first_step=False,
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
        share = torch.tensor([1.0 - group["momentum"] for group in groups], device=device)[:, None, None]
        rates = torch.tensor([group["lr"] for group in groups], device=device)[:, None, None]
        keep = ~finite[:, None, None]
        for weight, gradient, velocity in columns.matrices("momentum_buffer"):
            gradient = gradient.masked_fill(keep, 0.0)
            velocity.copy_(torch.where(keep, velocity, velocity.lerp(gradient, share)))
            update = gradient.lerp(velocity, 1.0 - share) if first["nesterov"] else velocity
            update = orthogonalised(update, first["ns_coefficients"], first["ns_steps"], first["eps"])
            rows, cols = weight.shape[1:]
            weight.sub_((update * (rates * math.sqrt(max(1.0, rows / cols)))).masked_fill(keep, 0.0))


class _Columns:
    """The columns of one section, cut into rows once."""

    def __init__(self, buffers: Buffers, section: Section, rows: slice, gradients: Tensor) -> None:
        self.part, self.group = section.part, section.group
        self._section = section
        self.block = buffers.weights[rows, section.start : section.stop]
        self.weights = self.block.unbind()
        self.gradient = gradients[:, section.start : section.stop]
        self.gradients = self.gradient.unbind()
        self.blocks = {name: buffers.state(section, name)[rows] for name in buffers.states[section.part]}
        self.states = {name: state.unbind() for name, state in self.blocks.items()}
        # one count stands for the group: every update moves all parameters
        self.count = buffers.updates[rows, section.slots[0].number]
        self.updates = self.count.unbind()

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
        factors = torch.tensor([1.0 - decay for decay in decays], device=finite.device)
        columns.block.mul_(torch.where(finite, factors, 1.0)[:, None])


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
