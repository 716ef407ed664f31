"""Norms of the gradient, and how far the weights have come, layer by layer."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss, observing
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.operators.blocks import layers
from landscape_ray.probes.probe import Host, Probe


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorms:
    """L2 norms of a vector over the trainable parameters.

    Attributes:
        total: of all of it.
        layers: of the part of each layer, by its name; see :func:`landscape_ray.probes.operators.blocks.layers`. Their
            squares add up to that of the total.
    """

    total: Estimate
    layers: dict[str, float]


def gradient_norms(module: nn.Module, loss: Loss, batches: Batches, *, eval_mode: bool = True) -> LayerNorms:
    """Return the L2 norm of the gradient of the mean loss, whole and layer by layer; one gradient.

    Exact for these batches. Of other batches it is larger by the noise, |G|^2 + tr(S) / B on average: the unbiased
    |G|^2 is in :func:`landscape_ray.probes.gradients.noise_scale.gradient_noise_scale`.

    Args:
        module: any module, float32 or float64.
        loss: see :data:`landscape_ray.probes.losses.Loss`.
        batches: see :data:`landscape_ray.probes.fixed_loss.Batches`.
        eval_mode: measure in eval mode; False keeps the modes of the host.

    Returns:
        The norms; nan where weights or loss are not finite.

    Raises:
        UserError: parameters or batches that cannot be measured.

    >>> module = nn.Linear(2, 1)
    >>> found = gradient_norms(module, lambda m, batch: m(batch).mean(), [torch.tensor([[2.0, 2.0]])])
    >>> round(found.total.value, 6), list(found.layers)
    (3.0, ['root'])
    """
    began = time.perf_counter()
    with observing(module, loss, batches, eval_mode=eval_mode) as function:
        found = LayerNorms(total=UNKNOWN, layers={})
        if function.finite:
            found = _layer_norms(function.module, function.parameters, function.gradient()[1])
    total = dataclasses.replace(
        found.total, price_gradients=function.spent_gradients, cost_seconds=time.perf_counter() - began
    )
    return LayerNorms(total=total, layers=found.layers)


def distance_from_init(module: nn.Module, initial: Mapping[str, Tensor]) -> LayerNorms:
    """Return the L2 distance of the trainable weights from others, whole and layer by layer.

    Args:
        module: any module.
        initial: the others by name, such as a copy of an earlier `state_dict()`.

    Returns:
        The distances; nan where weights are not finite.

    Raises:
        UserError: a trainable parameter is missing in `initial`, or has another shape there.

    >>> module = nn.Linear(2, 1)
    >>> initial = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    >>> _ = module.weight.data.add_(torch.tensor([[3.0, 4.0]]))
    >>> round(distance_from_init(module, initial).total.value, 4)
    5.0
    """
    parameters, differences = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            if name not in initial or initial[name].shape != parameter.shape:
                found = f"shape {tuple(initial[name].shape)}" if name in initial else "nothing"
                raise UserError(f"initial must hold '{name}' of shape {tuple(parameter.shape)}, got {found}")
            parameters.append(parameter)
            differences.append((parameter.detach() - initial[name].to(parameter.device)).flatten())
    if not parameters:
        raise UserError("module must have a parameter with requires_grad, got none; unfreeze what is to be measured")
    return _layer_norms(module, parameters, torch.cat(differences))


def _layer_norms(module: nn.Module, parameters: Sequence[nn.Parameter], vector: Tensor) -> LayerNorms:
    names = {id(p): name for name, own in layers(module).items() for p in own}
    squares: dict[str, list[Tensor]] = {}
    parts = torch.split(vector, [p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        norm: Tensor = torch.linalg.vector_norm(part, dtype=torch.float64)
        squares.setdefault(names[id(parameter)], []).append(norm.square())
    sums = torch.stack([torch.stack(terms).sum() for terms in squares.values()]).tolist()  # one wait for a GPU
    if not all(math.isfinite(square) for square in sums):
        return LayerNorms(total=UNKNOWN, layers=dict.fromkeys(squares, math.nan))
    roots = {name: math.sqrt(square) for name, square in zip(squares, sums, strict=True)}
    return LayerNorms(total=Estimate(value=math.sqrt(math.fsum(sums))), layers=roots)


class GradientNormsProbe(Probe):
    """The norm of the gradient along a training run."""

    name = "gradient_norms"

    def __init__(self, batches: Batches, *, layers: bool = True, eval_mode: bool = True, seed: int = 0) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`gradient_norms`; the same at every measurement.
            layers: tell those of the layers as well.
            eval_mode: see :func:`gradient_norms`.
            seed: of noise that the loss may contain.
        """
        super().__init__(batches, eval_mode=eval_mode, seed=seed)
        self.layers = layers

    @property
    def price_gradients(self) -> float:
        """One gradient."""
        return 1.0

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        return _named(
            self.name, _layer_norms(function.module, function.parameters, function.gradient()[1]), self.layers
        )


class DistanceFromInitProbe(Probe):
    """The L2 distance of the weights from those at the first measurement, of which it keeps a copy."""

    name = "distance_from_init"
    STATE: ClassVar[tuple[str, ...]] = ("_initial",)

    def __init__(self, batches: Batches, *, layers: bool = True, seed: int = 0) -> None:
        """Keep the settings.

        Args:
            batches: no loss is computed on them, but once to see that it is a fixed function.
            layers: tell those of the layers as well.
            seed: of noise that the loss may contain.
        """
        super().__init__(batches, seed=seed)
        self.layers = layers
        self._initial: Tensor | None = None

    @property
    def price_gradients(self) -> float:
        """Nothing: the loss is not looked at."""
        return 0.0

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        weights = function.weights
        if self._initial is None:
            self._initial = weights
        if self._initial.shape != weights.shape:
            raise UserError(
                f"state of the probe '{self.name}' must have {function.size} weights, got {len(self._initial)}; "
                "the checkpoint is of another module"
            )
        initial = self._initial.to(weights)
        found = _named(self.name, _layer_norms(function.module, function.parameters, weights - initial), self.layers)
        length = float(torch.linalg.vector_norm(initial, dtype=torch.float64))
        distance = found[self.name].value
        if length > 0:  # else there is nothing that the distance is relative to
            found[f"{self.name}/relative"] = Estimate(value=distance / length)
        return found


def _named(name: str, norms: LayerNorms, layers: bool) -> dict[str, Estimate]:
    parts = {f"{name}/{layer}": Estimate(value=value) for layer, value in norms.layers.items()} if layers else {}
    return {name: norms.total, **parts}
