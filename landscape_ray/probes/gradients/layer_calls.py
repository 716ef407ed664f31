"""The calls of linear layers and layer norms in a forward pass, and the factors of their per-example gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from landscape_ray.probes.gradients.rows import Part


class LayerCalls(TorchFunctionMode):
    """Takes down the calls of linear layers and layer norms that see one vector for each of `num` examples."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.num = num
        self.calls: list[tuple[Any, Tensor, Tensor, Tensor | None, Tensor | None]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            x, weight, bias = _bound(("input", "weight", "bias"), args, kwargs)
            self._take_down(func, x, weight, bias, output)
        elif func is nn.functional.layer_norm:
            x, shape, weight, bias, eps = _bound(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
            normalised = nn.functional.layer_norm(x.detach(), shape, eps=1e-5 if eps is None else eps)
            self._take_down(func, normalised, weight, bias, output)
        return output

    def _take_down(self, func: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, output: Tensor) -> None:
        if x.dim() == 2 and len(x) == self.num:
            self.calls.append((func, x.detach(), output, weight, bias))

    def parts(self, total: Tensor, parameters: Sequence[nn.Parameter]) -> list[Part] | None:
        """Return the factors of each parameter's gradients, or None where a parameter is not one of these layers'."""
        outer = torch.autograd.grad(total, [call[2] for call in self.calls], materialize_grads=True)
        found: dict[int, Part] = {}
        for (func, x, _, weight, bias), gradient in zip(self.calls, outer, strict=True):
            if weight is not None:
                linear = func is nn.functional.linear
                found[id(weight)] = Part(gradient, x) if linear else Part(gradient * x, None)
            if bias is not None:
                found[id(bias)] = Part(gradient, None)
        return [found[id(p)] for p in parameters] if all(id(p) in found for p in parameters) else None


def _bound(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> tuple[Any, ...]:
    given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
    return tuple(given.get(name) for name in names)
