"""Layers that carry the rule of their parameters, and that also work on stacked members.

Stacked: every parameter has one more axis in front, (K, ...), and so have inputs (K, B, ...) and outputs. The same
`forward` then computes K networks at once (`torch.func.functional_call` with stacked parameters); where parameters
have their usual shape, it computes one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from landscape_ray.models.parametrisation import Rule


class Linear(nn.Module):
    """multiplier * W x + b."""

    def __init__(self, in_features: int, out_features: int, *, rule: Rule, bias_rule: Rule | None = None) -> None:
        """Allocate zeros; values come from `Network.initialise`. No bias without `bias_rule`."""
        super().__init__()
        self.in_features, self.out_features, self.multiplier = in_features, out_features, rule.multiplier
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias_rule is not None else None
        self.rules = {"weight": rule} | ({"bias": bias_rule} if bias_rule is not None else {})

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) for x (..., in_features); with stacked parameters (K, ...) for (K, ...)."""
        return linear(x, self.weight, self.bias, self.multiplier)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, multiplier: float = 1.0) -> Tensor:
    """Return multiplier * W x + b for one weight (out, in) or stacked ones (K, out, in)."""
    if multiplier != 1.0:
        x = x * multiplier  # and not the product: the logits of a vocabulary are the largest tensor of a model
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    if torch.is_autocast_enabled(x.device.type):  # which does not know a function of ours
        dtype = torch.get_autocast_dtype(x.device.type)
        flat, weight, bias = flat.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    y: Tensor = _StackedLinear.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.shape[1])


class _StackedLinear(torch.autograd.Function):
    """W x + b for K members, (K, N, in) to (K, N, out), with gradients of the weights in the weights' own layout.

    That of bmm comes transposed, and costs a copy: a fifth of the time of an update of small networks. Where a place
    is `reserved` for the gradients, they are put there, which saves new memory for them and a copy out of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None, :], x, weight.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        (gradient,) = gradients
        x, weight, bias = ctx.saved_tensors
        to_input = torch.bmm(gradient, weight) if ctx.needs_input_grad[0] else None
        to_weight = torch.bmm(gradient.mT, x, out=_claim(weight))
        return to_input, to_weight, None if bias is None else torch.sum(gradient, 1, out=_claim(bias))


@contextlib.contextmanager
def reserved(places: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let the gradients of stacked parameters be put into places, inside the block, where a layer knows how to.

    Whoever asks for the gradients gets the places themselves then, and other tensors for the rest: of parameters that
    are used twice (the first use puts its share into the place, and the sum becomes a new tensor) or in other layers.
    """
    for parameter, place in places:
        parameter.gradient_place = place  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter, _ in places:
            _claim(parameter)


def _claim(parameter: Tensor) -> Tensor | None:
    """Return the place for a parameter's gradient, once; None where there is none."""
    if torch.compiler.is_compiling():  # which finds places of its own
        return None
    place: Tensor | None = parameter.__dict__.pop("gradient_place", None)
    return None if torch.is_grad_enabled() else place  # what is to be differentiated again needs memory of its own


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with gain and (unless `bias` is false) bias."""

    def __init__(self, size: int, *, rule: Rule, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.rules = {"weight": rule} | ({"bias": rule} if bias else {})

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x (..., size); with stacked parameters for (K, ..., size)."""
        shape = x.shape[-1:]
        if self.weight.dim() == 1:
            return F.layer_norm(x, shape, self.weight, self.bias, self.eps)
        y = F.layer_norm(x, shape, eps=self.eps) * per_member(self.weight, x)
        return y if self.bias is None else y + per_member(self.bias, x)


class RMSNorm(nn.Module):
    """Division by the root mean square of the last axis, with gain (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, *, rule: Rule, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.rules = {"weight": rule}

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x (..., size); with stacked parameters for (K, ..., size)."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * per_member(self.weight, x)


def per_member(vector: Tensor, x: Tensor) -> Tensor:
    """Return a vector (size,) as it is, and stacked ones (K, size) in a shape that broadcasts over x (K, ..., size)."""
    return vector if vector.dim() == 1 else vector.reshape(vector.shape[0], *[1] * (x.dim() - 2), -1)


class Embedding(nn.Module):
    """A table of vectors."""

    def __init__(self, num_embeddings: int, size: int, *, rule: Rule) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_embeddings, size))
        self.rules = {"weight": rule}

    def forward(self, index: Tensor) -> Tensor:
        """Return (..., size) for index (...); with stacked parameters (K, ..., size) for (K, ...)."""
        if self.weight.dim() == 2:
            return F.embedding(index, self.weight)
        K, V, size = self.weight.shape
        offset = torch.arange(K, device=index.device).view(K, *[1] * (index.dim() - 1)) * V
        return F.embedding(index + offset, self.weight.reshape(K * V, size))


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """Return the output function of splitmix64 (Steele et al. 2014) on a 64-bit integer."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


class Dropout(nn.Module):
    """Dropout whose mask is a function of (seed, step, layer, element): no generator is drawn from.

    The same on every device, and for a member of a stack as for a network alone. `key` is set by `Network.set_noise`.

    Attributes:
        rate: share of the elements that are zeroed, a 0-d buffer; stacked (K,), a rate for each member.
        key: a 0-d int64 buffer; stacked (K,).
    """

    rate: Tensor
    key: Tensor

    def __init__(self, rate: float, *, salt: int) -> None:
        """Take the rate, in [0, 1), and a number that no other dropout layer of the network has."""
        super().__init__()
        self.salt, self.active = salt, rate > 0
        self.register_buffer("rate", torch.tensor(rate, dtype=torch.float64), persistent=False)
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)

    def key_for(self, seed: int, step: int) -> int:
        """Return the value of `key` for one update of one run."""
        return _signed(_mix(_mix(_mix(seed) ^ step) ^ self.salt))

    def forward(self, x: Tensor) -> Tensor:
        """Return x with dropped elements at zero and the others divided by 1 - rate; x itself in eval mode."""
        if not (self.training and self.active):
            return x
        stacked = self.key.dim() == 1
        shape = x.shape[1:] if stacked else x.shape
        each = (-1, *[1] * len(shape)) if stacked else ()
        key, rate = self.key.view(each), self.rate.view(each)
        # A 32-bit mixer (lowbias32, github.com/skeeto/hash-prospector) of an arithmetic sequence. One half of the key
        # is its start, the other its odd stride: with a start alone all masks would be shifts of each other.
        # Wrapping int32 arithmetic; >> is arithmetic, so sign bits are masked away.
        h = torch.arange(shape.numel(), dtype=torch.int32, device=x.device).view(shape) * ((key >> 32).int() | 1)
        h += (key << 32 >> 32).int()
        h ^= (h >> 16) & 0xFFFF
        h *= 0x7FEB352D
        h ^= (h >> 15) & 0x1FFFF
        h *= 0x846CA68B - (1 << 32)
        h ^= (h >> 16) & 0xFFFF
        threshold = (rate * 2.0**32 - 2.0**31).int()
        return x * torch.where(h >= threshold, (1.0 / (1.0 - rate)).to(x.dtype), x.new_zeros(()))
