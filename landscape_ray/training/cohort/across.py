"""The formulas of AdamW and SGD over all members at once, with hyperparameters in columns: what a GPU is given.

A GPU runs a kernel on 16 rows in the time of one, and starting a kernel is what small networks wait for: a call of
torch's fused kernel for each member and group takes longer than the gradients of all of them. (On the CPU it is the
passes over memory that count, and torch's kernels make one.)

A member whose row of `finite` is False keeps its weights and its state to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


@torch.no_grad()
def adamw(
    weights: Tensor,
    gradients: Tensor,
    means: Tensor,
    squares: Tensor,
    counts: Tensor,
    groups: Sequence[Group],
    finite: Tensor,
) -> None:
    """Apply one update of AdamW, in place.

    Args:
        weights: (c, n).
        gradients: (c, n); used up.
        means: (c, n), torch's `exp_avg`.
        squares: (c, n), torch's `exp_avg_sq`.
        counts: (c,) updates so far, this one included.
        groups: c parameter groups, for lr, betas, weight_decay and eps.
        finite: (c,) bool, which rows are updated.
    """
    table = [[group["lr"], *group["betas"], group["weight_decay"], group["eps"]] for group in groups]
    lr, beta1, beta2, decay, eps = _columns(table, weights.device)
    count = counts.double().clamp(min=1.0)[:, None]  # in float64, as torch: 1 - beta^t is a small difference at first
    root = (1.0 - beta2**count).sqrt()
    moves = finite[:, None]
    step = torch.where(moves, lr * root / (1.0 - beta1**count), 0.0).float()
    gradients.masked_fill_(~moves, 0.0)
    means.lerp_(gradients, torch.where(moves, 1.0 - beta1, 0.0).float())
    squares.lerp_(gradients.square(), torch.where(moves, 1.0 - beta2, 0.0).float())
    weights.mul_(torch.where(moves, 1.0 - lr * decay, 1.0).float())
    weights.addcmul_(means / squares.sqrt().add_((eps * root).float()), -step)


@torch.no_grad()
def sgd(weights: Tensor, gradients: Tensor, velocities: Tensor, groups: Sequence[Group], finite: Tensor) -> None:
    """Apply one update of SGD, with momentum where a group has some, in place.

    Args:
        weights: (c, n).
        gradients: (c, n); used up.
        velocities: (c, n), torch's `momentum_buffer`.
        groups: c parameter groups, for lr, momentum, weight_decay (the L2 term) and nesterov.
        finite: (c,) bool, which rows are updated.
    """
    table = [[group["lr"], group["momentum"], group["weight_decay"], float(group["nesterov"])] for group in groups]
    lr, momentum, decay, nesterov = (column.float() for column in _columns(table, weights.device))
    moves = finite[:, None]
    gradients.masked_fill_(~moves, 0.0)
    if any(group["weight_decay"] for group in groups):
        gradients.addcmul_(weights, torch.where(moves, decay, 0.0))
    update = gradients
    if any(group["momentum"] for group in groups):
        rolls = moves & (momentum > 0.0)
        velocities.copy_(torch.where(rolls, velocities * momentum + gradients, velocities))
        ahead = torch.where(nesterov > 0.0, gradients + velocities * momentum, velocities)
        update = torch.where(rolls, ahead, gradients)
    weights.addcmul_(update, torch.where(moves, -lr, 0.0))


def _columns(table: list[list[float]], device: torch.device) -> tuple[Tensor, ...]:
    """Return the columns of a table, (c, 1) float64 each, in one transfer."""
    return torch.tensor(table, dtype=torch.float64).to(device, non_blocking=True)[:, :, None].unbind(1)
