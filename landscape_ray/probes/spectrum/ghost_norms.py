"""Squared norms of single examples' gradients from what enters and leaves the layers, no gradient written out.

Of a linear layer that sees one vector for each example, the gradient of example n is an outer product of input a_n and
output gradient d_n, and its squared norm `|a_n|^2 |d_n|^2` (Goodfellow 2015, arXiv:1510.01799). Where it sees T vectors
for each (sequences, or the patches of a convolution), `sum_tu (a_t . a_u)(d_t . d_u)` is cheaper than the gradient if
T^2 (in + out) < T in out (Li et al. 2022, arXiv:2110.05679).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from landscape_ray.probes.fixed_loss import FixedLoss

Norms: TypeAlias = Callable[[Tensor], Tensor]
"""From the gradient of a call's output to the squared norms of its weight's gradients, (B,)."""


class Tape:
    """One forward pass on B examples, whose calls of known layers are taken down.

    Known are linear layers, 2-d convolutions without groups, and the gains and biases of layer, group and RMS norms. A
    parameter that is used elsewhere, or twice, is not covered; nor are examples that a layer mixes: see `trustworthy`.

    Attributes:
        outputs: of the module, with their graph.
    """

    def __init__(self, function: FixedLoss, inputs: Tensor) -> None:
        """Compute the outputs; inside of `function.surroundings()`."""
        self._num = len(inputs)
        self._wanted = {id(parameter) for parameter in function.parameters}
        self._uses: list[tuple[int, Tensor, Norms]] = []
        function.seed_noise()
        with (
            torch.compiler.set_stance("force_eager"),
            _Recorder(self._take_down),
        ):  # inside of a compiled one none is seen
            self.outputs: Tensor = function.module(inputs)
        used = [parameter for parameter, _, _ in self._uses]
        self.covers_all = self._wanted == set(used) and len(used) == len(self._wanted)

    def squared_norms(self, cotangent: Tensor) -> Tensor:
        """Return |J_n' cotangent_n|^2 for each example n, (B,) float64; the graph is kept.

        Args:
            cotangent: in the shape of the outputs.
        """
        outputs = [output for _, output, _ in self._uses]
        gradients = torch.autograd.grad(self.outputs, outputs, cotangent, retain_graph=True, materialize_grads=True)
        total = torch.zeros(self._num, dtype=torch.float64, device=cotangent.device)
        for (_, _, norms), gradient in zip(self._uses, gradients, strict=True):
            total += norms(gradient)
        return total

    def _take_down(self, func: Any, given: dict[str, Any], output: Tensor) -> None:
        x, weight, bias = given["input"].detach(), given.get("weight"), given.get("bias")
        if len(x) != self._num or not output.requires_grad:
            return
        channels = 1 if func in (F.conv2d, F.group_norm) else -1
        for parameter, norms in (
            (weight, _weight_norms(func, given, x)),
            (bias, lambda gradient: _summed(gradient, channels)),
        ):
            if id(parameter) in self._wanted and norms is not None:
                self._uses.append((id(parameter), output, norms))


def verified(function: FixedLoss, inputs: Tensor) -> torch.Size | None:
    """Return the shape of an example's outputs, if the norms of tapes are those of the gradients; else None.

    Args:
        function: whose module and parameters.
        inputs: of a few examples. For a random function of the outputs, the norm of each is compared with that from a
            backward pass of its own.
    """
    with function.surroundings():
        tape = Tape(function, inputs)
        if not tape.covers_all or len(tape.outputs) != len(inputs):
            return None
        shape = tape.outputs.shape
        cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(tape.outputs)
        found = tape.squared_norms(cotangent)
        for example, row, squared in zip(inputs, cotangent, found.tolist(), strict=True):
            function.seed_noise()
            outputs = function.module(example[None])
            gradient = torch.autograd.grad(outputs, function.parameters, row[None], materialize_grads=True)
            exact = float(function.flatten(gradient).double().square().sum())
            if not abs(squared - exact) <= 1e-3 * exact:
                return None
    return shape[1:]


_NAMES: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
}
"""The known calls, and the names of their arguments in order."""


class _Recorder(TorchFunctionMode):
    """Hands on every known call, with its arguments by name and its output."""

    def __init__(self, take_down: Callable[[Any, dict[str, Any], Tensor], None]) -> None:
        super().__init__()
        self.take_down = take_down

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _NAMES:
            self.take_down(func, {**dict(zip(_NAMES[func], args, strict=False)), **(kwargs or {})}, output)
        return output


def _weight_norms(func: Any, given: dict[str, Any], x: Tensor) -> Norms | None:
    """Return how the norms of the weight's gradients come from the output's, None where that is not known."""
    if func is F.linear:
        return lambda gradient: _outer(x, gradient)
    if func is F.conv2d:
        padding = given.get("padding", 0)
        if given.get("groups", 1) != 1 or isinstance(padding, str) or x.dim() != 4:
            return None
        kernel, dilation, stride = given["weight"].shape[2:], given.get("dilation", 1), given.get("stride", 1)
        return lambda gradient: _outer(
            F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride).mT, gradient.flatten(2).mT
        )
    eps = {"eps": given["eps"]} if given.get("eps") is not None else {}
    if func is F.group_norm:
        return lambda gradient: _summed(gradient * F.group_norm(x, given["num_groups"], **eps), 1)
    return lambda gradient: _summed(gradient * func(x, given["normalized_shape"], **eps), -1)


def _outer(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Return |sum_t d_t a_t'|^2 for inputs a (B, ..., in) and gradients d (B, ..., out)."""
    if inputs.dim() == 2:
        return _square(inputs) * _square(gradients)
    a, d = inputs.flatten(1, -2), gradients.flatten(1, -2)
    T, rows, columns = a.shape[1], d.shape[2], a.shape[2]
    if T * (rows + columns) < rows * columns:
        return ((a @ a.mT) * (d @ d.mT)).sum((1, 2))
    return _square((d.mT @ a).flatten(1))


def _summed(gradients: Tensor, channels: int) -> Tensor:
    """Return the squared norm of the sum over all axes but the first and that of the channels, (B,)."""
    return _square(gradients.movedim(channels, -1).flatten(1, -2).sum(1) if gradients.dim() > 2 else gradients)


def _square(rows: Tensor) -> Tensor:
    squares: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
    return squares
