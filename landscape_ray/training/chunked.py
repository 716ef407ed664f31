"""Cross-entropy of many classes in float32, without a float32 copy of the logits.

The logits of a vocabulary are the largest tensor of a model. PyTorch writes them out in float32, then their
log-probabilities, then the gradient of these, then that of the logits in float32, then in the type of the logits: nine
passes of four bytes an element. Here rows are worked on some at a time, so that what is between stays in a cache: the
logits are read twice and their gradient is written once. The arithmetic is float32 throughout, as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNKS = {"cpu": 2**18}
"""Elements that are worked on at a time, for the devices on which that was measured to be faster."""

IGNORED = -100
"""The target of rows that do not count, as in PyTorch."""


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), device=logits.device)
        partitions = torch.empty(len(logits), device=logits.device)
        for rows in _chunks(logits):
            logarithms = F.log_softmax(logits[rows].float(), -1)
            total += F.nll_loss(logarithms, targets[rows], reduction="sum")
            # log Z = logit - log p of any class that is not ruled out
            top, place = logits[rows].max(-1, keepdim=True)
            partitions[rows] = (top - logarithms.gather(1, place))[:, 0]
        count = (targets != IGNORED).sum()
        ctx.save_for_backward(logits, targets, partitions, count)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, partitions, count = ctx.saved_tensors
        scales = torch.where(targets != IGNORED, gradient / count, 0.0)[:, None]
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            probabilities = (logits[rows] - partitions[rows, None]).exp_()
            own = targets[rows].clamp(min=0)[:, None]
            probabilities.scatter_add_(1, own, probabilities.new_full((), -1.0).expand(own.shape))
            torch.mul(probabilities, scales[rows], out=result[rows])
        return result, None


def _chunks(logits: Tensor) -> list[slice]:
    height = max(CHUNKS[logits.device.type] // logits.shape[-1], 1)
    return [slice(start, start + height) for start in range(0, len(logits), height)]


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of -log softmax(logits)[target] in nats, 0-d float32; once differentiable.

    Args:
        logits: (N, num_classes), float32 or bfloat16. (The gradient of a mean over many underflows in float16.)
        targets: (N,), int64; rows with -100 do not count.
    """
    mean: Tensor = _MeanCrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return mean
