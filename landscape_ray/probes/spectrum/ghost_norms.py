"""Squared norms of single examples' gradients from what enters and leaves the layers, no gradient written out.

Of a linear layer that sees one vector for each example, the gradient of example n is an outer product of input a_n and
output gradient d_n, and its squared norm `|a_n|^2 |d_n|^2` (Goodfellow 2015, arXiv:1510.01799). Where it sees T vectors
for each (sequences, or the patches of a convolution), `sum_tu (a_t . a_u)(d_t . d_u)` is cheaper than the gradient if
T^2 (in + out) < T in out (Li et al. 2022, arXiv:2110.05679). Where it is not, the gradients of a convolution come from
one of as many groups as there are examples, which spares the unfolded inputs: a third to a tenth of the time, on a
processor in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight
from torch.overrides import TorchFunctionMode

from landscape_ray.probes.fixed_loss import FORWARD, FixedLoss

Norms: TypeAlias = Callable[[Tensor], Tensor]
"""From the gradient of a call's output to the squared norms of its weight's gradients, (B,)."""

BACKWARD = 0.4
"""Price of a backward pass to the layers' outputs, in gradients: a third, and what it does for each layer; 0.35 to 0.5
on multilayer perceptrons, whose norms cost nothing."""

BATCHED = 1.5
"""What a product costs where each example has its own matrices, in those of a layer for all examples at once."""

COPY = 25.0
"""What it costs to copy an input to where a convolution's patches lie beside each other, in products."""


class Tape:
    """One forward pass on B examples, whose calls of known layers are taken down.

    Known are linear layers, 2-d convolutions without groups, and the gains and biases of layer, group and RMS norms. A
    parameter that is used elsewhere, or twice, is not covered; nor are examples that a layer mixes: see `trustworthy`.

    Attributes:
        outputs: of the module, with their graph.
        price: of `squared_norms`, in gradients on the same examples, by the shapes of the layers.
    """

    def __init__(self, function: FixedLoss, inputs: Tensor) -> None:
        """Compute the outputs; inside of `function.surroundings()`."""
        self._num = len(inputs)
        self._wanted = {id(parameter) for parameter in function.parameters}
        self._uses: list[tuple[int, Tensor, Norms]] = []
        self._forward, self._norms = 0.0, 0.0
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

    @property
    def price(self) -> float:
        """See above: the backward pass to the outputs of the layers, and norms by what they multiply and copy."""
        return BACKWARD + (FORWARD * self._norms / self._forward if self._forward else 0.0)

    def _take_down(self, func: Any, given: dict[str, Any], output: Tensor) -> None:
        x, weight, bias = given["input"].detach(), given.get("weight"), given.get("bias")
        if len(x) != self._num or not output.requires_grad:
            return
        if weight is not None and func in (F.linear, F.conv2d):
            forward, norms = _work(func is F.conv2d, x, weight, output)
            self._forward += forward
            self._norms += norms if id(weight) in self._wanted else 0.0
        channels = 1 if func in (F.conv2d, F.group_norm) else -1
        for parameter, of_gradients in (
            (weight, _weight_norms(func, given, x)),
            (bias, lambda gradient: _summed(gradient, channels)),
        ):
            if id(parameter) in self._wanted and of_gradients is not None:
                self._uses.append((id(parameter), output, of_gradients))


class Verified(NamedTuple):
    """What is known of a module whose tapes are right: the shape of an example's outputs, and `Tape.price`."""

    shape: torch.Size
    price: float


def verified(function: FixedLoss, inputs: Tensor) -> Verified | None:
    """Return what norms of tapes are of and what they cost, if they are those of the gradients; else None.

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
    return Verified(shape[1:], tape.price)


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
        weight, dilation, stride = given["weight"], given.get("dilation", 1), given.get("stride", 1)

        def norms_of_patches(gradient: Tensor) -> Tensor:
            if _in_groups(x) and not _by_pairs(gradient[0, 0].numel(), *_sides(weight)):
                return _of_groups(x, weight.shape, gradient, stride, padding, dilation)
            patches = F.unfold(x, weight.shape[2:], dilation=dilation, padding=padding, stride=stride)
            return _outer(patches.mT, gradient.flatten(2).mT)

        return norms_of_patches
    eps = {"eps": given["eps"]} if given.get("eps") is not None else {}
    if func is F.group_norm:
        return lambda gradient: _summed(gradient * F.group_norm(x, given["num_groups"], **eps), 1)
    return lambda gradient: _summed(gradient * func(x, given["normalized_shape"], **eps), -1)


def _outer(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Return |sum_t d_t a_t'|^2 for inputs a (B, ..., in) and gradients d (B, ..., out)."""
    if inputs.dim() == 2:
        return _square(inputs) * _square(gradients)
    a, d = inputs.flatten(1, -2), gradients.flatten(1, -2)
    if _by_pairs(a.shape[1], d.shape[2], a.shape[2]):
        return ((a @ a.mT) * (d @ d.mT)).sum((1, 2))
    return _square((d.mT @ a).flatten(1))


def _by_pairs(T: int, rows: int, columns: int) -> bool:
    """Return whether products of pairs of T vectors are cheaper than the gradient, of (rows, columns)."""
    return T * (rows + columns) < rows * columns


def _sides(weight: Tensor) -> tuple[int, int]:
    """Return rows and columns of a weight (out, in, ...) as a matrix."""
    return len(weight), weight[0].numel()


def _in_groups(x: Tensor) -> bool:
    """Return whether convolutions of many groups are fast here: in other types, torch computes one after the other."""
    if x.device.type != "cpu" or x.dtype is not torch.float32:
        return False
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _of_groups(x: Tensor, shape: torch.Size, gradients: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Return the squared norms of the gradients of a convolution's weight, each example being a group of its own."""
    num = len(x)
    each = conv2d_weight(  # type: ignore[no-untyped-call]
        x.reshape(1, -1, *x.shape[2:]),
        (num * shape[0], *shape[1:]),
        gradients.reshape(1, -1, *gradients.shape[2:]),
        stride,
        padding,
        dilation,
        groups=num,
    )
    return _square(each.view(num, -1))


def _work(convolution: bool, x: Tensor, weight: Tensor, output: Tensor) -> tuple[float, float]:
    """Return how many products the forward pass of a layer takes for an example, and what the norms take, in products.

    A gradient takes three times the former.
    """
    rows, columns = _sides(weight)
    T = output[0].numel() // rows
    forward = T * rows * columns
    if T == 1:
        return forward, 0.0
    pairs = _by_pairs(T, rows, columns)
    products = BATCHED * (T * T * (rows + columns) if pairs else forward)
    copied = T * columns if convolution and (pairs or not _in_groups(x)) else 0
    return forward, products + COPY * copied


def _summed(gradients: Tensor, channels: int) -> Tensor:
    """Return the squared norm of the sum over all axes but the first and that of the channels, (B,)."""
    return _square(gradients.movedim(channels, -1).flatten(1, -2).sum(1) if gradients.dim() > 2 else gradients)


def _square(rows: Tensor) -> Tensor:
    squares: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
    return squares
