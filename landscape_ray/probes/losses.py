"""Losses that probes can take: any function of module and batch, or one that can be taken apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from landscape_ray.errors import UserError

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""`loss(module, batch)`: the mean loss of one micro-batch, a scalar tensor."""

Likelihood: TypeAlias = Literal["categorical", "gaussian"]
"""Of which model the loss is the negative log-likelihood: softmax over the outputs, or unit variance around them."""


@runtime_checkable
class DetailedLoss(Protocol):
    """A loss that can be taken apart, for what needs outputs or single examples; batches are `(inputs, targets)`.

    Attributes:
        likelihood: see :data:`Likelihood`; None where the loss is neither.
    """

    @property
    def likelihood(self) -> Likelihood | None:
        """Of which model this is the negative log-likelihood."""
        ...

    def per_target(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one loss for each target, flat, the targets of an example beside each other; their mean is the loss.

        Args:
            outputs: `module(inputs)`, (B, ...).
            targets: (B, ...).
        """
        ...

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss, 0-d."""
        ...


class OutputLoss:
    """A criterion on outputs and targets as a :class:`DetailedLoss`.

    >>> import torch
    >>> loss = OutputLoss(nn.CrossEntropyLoss(reduction="none"), likelihood="categorical")
    >>> layer = nn.Linear(2, 3)
    >>> loss(layer, (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))).shape
    torch.Size([])
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor], likelihood: Likelihood | None = None) -> None:
        """Keep the criterion.

        Args:
            criterion: `criterion(outputs, targets)`, outputs with one row for each target, (M, C), and targets (M, ...)
                to one loss for each, not reduced.
            likelihood: categorical for cross-entropy on logits, gaussian for half the squared distance.
        """
        self.criterion, self.likelihood = criterion, likelihood

    def per_target(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one loss for each target, flat.

        Raises:
            UserError: the criterion reduces.
        """
        rows = outputs.flatten(0, -2)
        flat = targets.reshape(rows.shape) if targets.shape == outputs.shape else targets.flatten()
        losses = self.criterion(rows, flat)
        if losses.dim() == 0 or len(losses) != len(rows):
            raise UserError(
                f"criterion must return one loss for each of {len(rows)} targets, got shape {tuple(losses.shape)}; "
                "give it reduction='none'"
            )
        return losses.reshape(len(rows), -1).sum(1)

    def __call__(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean loss, 0-d."""
        inputs, targets = batch
        return self.per_target(module(inputs), targets).mean()


def detailed(loss: Loss, purpose: str) -> DetailedLoss:
    """Return the loss, which `purpose` needs to take apart.

    Raises:
        UserError: it cannot be.
    """
    if not isinstance(loss, DetailedLoss):
        raise UserError(
            f"loss must have per_target and likelihood for {purpose}, got {type(loss).__name__}; "
            "wrap its criterion: OutputLoss(criterion, likelihood=...)"
        )
    return loss
