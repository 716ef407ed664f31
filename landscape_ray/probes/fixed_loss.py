"""The function whose landscape is looked at: the mean loss on fixed micro-batches, as a function of the weights.

    L(w) = sum_i share_i loss(module, batch_i),    share_i = weight_i / sum_j weight_j

With the numbers of examples as weights, and a loss that is a mean over examples, unequal micro-batches (200 + 56) give
exactly the full batch. Vectors are flat, over the parameters that are looked at, in the order of `module.parameters()`:
frozen parameters are left out, tied weights are counted once.

Every evaluation of the loss sees the same state of torch's random generators, so that noise (dropout in train mode)
is a constant of the function; the host's generators are put back. Autocast is switched off around the loss: curvature
from bfloat16 products is mostly rounding. A loss that enters autocast itself keeps it.

Where a process group exists, each process holds its own micro-batches of the same function: sums go over all of them,
and all of them must measure together.

Prices are in gradients (one forward and backward on all batches); a forward alone is a third of one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape_ray.errors import UserError
from landscape_ray.probes.guard import host_untouched
from landscape_ray.probes.losses import DetailedLoss, Loss

Batches: TypeAlias = Sequence[Any]
"""Pairs `(batch, weight)`, or batches with an attribute `num_examples`. A single batch needs no weight."""

FORWARD = 1 / 3
"""Price of a forward alone, in gradients."""


def weighted(batches: Batches) -> list[tuple[Any, float]]:
    """Return `(batch, share)` pairs whose shares sum to one.

    Args:
        batches: pairs `(batch, weight)` with weight > 0, or batches with `num_examples` > 0, or one batch as it is.

    Raises:
        UserError: no batches, several without weights, or a weight that is not positive and finite.

    >>> weighted([("long", 200), ("short", 50)])
    [('long', 0.8), ('short', 0.2)]
    """
    pairs = _pairs(batches)
    total = math.fsum(weight for _, weight in pairs)
    return [(batch, weight / total) for batch, weight in pairs]


def _pairs(batches: Batches) -> list[tuple[Any, float]]:
    pairs: list[tuple[Any, float]] = []
    for index, item in enumerate(batches):
        if hasattr(item, "num_examples"):
            batch, weight = item, item.num_examples
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Real):
            batch, weight = item
        elif len(batches) == 1:
            batch, weight = item, 1.0
        else:
            raise UserError(
                f"batches[{index}] must be a pair (batch, weight) or have num_examples, got {type(item).__name__}; "
                "give each of several batches its number of examples as weight"
            )
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"batches[{index}] must have a weight that is positive and finite, got {weight}")
        pairs.append((batch, float(weight)))
    if not pairs:
        raise UserError("batches must hold at least one batch, got none; the curvature is that of the loss on them")
    return pairs


class FixedLoss:
    """The mean loss on fixed micro-batches as a function of the weights.

    Attributes:
        module, loss: what it is made of.
        batches: `(batch, share)` pairs; the shares sum to one, over all processes.
        parameters: what is looked at.
        size: number of their elements.
        dtype, device: of the vectors.
        single: whether there is one micro-batch only, on every process: then a graph is worth keeping. Prices and
            decisions go by this, so that all processes decide alike.
        spent_gradients: price of all that was computed from this function so far.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        batches: Batches,
        *,
        parameters: Sequence[nn.Parameter] | None = None,
        seed: int = 0,
    ) -> None:
        """Take the function apart; nothing is computed yet.

        Args:
            module: float32 or float64 parameters on one device. Its mode is used as it is: call `eval()` before, unless
                dropout and batch statistics are meant to be part of the function.
            loss: see :data:`Loss`.
            batches: see :data:`Batches`; on the device of the module.
            parameters: those to look at, such as a layer's; None for all with `requires_grad`.
            seed: of the noise that the loss may contain.

        Raises:
            UserError: parameters that are not float32 or float64, spread over devices, or all frozen; batches that
                `weighted` refuses; several micro-batches of which each has its own batch statistics.
        """
        for name, parameter in module.named_parameters():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise UserError(
                    f"parameter '{name}' must be float32 or float64, got {parameter.dtype}; "
                    "measure a copy: copy.deepcopy(module).float()"
                )
        wanted = None if parameters is None else {id(p) for p in parameters}
        self.parameters = [p for p in module.parameters() if p.requires_grad and (wanted is None or id(p) in wanted)]
        if not self.parameters:
            raise UserError(
                "module must have a parameter with requires_grad, got none; unfreeze what is to be measured"
            )
        devices = sorted({str(p.device) for p in module.parameters()})
        if len(devices) > 1:
            raise UserError(f"module must be on one device, got {', '.join(devices)}; move a copy of it")
        self.module, self.loss, self.seed = module, loss, seed
        self.size = sum(p.numel() for p in self.parameters)
        self.dtype = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        self.device = self.parameters[0].device
        pairs = _pairs(batches)
        total = self.reduce(torch.tensor(math.fsum(w for _, w in pairs), dtype=torch.float64, device=self.device))
        self.batches = [(batch, weight / float(total)) for batch, weight in pairs]
        self.spent_gradients = 0.0
        more = self.reduce(torch.tensor(float(len(pairs) > 1), device=self.device))
        self.single = not bool(more)
        if (len(pairs) > 1 or _num_processes() > 1) and (layer := mixes_examples(module)) is not None:
            raise UserError(
                f"layer '{layer}' must not use the statistics of each micro-batch, got several of them: their mean "
                "is not the loss of the whole; measure in eval mode, or on one batch"
            )

    # vectors

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors shaped like the parameters as one vector, detached."""
        parts = [t.detach().reshape(-1) for t in tensors]
        return torch.cat([part if part.dtype == self.dtype else part.to(self.dtype) for part in parts])

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Return the parts of a vector (size,), each in the shape and dtype of its parameter."""
        parts = torch.split(vector, [p.numel() for p in self.parameters])
        return [
            part.view(p.shape) if part.dtype == p.dtype else part.view(p.shape).to(p.dtype)
            for part, p in zip(parts, self.parameters, strict=True)
        ]

    @property
    def weights(self) -> Tensor:
        """The present weights as one vector, a copy."""
        return self.flatten(self.parameters)

    @property
    def finite(self) -> bool:
        """Whether all parameters of the module are."""
        return all(bool(p.isfinite().all()) for p in self.module.parameters())

    # values

    def value(self) -> float:
        """Return L(w); a third of a gradient."""
        return self._value([(batch, share, 1.0) for batch, share in self.batches])

    def _value(self, parts: Sequence[tuple[Any, float, float]]) -> float:
        """Return the mean loss on triples: batch, share, and how many of its examples are looked at, one being all."""
        here = math.fsum(share for _, share, _ in parts)
        self.spent_gradients += FORWARD * math.fsum(share * part for _, share, part in parts) / here
        with self.surroundings(), torch.no_grad():
            return self._mean([(share, self.evaluate(batch)) for batch, share, _ in parts])

    def gradient(self) -> tuple[float, Tensor]:
        """Return L(w) and its gradient, (size,); one gradient."""
        self.spent_gradients += 1.0
        losses: list[tuple[float, Tensor]] = []
        with self.surroundings():
            total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
            for batch, share in self.batches:
                value, gradient = self.differentiate(batch)
                total.add_(self.flatten(gradient), alpha=share)
                losses.append((share, value))
            return self._mean(losses), self.reduce(total)

    def value_at(self, displacement: Tensor) -> float:
        """Return L(w + displacement), displacement (size,)."""
        with self.moved_by(displacement):
            return self.value()

    def gradient_at(self, displacement: Tensor) -> tuple[float, Tensor]:
        """Return L and its gradient at w + displacement, displacement (size,)."""
        with self.moved_by(displacement):
            return self.gradient()

    def _few(self, batch: Any, share: float) -> tuple[Any, float, float]:
        """Return the first eighth of a batch, its share and its part of the examples; all where it is not to be cut.

        Not to be cut: what may not be examples beside each other; what is compiled, which would be again for another
        size; and what depends on the examples beside it, since batch norms in groups ask for a number that fits.
        """
        pair = isinstance(self.loss, DetailedLoss) and isinstance(batch, tuple) and len(batch) == 2
        if not pair or not all(isinstance(part, Tensor) and part.dim() for part in batch):
            return batch, share, 1.0
        inputs, targets = batch
        num = len(inputs) // 8
        few = num == 0 or targets.numel() < 256
        if few or len(targets) != len(inputs) or is_compiled(self.module) or mixes_examples(self.module):
            return batch, share, 1.0
        return (inputs[:num], targets[:num]), share, num / len(inputs)

    def _mean(self, losses: list[tuple[float, Tensor]]) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for share, loss in losses:
            total += share * loss.detach().to(torch.float64)
        return float(self.reduce(total))

    @contextmanager
    def moved_by(self, displacement: Tensor) -> Iterator[None]:
        """Return a context in which the weights are displaced; afterwards they are back to the bit."""
        with torch.inference_mode(False):
            # `.data`: version counters stay, so graphs that the host holds are usable once the bits are back.
            memory = [parameter.data for parameter in self.parameters]
            originals = [data.clone() for data in memory]
        try:
            with torch.inference_mode(False):
                torch._foreach_add_(memory, self.unflatten(displacement))
            yield
        finally:
            with torch.inference_mode(False):
                torch._foreach_copy_(memory, originals)

    # for operators and probes that work on one micro-batch: inside `surroundings`

    @contextmanager
    def surroundings(self, *, second_derivatives: bool = False) -> Iterator[None]:
        """Return the context of every evaluation: gradients on, autocast off, the host's generators put back.

        Args:
            second_derivatives: whether gradients are differentiated once more, which neither fused attention nor
                compiled graphs can be; nor do they have forward derivatives.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))  # backward passes look at it, too
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(torch.random.fork_rng([self.device] if self.device.type == "cuda" else []))
            if second_derivatives:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def evaluate(self, batch: Any) -> Tensor:
        """Return the loss on one micro-batch, 0-d, with its graph where gradients are on.

        Raises:
            UserError: the loss is not a scalar.
        """
        self.seed_noise()
        value = self.loss(self.module, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"loss must return a scalar tensor, the mean over the batch, got {found}")
        return value.squeeze()

    def differentiate(self, batch: Any, *, create_graph: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return loss and gradient of one micro-batch, the gradient with its graph if it is differentiated again.

        Raises:
            UserError: the loss is not a scalar, or does not depend on the parameters.
        """
        value = self.evaluate(batch)
        if not value.requires_grad:
            raise UserError("loss must depend on the trainable parameters, got a constant; do not detach it")
        gradient = torch.autograd.grad(value, self.parameters, create_graph=create_graph, materialize_grads=True)
        return value.detach(), gradient

    def seed_noise(self) -> None:
        """Put the generators of torch where they are at the beginning of every evaluation."""
        torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would reach devices that are not put back
        if self.device.type == "cuda":
            torch.cuda.manual_seed(self.seed)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, where a process group exists."""
        if _num_processes() > 1:
            tensor = tensor.contiguous()
            torch.distributed.all_reduce(tensor)
        return tensor

    def check_deterministic(self) -> None:
        """Check that two evaluations give the same value; two thirds of a gradient, or a twelfth.

        Noise shows on a few examples as on all: an eighth is looked at where the loss is one on examples apart, and on
        256 targets or more.

        Raises:
            UserError: they don't.
        """
        parts = [self._few(batch, share) for batch, share in self.batches]
        first, second = self._value(parts), self._value(parts)
        if first != second and not (math.isnan(first) and math.isnan(second)):
            # the order of a GPU's sums may differ: some roundings are no randomness
            slack = 1e-5 if self.device.type != "cpu" else 1e-9
            if abs(first - second) > slack * max(abs(first), abs(second)):
                raise UserError(
                    f"loss must be a fixed function of the weights, got {first} and then {second} on the same batches; "
                    "fix augmentation and noise, and give batches as tensors"
                )


@contextmanager
def observing(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    eval_mode: bool = True,
    double: bool = False,
    parameters: Sequence[nn.Parameter] | None = None,
    seed: int = 0,
) -> Iterator[FixedLoss]:
    """Return a context with the function to look at; after it the host is bit-identical.

    Args:
        module: any module, float32 or float64; data-parallel wrappers taken off.
        loss: see :data:`Loss`.
        batches: see :data:`Batches`.
        eval_mode: look at it in eval mode: no dropout, running batch statistics. False keeps the modes of the host,
            with the same dropout masks at every evaluation.
        double: look at a copy in float64, floating-point tensors of the batches included.
        parameters: those to look at; None for all with `requires_grad`.
        seed: of the noise that the loss may contain.

    Raises:
        UserError: as for :class:`FixedLoss`.
    """
    with host_untouched(module), torch.inference_mode(False), torch.no_grad():
        if eval_mode:
            module.eval()
        if double:
            names = None if parameters is None else {id(p) for p in parameters}
            chosen = [names is None or id(p) in names for p in module.parameters()]
            module = copy.deepcopy(module).double()
            parameters = [p for p, keep in zip(module.parameters(), chosen, strict=True) if keep]
            batches = [(_doubled(batch), weight) for batch, weight in _pairs(batches)]
        yield FixedLoss(module, loss, batches, parameters=parameters, seed=seed)


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _doubled(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_doubled(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_doubled(item) for item in value)
    return value


def slowest(seconds: float, device: torch.device) -> float:
    """Return the largest of the values of all processes, where a process group exists: what all of them go by."""
    if _num_processes() > 1:
        value = torch.tensor(seconds, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        return float(value)
    return seconds


def _num_processes() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def is_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile was applied to the module, or to a part of it."""
    return any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in module.modules())


def mixes_examples(module: nn.Module) -> str | None:
    """Return the name of a layer that uses the statistics of the batch, as it is set now; None where there is none."""
    for name, layer in module.named_modules():
        # By what it keeps, not by its class: batch norms need not derive from torch's. Instance norm keeps the same,
        # but its statistics are those of an example.
        keeps = "running_mean" in layer._buffers and not isinstance(layer, nn.modules.instancenorm._InstanceNorm)
        if keeps and (layer.training or layer._buffers["running_mean"] is None):
            return str(name)
    return None
