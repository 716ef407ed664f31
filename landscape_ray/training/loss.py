"""What a run minimises: a mean over targets of a loss between the model's outputs and them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from landscape_ray.config import Model
from landscape_ray.errors import UserError
from landscape_ray.registry import resolve
from landscape_ray.signature import Signature
from landscape_ray.training.chunked import CHUNKS, mean_cross_entropy

LARGE = 2**20
"""Elements of outputs from which on a loss goes through them in chunks: smaller ones stay in caches anyway."""

Losses: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets to one loss for each target, flat, float32."""


class LossConfig(Model):
    """The table [train.loss]."""

    name: str = "auto"
    """auto (cross_entropy for classes and tokens, squared_error for values) | cross_entropy | squared_error, or the
    path package.module:function of a loss of yours: (outputs, targets) to one loss each, or to their mean."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the target's probability that is spread over all classes (Szegedy et al. 2016, arXiv 1512.00567)."""
    z_loss: float = Field(default=0.0, ge=0.0)
    """Weight of the squared log-partition function, which keeps logits from drifting (Chowdhery et al. 2022,
    arXiv 2204.02311; 1e-4 there)."""

    @model_validator(mode="after")
    def _known(self) -> LossConfig:
        if self.name != "auto":
            resolve(self.name, LOSSES, "loss.name")
        if self.name not in ("auto", "cross_entropy") and (self.label_smoothing or self.z_loss):
            raise ValueError(
                f"label_smoothing and z_loss need the loss cross_entropy, got '{self.name}'; set them to 0"
            )
        return self


def _precise(outputs: Tensor) -> Tensor:
    """Return outputs in float32, or in float64 where they are."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def cross_entropy(outputs: Tensor, targets: Tensor, reduction: Literal["none", "mean"] = "none") -> Tensor:
    """Return -log softmax(outputs)[target] in nats: outputs (..., num_classes), targets (...), result flat.

    The softmax is computed in float32 (float64 of such outputs), as `_precise` outputs would be. PyTorch's kernel for
    CUDA reads float16 for it as it is; bfloat16 it first writes out in float32.
    """
    dtype = torch.float64 if outputs.dtype == torch.float64 else torch.float32
    logarithms = F.log_softmax(outputs.flatten(0, -2), -1, dtype=None if outputs.dtype == dtype else dtype)
    return F.nll_loss(logarithms, targets.flatten(), reduction=reduction)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 0.5 |outputs - targets|^2, summed over the last axis; classes are compared as one-hot vectors.

    The convention of the edge-of-stability literature (Cohen et al. 2021, arXiv 2103.00065).
    """
    outputs = _precise(outputs).flatten(0, -2)
    if not targets.is_floating_point():
        # not F.one_hot, which looks at the values and so makes a GPU wait
        classes = torch.arange(outputs.shape[-1], device=targets.device)
        targets = (targets.flatten()[:, None] == classes).to(outputs.dtype)
    return 0.5 * (outputs - targets.reshape(outputs.shape)).square().sum(-1)


LOSSES: dict[str, Losses] = {"cross_entropy": cross_entropy, "squared_error": squared_error}


class Score(NamedTuple):
    """Sums over the targets of a batch."""

    loss: Tensor
    """Sum of the losses, float64, without label smoothing and z-loss; 0-d, or (K,) for stacked members."""
    correct: Tensor | None
    """Number of targets whose class has the largest output; None where targets are not classes."""
    num_targets: int


class Objective:
    """The loss of a run as a function of module and batch.

    Attributes:
        name: cross_entropy, squared_error, or the path of the user's loss.
        unit: of the loss, as shown: `nats/token`, `nats/image`, `squared error` ...
    """

    def __init__(self, config: LossConfig, signature: Signature) -> None:
        """Choose the loss.

        Raises:
            UserError: cross-entropy asked for targets that are not classes.
        """
        automatic = "cross_entropy" if signature.classifies else "squared_error"
        self.name = automatic if config.name == "auto" else config.name
        if self.name == "cross_entropy" and not signature.classifies:
            raise UserError("loss.name must suit targets that are values, got 'cross_entropy'; use 'squared_error'")
        if self.name != "cross_entropy" and (config.label_smoothing or config.z_loss):
            raise UserError(
                f"loss.label_smoothing and loss.z_loss need the loss cross_entropy, got '{self.name}'; set them to 0"
            )
        self.losses: Losses = resolve(self.name, LOSSES, "loss.name")
        self.label_smoothing, self.z_loss = config.label_smoothing, config.z_loss
        self.classifies = signature.classifies
        self.unit = f"nats/{signature.unit}" if self.name == "cross_entropy" else self.name.replace("_", " ")

    def per_target(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the training loss of each target, flat; a user's loss may give their mean only, 0-d."""
        if not (self.label_smoothing or self.z_loss):
            return self.losses(outputs, targets)
        logits = _precise(outputs).flatten(0, -2)
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none", label_smoothing=self.label_smoothing)
        if self.z_loss:
            losses = losses + self.z_loss * logits.logsumexp(-1).square()
        return losses

    @property
    def likelihood(self) -> Literal["categorical", "gaussian"] | None:
        """Of which model this is the negative log-likelihood: softmax over the outputs, or unit variance around them.

        Its curvature in the outputs is known then; label smoothing does not change it.
        """
        if self.name == "cross_entropy":
            return None if self.z_loss else "categorical"
        return "gaussian" if self.name == "squared_error" else None

    def __call__(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean training loss of `module` on (inputs, targets), 0-d."""
        inputs, targets = batch
        outputs = module(inputs)
        if self.name == "cross_entropy" and not self.z_loss:  # the fused mean: one pass less over the logits
            if not self.label_smoothing:
                return cross_entropy(outputs, targets, "mean")
            logits = _precise(outputs).flatten(0, -2)
            return F.cross_entropy(logits, targets.flatten(), label_smoothing=self.label_smoothing)
        return self.per_target(outputs, targets).mean()

    def first_order(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the same as a call, to be differentiated once: large outputs are then gone through in chunks."""
        inputs, targets = batch
        if self.name == "cross_entropy" and not (self.label_smoothing or self.z_loss or torch.compiler.is_compiling()):
            outputs = module(inputs)
            large = outputs.numel() >= LARGE and outputs.dtype == torch.bfloat16  # others need no second copy
            if large and outputs.requires_grad and outputs.device.type in CHUNKS:
                return mean_cross_entropy(outputs.flatten(0, -2), targets.flatten())
            return cross_entropy(outputs, targets, "mean")
        return self(module, batch)

    @torch.no_grad()
    def score(self, outputs: Tensor, targets: Tensor, num_members: int | None = None) -> Score:
        """Return sums over a batch, for evaluations.

        Args:
            outputs: of the module, (B, ...) or stacked (K, B, ...).
            targets: of the batch, likewise.
            num_members: K where stacked; sums are then (K,).
        """
        num_targets = targets.numel() if self.classifies else targets.numel() // max(targets.shape[-1], 1)
        shape = (num_members or 1, -1)
        losses = self.losses(outputs, targets).double()
        total = losses * num_targets if losses.dim() == 0 else losses.view(shape).sum(-1)
        correct = None
        if self.classifies:
            correct = (outputs.argmax(-1) == targets).reshape(shape).sum(-1)
        num_targets //= num_members or 1
        if num_members is None:
            return Score(total.reshape(()), None if correct is None else correct.reshape(()), num_targets)
        return Score(total, correct, num_targets)
