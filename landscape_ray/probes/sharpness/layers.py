"""Layer-wise sharpness: how sharp the loss is along the part of the weights that a layer owns."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.estimate import UNKNOWN, Estimate
from landscape_ray.probes.fixed_loss import Batches, FixedLoss
from landscape_ray.probes.losses import Loss
from landscape_ray.probes.operators import HessianOperator
from landscape_ray.probes.operators.blocks import layers
from landscape_ray.probes.probe import Host, Probe
from landscape_ray.probes.spectrum.lanczos import lanczos

Kind: TypeAlias = Literal["quotient", "eigenvalue"]
"""Which number stands for a layer; see :func:`layer_sharpness`."""


def layer_sharpness(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    kind: Kind = "quotient",
    tol: float = 0.03,
    max_matvecs: int = 30,
    seed: int = 0,
    eval_mode: bool = True,
) -> dict[str, Estimate]:
    """Return the sharpness of each layer at the present weights, by the name of the layer.

    A layer is a module with parameters of its own; tied weights belong to the first that has them. H_ll is the diagonal
    block of the Hessian of a layer, v the eigenvector of the largest eigenvalue of the whole Hessian, v_l its part.

    Kinds:
        quotient: `v_l' H_ll v_l / |v_l|^2`, where in the network the sharpest direction is sharp; one Lanczos run and a
            product for each layer.
        eigenvalue: `lambda_1(H_ll)`, how sharp it gets when only this layer moves; one Lanczos run for each layer.
    A quotient is at most the eigenvalue of its layer, and that at most the sharpness of the whole. They do not add up
    to it: what couples layers is outside of the blocks.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: `loss(module, batch)`, the mean loss of one micro-batch.
        batches: pairs `(batch, num_examples)`, batches with `num_examples`, or a single batch.
        kind: see above.
        tol: residual of eigenvalues to reach, relative to the value, > 0.
        max_matvecs: most products of one Lanczos run, >= 1; memory: one vector for each.
        seed: of the start vectors.
        eval_mode: measure in eval mode: no dropout, running batch statistics. False keeps the modes of the host.

    Returns:
        The estimates, in the order of the layers. `standard_error` is the residual in the block: an eigenvalue of H_ll
        lies within that distance of the value. For quotients, whose v is found to `tol`, it is not their error.

    Raises:
        UserError: an argument out of its range, or a function that cannot be measured.

    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    >>> _ = nn.init.constant_(net[0].weight, 2.0), nn.init.constant_(net[1].weight, 0.5)
    >>> def half_square(net, x):  # 0.5 (w1 w2 x - 1)^2 at its minimum: blocks w2^2 and w1^2
    ...     return 0.5 * (net(x) - 1).square().mean()
    >>> {name: round(e.value, 2) for name, e in layer_sharpness(net, half_square, [torch.ones(1, 1)]).items()}
    {'0': 0.25, '1': 4.0}
    """
    probe = LayerSharpnessProbe(batches, kind=kind, tol=tol, max_matvecs=max_matvecs, eval_mode=eval_mode, seed=seed)
    found = probe.measure(module, loss)
    return {name.partition("/")[2]: estimate for name, estimate in found.items() if "/" in name}


class LayerSharpnessProbe(Probe):
    """Sharpness of each layer along a training run, started from the eigenvectors of the last measurement.

    Estimates: `layer_sharpness`, that of the sharpest layer, and `layer_sharpness/<layer>` for each. It is converged
    where all of them are. Where the host allows less than they cost, Lanczos runs are cut short, and the layers with
    the largest parts of v come first (quotient) or the first ones (eigenvalue); the rest is left out, and the sharpest
    is not converged.
    """

    name = "layer_sharpness"
    STATE: ClassVar[tuple[str, ...]] = ("_vector", "_price_gradients")

    def __init__(
        self,
        batches: Batches,
        *,
        kind: Kind = "quotient",
        tol: float = 0.03,
        max_matvecs: int = 30,
        cold_every: int = 10,
        eval_mode: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the settings.

        Args:
            batches: see :func:`layer_sharpness`; the same at every measurement.
            kind: see :func:`layer_sharpness`.
            tol: see :func:`layer_sharpness`.
            max_matvecs: see :func:`layer_sharpness`.
            cold_every: random starts at measurements 0, cold_every, 2 cold_every ...; >= 1, where 1 is always.
            eval_mode: see :func:`layer_sharpness`.
            seed: of the random starts, other ones each time.

        Raises:
            UserError: an argument out of its range.
        """
        if kind not in get_args(Kind):
            raise UserError(f"kind must be one of {', '.join(get_args(Kind))}, got '{kind}'")
        if not (math.isfinite(tol) and tol > 0):
            raise UserError(f"tol must be positive and finite, got {tol}; 0.03 is three percent")
        if max_matvecs < 1:
            raise UserError(f"max_matvecs must be at least 1, got {max_matvecs}; 30 suffices for most networks")
        if cold_every < 1:
            raise UserError(f"cold_every must be at least 1, got {cold_every}; 1 starts every measurement anew")
        super().__init__(batches, eval_mode=eval_mode, seed=seed)
        self.kind, self.tol, self.max_matvecs, self.cold_every = kind, tol, max_matvecs, cold_every
        self._vector: Tensor | None = None
        self._price_gradients = {"quotient": 40.0, "eigenvalue": 100.0}[kind]

    @property
    def price_gradients(self) -> float:
        """What the last measurement cost, in gradients on the batches of the probe; a rough guess before any."""
        return self._price_gradients

    def _measure(self, function: FixedLoss, host: Host) -> dict[str, Estimate]:
        before = function.spent_gradients
        start = None if self._num_measured % self.cold_every == 0 else self._vector
        measured = self._quotients if self.kind == "quotient" else self._eigenvalues
        found, vector = measured(function, start, host.allowance_gradients - before)
        known = [estimate for estimate in found.values() if math.isfinite(estimate.value)]
        if not known:
            return {self.name: UNKNOWN}
        self._vector, self._price_gradients = vector, function.spent_gradients - before
        sharpest = max(known, key=lambda estimate: estimate.value)
        whole = len(found) == len(layers(function.module)) and all(estimate.converged for estimate in known)
        sharpest = dataclasses.replace(sharpest, converged=whole)
        return {self.name: sharpest} | {f"{self.name}/{name}": estimate for name, estimate in found.items()}

    def _quotients(
        self, function: FixedLoss, start: Tensor | None, allowance_gradients: float
    ) -> tuple[dict[str, Estimate], Tensor | None]:
        operator, places = HessianOperator(function), _places(function)
        most = operator.most_products(allowance_gradients, self.max_matvecs + len(places))
        num_layers = min(len(places), max(1, most // 2))  # where it is short, half is for v
        top = lanczos(
            operator,
            function.size,
            start=start,
            seed=self.seed + self._num_measured,
            tol=self.tol,
            max_matvecs=min(self.max_matvecs, max(1, most - num_layers)),
            dtype=function.dtype,
            device=function.device,
        )
        if not math.isfinite(top.value):
            return {}, None
        num_layers = max(1, most - top.num_matvecs)
        lengths = {
            name: math.sqrt(sum(float(top.vector[part].square().sum()) for part in parts))
            for name, parts in places.items()
        }
        found: dict[str, Estimate] = {}
        for name in sorted(places, key=lambda name: -lengths[name]):
            if lengths[name] == 0:
                found[name] = UNKNOWN
                continue
            if len(found) == num_layers:
                break
            unit = torch.zeros_like(top.vector)
            for part in places[name]:
                unit[part] = top.vector[part] / lengths[name]
            product = operator(unit)
            value = float(unit @ product)
            residual = math.sqrt(
                sum(float((product[part] - value * unit[part]).square().sum()) for part in places[name])
            )
            found[name] = Estimate(value=value, standard_error=residual, num_matvecs=1, converged=top.converged)
        return {name: found[name] for name in places if name in found}, top.vector

    def _eigenvalues(
        self, function: FixedLoss, start: Tensor | None, allowance_gradients: float
    ) -> tuple[dict[str, Estimate], Tensor | None]:
        places = _places(function)
        owned = layers(function.module)
        vector = torch.zeros(function.size, dtype=function.dtype, device=function.device)
        found: dict[str, Estimate] = {}
        for index, (name, parts) in enumerate(places.items()):
            block = FixedLoss(
                function.module, function.loss, function.batches, parameters=owned[name], seed=function.seed
            )
            operator = HessianOperator(block)
            if found and allowance_gradients < operator.setup_gradients + operator.matvec_gradients:
                break
            before = None if start is None else torch.cat([start[part] for part in parts])
            top = lanczos(
                operator,
                block.size,
                start=before if before is not None and bool(before.any()) else None,
                seed=self.seed + 1000 * self._num_measured + index,
                tol=self.tol,
                max_matvecs=operator.most_products(allowance_gradients, self.max_matvecs),
                dtype=block.dtype,
                device=block.device,
            )
            function.spent_gradients += block.spent_gradients
            allowance_gradients -= block.spent_gradients
            if not math.isfinite(top.value):
                found[name] = UNKNOWN
                continue
            pieces = torch.split(top.vector, [part.stop - part.start for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                vector[part] = piece
            found[name] = Estimate(
                value=top.value,
                standard_error=top.residual,
                num_matvecs=operator.num_matvecs,
                converged=top.converged,
            )
        return found, vector


def _places(function: FixedLoss) -> dict[str, list[slice]]:
    """Return where the parameters of each layer are in a flat vector."""
    begins: dict[int, slice] = {}
    begin = 0
    for parameter in function.parameters:
        begins[id(parameter)] = slice(begin, begin + parameter.numel())
        begin += parameter.numel()
    return {name: [begins[id(p)] for p in own] for name, own in layers(function.module).items()}
