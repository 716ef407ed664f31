"""What a training loop calls: a probe holds its batches, its settings and what it remembers between measurements."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss, observing
from landscape_ray.probes.losses import Loss

Need: TypeAlias = Literal["preconditioner", "update"]
"""What a probe may ask of the loop beyond module and loss; see :class:`Host`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the training loop tells a probe about itself; a loop that does not know something leaves it out.

    Attributes:
        step: updates completed.
        lr: learning rate of the last update; nan where it is not known.
        momentum: of the last update: of SGD, or Adam's beta1.
        optimizer: sgd, adamw ...; "" where it is not known.
        batch_size: examples in an update; 0 where it is not known.
        preconditioner: returns what the optimizer divides the gradient by, element by element: tensors in the shapes of
            the trainable parameters, in their order; None before its first update, or where it has no such diagonal.
        update: what the last update added to the trainable parameters; None before the first.
        allowance_gradients: most that this measurement should cost; what can be cut short is.
    """

    step: int = 0
    lr: float = math.nan
    momentum: float = 0.0
    optimizer: str = ""
    batch_size: int = 0
    preconditioner: Callable[[], Sequence[Tensor] | None] | None = None
    update: Sequence[Tensor] | None = None
    allowance_gradients: float = math.inf

    def answers(self, needs: frozenset[Need]) -> bool:
        """Return whether it knows what a probe asks for."""
        if "update" in needs and self.update is None:
            return False
        return "preconditioner" not in needs or (self.preconditioner is not None and self.preconditioner() is not None)


NOBODY = Host()
"""A host that tells nothing."""


class Probe(ABC):
    """A measurement that can be repeated along a run.

    Contract: `measure` leaves module and random generators bit-identical, returns nan (and does not raise) where
    weights or loss are not finite, and depends on nothing but the weights, the batches, the settings, the state and
    what the host tells.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    examples_apart: ClassVar[bool] = False
    """Whether the loss must be a `DetailedLoss`."""

    def __init__(self, batches: Batches, *, eval_mode: bool = True, seed: int = 0) -> None:
        """Keep the settings.

        Args:
            batches: see :data:`landscape_ray.probes.fixed_loss.Batches`; the same at every measurement.
            eval_mode: measure in eval mode: no dropout, running batch statistics. False keeps the modes of the host.
            seed: of what the probe draws; every measurement draws anew.
        """
        self.batches, self.eval_mode, self.seed = batches, eval_mode, seed
        self.double = False
        """Whether to measure a copy of the module in float64; set it before the first measurement."""
        self.tf32 = False
        """Whether products of matrices and convolutions may round their factors to TF32 where a GPU has it."""
        self._num_measured = 0

    @property
    @abstractmethod
    def price_gradients(self) -> float:
        """What the next measurement is expected to cost, in gradients on the batches of the probe."""

    @abstractmethod
    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        """Return the estimates by name, the main one under the name of the probe, first.

        The weights are finite. Names begin with that of the probe: `sharpness`, `sharpness/second`. What was spent is
        counted by `function`, and filled in by the caller. Values that are not finite are allowed.
        """

    def measure(self, module: nn.Module, loss: Loss, host: Host = NOBODY) -> dict[str, Estimate]:
        """Return the estimates at the present weights, by name; the main one first, which bears the cost.

        Args:
            module: any module, float32 or float64; data-parallel wrappers taken off.
            loss: `loss(module, batch)` is the mean loss of one micro-batch, a scalar tensor; a `DetailedLoss` where the
                probe says `examples_apart`.
            host: what the loop knows beyond that.

        Raises:
            UserError: parameters, batches or a loss that cannot be measured.
        """
        began = time.perf_counter()
        with (
            _products(self.tf32),
            observing(
                module, loss, self.batches, eval_mode=self.eval_mode, double=self.double, seed=self.seed
            ) as function,
        ):
            found = {self.name: UNKNOWN}
            if function.finite:
                if self._num_measured == 0:
                    function.check_deterministic()
                found = {name: _sound(estimate) for name, estimate in self._measure(function, host).items()}
        first, *_ = found
        found[first] = dataclasses.replace(
            found[first], price_gradients=function.spent_gradients, cost_seconds=time.perf_counter() - began
        )
        if math.isfinite(found[first].value):
            self._num_measured += 1
        return found

    STATE: ClassVar[tuple[str, ...]] = ()
    """Attributes that are remembered between measurements, beyond how many were made: tensors and plain values."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the probe remembers: tensors and plain values only, so that `weights_only` loading works."""
        return {name.lstrip("_"): getattr(self, name) for name in ("_num_measured", *self.STATE)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what another instance, or this one earlier, remembered.

        Raises:
            UserError: an entry is missing or unknown.
        """
        if set(state) != set(self.state_dict()):
            raise UserError(
                f"state of the probe '{self.name}' must hold {', '.join(self.state_dict())}, "
                f"got {', '.join(state) or 'nothing'}; the checkpoint is of another version"
            )
        for name in ("_num_measured", *self.STATE):
            setattr(self, name, state[name.lstrip("_")])


@contextlib.contextmanager
def _products(tf32: bool) -> Iterator[None]:
    """Let products on CUDA be in float32, or in TF32, inside the block; torch's own defaults differ by operation."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _sound(estimate: Estimate) -> Estimate:
    """Return the estimate, or nothing where it is not finite: half a result would look like one."""
    return estimate if math.isfinite(estimate.value) else UNKNOWN
