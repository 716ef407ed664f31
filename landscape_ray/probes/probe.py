"""What a training loop calls: a probe holds its batches, its settings and what it remembers between measurements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.operators import Loss


class Probe(ABC):
    """A measurement that can be repeated along a run.

    Contract: `measure` leaves module and random generators bit-identical, returns nan (and does not raise) where
    weights or loss are not finite, and depends on nothing but the weights, the batches, the settings and the state.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def price_gradients(self) -> float:
        """What the next measurement is expected to cost, in gradients on the batches of the probe."""

    @abstractmethod
    def measure(self, module: nn.Module, loss: Loss) -> Estimate:
        """Return the estimate at the present weights.

        Args:
            module: any module; data-parallel wrappers taken off.
            loss: `loss(module, batch)` is the mean loss of one micro-batch, a scalar tensor.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what the probe remembers: tensors and plain numbers only, so that `weights_only` loading works."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what another instance, or this one earlier, remembered."""
