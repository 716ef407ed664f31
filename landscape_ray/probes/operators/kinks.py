"""Networks with kinks held on the piece that they are on, so that differences of their gradients see no kink.

The Hessian of a ReLU network is that of the smooth piece around the weights: its kinks have no second derivative, and
autograd gives them none. A difference of gradients over a step, however short, crosses kinks (a network has millions of
them) and takes each jump of the gradient for curvature: on a residual net with 269 thousand weights it is off by 40 to
270 % along the sharpest direction, whatever the step. With every ReLU held at the slope, and every max pooling at the
places, that it has at the weights, the displaced network is the same piece, continued, and a difference is off by 0.9 %
at a step of 0.002.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from landscape_ray.probes.fixed_loss import FixedLoss, is_compiled

MOST_BYTES = 2**30
"""Of slopes and places. Where a function has more, its kinks are left as they are."""

ELEMENTWISE: frozenset[Callable[..., Any]] = frozenset(
    (
        *(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
        *(F.leaky_relu, F.relu6, F.hardtanh),
        *(torch.abs, Tensor.abs, torch.clamp, Tensor.clamp, Tensor.clamp_min, Tensor.clamp_max),
    )
)
"""Functions that are linear in pieces, element by element, with numbers as their other arguments."""

IN_PLACE: frozenset[Callable[..., Any]] = frozenset((torch.relu_, Tensor.relu_))
"""Those that write to their input without being told so by `inplace`."""

POOLS: dict[Callable[..., Any], int] = {F.max_pool1d: 1, F.max_pool2d: 2, F.max_pool3d: 3}
"""Poolings that hand on the largest of some elements, and the number of axes that they pool over."""

Piece = Callable[[Tensor], Tensor]
"""The linear function that a call computes on the piece that the weights are on."""


class Kinks:
    """Takes down the pieces that a function is on at the weights, and holds it there when the weights are displaced.

    Seen are calls of the functions above, in the order in which a forward pass makes them. Not seen: kinks made of
    comparisons (`torch.where`, `maximum`), compiled modules, and parts that checkpointing computes anew, which must
    save the same tensors as the first time. Differences see the kinks of those.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[torch.Size, Piece]] = []  # with the shape of their input
        self._bytes = 0
        self._next = 0

    @property
    def there(self) -> bool:
        """Whether any were taken down; otherwise nothing needs to be held."""
        return bool(self._pieces) and self._bytes <= MOST_BYTES

    @contextmanager
    def taken_down(self, module: nn.Module) -> Iterator[None]:
        """Return a context for one evaluation of `module` at the weights, which comes out as without it."""
        self._pieces, self._bytes = [], 0
        if is_compiled(module):
            yield
            return
        with _Calls(self._take_down):
            yield
        if not self.there:
            self._pieces = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Return a context for one evaluation at displaced weights, on the pieces that were taken down."""
        if not self.there:
            yield
            return
        self._next = 0
        with _Calls(self._hold):
            yield

    def _take_down(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        if func in POOLS:
            output, indices = func(*args, **kwargs, return_indices=True)
            self._add(x, _Places(indices, POOLS[func]), indices)
            return output
        before = x.detach().clone() if _writes_to_input(func, kwargs) else x.detach()
        output = func(*args, **kwargs)
        after = output.detach()
        if func in (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_):
            self._add(x, _Line((after > 0).to(after.dtype)), after)
            return output
        with torch.enable_grad():
            leaf = before.requires_grad_()
            again = func(leaf.clone(), *args[1:], **kwargs)  # which it may write to
            (slope,) = torch.autograd.grad(again.sum(), leaf)
        offset = after - slope * before.detach()
        self._add(x, _Line(slope, offset if bool(offset.any()) else None), after)
        return output

    def _add(self, x: Tensor, piece: Piece, kept: Tensor) -> None:
        self._bytes += kept.numel() * kept.element_size()
        if self._bytes <= MOST_BYTES:
            self._pieces.append((x.shape, piece))
        else:
            self._pieces = []

    def _hold(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, place = args[0], self._next
        self._next += 1
        # calls that depend on the weights may come in another order: leave them to what checks differences
        if place >= len(self._pieces):
            return func(*args, **kwargs)
        shape, piece = self._pieces[place]
        if shape != x.shape or isinstance(piece, _Places) != (func in POOLS):
            return func(*args, **kwargs)
        output = piece(x)
        return x.copy_(output) if _writes_to_input(func, kwargs) else output


class HeldLoss:
    """A function at the weights, and at displaced ones on the piece that the weights are on.

    The first evaluation at the weights takes that piece down.
    """

    def __init__(self, function: FixedLoss) -> None:
        """Nothing is computed yet."""
        self.function, self.kinks = function, Kinks()

    def value(self) -> float:
        """Return L(w)."""
        with self.kinks.taken_down(self.function.module):
            return self.function.value()

    def gradient(self) -> tuple[float, Tensor]:
        """Return L(w) and its gradient, (size,)."""
        with self.kinks.taken_down(self.function.module):
            return self.function.gradient()

    def value_at(self, displacement: Tensor) -> float:
        """Return the loss at w + displacement, displacement (size,)."""
        with self.function.moved_by(displacement), self.kinks.held():
            return self.function.value()

    def gradient_at(self, displacement: Tensor) -> tuple[float, Tensor]:
        """Return the loss and its gradient at w + displacement, displacement (size,)."""
        with self.function.moved_by(displacement), self.kinks.held():
            return self.function.gradient()


class _Line:
    """slope * x + offset, element by element."""

    def __init__(self, slope: Tensor, offset: Tensor | None = None) -> None:
        self.slope, self.offset = slope, offset

    def __call__(self, x: Tensor) -> Tensor:
        y = x * self.slope
        return y if self.offset is None else y + self.offset


class _Places:
    """The elements at fixed places of the last `num_axes` axes."""

    def __init__(self, indices: Tensor, num_axes: int) -> None:
        self.indices, self.num_axes = indices, num_axes

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.flatten(-self.num_axes).gather(-1, self.indices.flatten(-self.num_axes))
        return flat.view(self.indices.shape)


class _Calls(TorchFunctionMode):
    """Hands the calls of the known functions to `handle`."""

    def __init__(self, handle: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.handle = handle

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in ELEMENTWISE:
            if _is_plain(args) and not any(isinstance(v, Tensor) for v in (*args[1:], *given.values())):
                return self.handle(func, args, given)
        elif func in POOLS and _is_plain(args) and len(args) < 7 and not given.get("return_indices"):
            return self.handle(func, args, {name: value for name, value in given.items() if name != "return_indices"})
        return func(*args, **given)


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Return whether the first is a tensor of numbers that can be kept, and may be computed in another way."""
    if not args or type(args[0]) not in (Tensor, nn.Parameter):
        return False
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # of checkpointing
        return False
    return args[0].is_floating_point() and not torch._C._functorch.is_functorch_wrapped_tensor(args[0])


def _writes_to_input(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    return func in IN_PLACE or bool(kwargs.get("inplace"))
