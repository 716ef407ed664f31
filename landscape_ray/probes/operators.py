"""Hessian-vector products of the mean loss over fixed micro-batches.

    L(w) = sum_i share_i loss(module, batch_i),    share_i = weight_i / sum_j weight_j

With the numbers of examples as weights, and a loss that is a mean over examples, unequal micro-batches (200 + 56) give
exactly the full batch. Vectors are flat, over the parameters with `requires_grad`, in the order of
`module.parameters()`: frozen parameters are left out, tied weights are counted once.

Every evaluation of the loss sees the same state of torch's random generators, so that noise (dropout in train mode)
is a constant of the function whose Hessian is taken; the host's generators are put back. Autocast is switched off
around the loss: curvature from bfloat16 products is mostly rounding. A loss that enters autocast itself keeps it.

Prices are in gradients (one forward and backward on all batches), as measured on small GPTs and convolutional nets.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape_ray.errors import UserError

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""`loss(module, batch)`: the mean loss of one micro-batch, a scalar tensor."""

Batches: TypeAlias = Sequence[Any]
"""Pairs `(batch, weight)`, or batches with an attribute `num_examples`. A single batch needs no weight."""


def weighted(batches: Batches) -> list[tuple[Any, float]]:
    """Return `(batch, share)` pairs whose shares sum to one.

    Args:
        batches: pairs `(batch, weight)` with weight > 0, or batches with `num_examples` > 0, or one batch as it is.

    Raises:
        UserError: no batches, several without weights, or a weight that is not positive and finite.

    >>> weighted([("long", 200), ("short", 50)])
    [('long', 0.8), ('short', 0.2)]
    """
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
    total = math.fsum(weight for _, weight in pairs)
    return [(batch, weight / total) for batch, weight in pairs]


class CurvatureOperator(ABC):
    """A symmetric matrix over the trainable parameters, known by its products with vectors.

    Attributes:
        size: number of trainable parameters.
        dtype, device: of the vectors.
        num_matvecs: products so far.
        mean_loss: L(w); nan before the first product.
        setup_gradients: price of what is computed once.
        matvec_gradients: price of one product.
    """

    setup_gradients: float
    matvec_gradients: float
    needs_second_derivatives: ClassVar[bool]

    def __init__(self, module: nn.Module, loss: Loss, batches: Batches, *, seed: int = 0) -> None:
        """Take the function apart; nothing is computed yet.

        Args:
            module: float32 or float64 parameters on one device. Its mode is used as it is: call `eval()` before, unless
                dropout and batch statistics are meant to be part of the function.
            loss: see :data:`Loss`.
            batches: see :data:`Batches`; on the device of the module.
            seed: of the noise that the loss may contain.

        Raises:
            UserError: parameters that are not float32 or float64, spread over devices, or all frozen; batches that
                `weighted` refuses.
        """
        for name, parameter in module.named_parameters():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise UserError(
                    f"parameter '{name}' must be float32 or float64, got {parameter.dtype}; "
                    "measure a copy: copy.deepcopy(module).float()"
                )
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise UserError(
                "module must have a parameter with requires_grad, got none; unfreeze what is to be measured"
            )
        devices = sorted({str(p.device) for p in module.parameters()})
        if len(devices) > 1:
            raise UserError(f"module must be on one device, got {', '.join(devices)}; move a copy of it")
        self.module, self.loss, self.batches, self.seed = module, loss, weighted(batches), seed
        self.size = sum(p.numel() for p in self.parameters)
        self.dtype = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        self.device = self.parameters[0].device
        self.num_matvecs = 0
        self.mean_loss = math.nan

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the product with `vector`, shape (size,); both finite or not, nothing is raised for that.

        Raises:
            UserError: wrong shape; or the loss is not a scalar, or does not depend on the parameters.
        """
        if vector.shape != (self.size,):
            raise UserError(f"vector must have shape ({self.size},), got {tuple(vector.shape)}")
        self.num_matvecs += 1
        with self._surroundings():
            return self._product(vector.to(dtype=self.dtype, device=self.device))

    @property
    def price_gradients(self) -> float:
        """What has been spent so far, in gradients."""
        return (self.setup_gradients if self.num_matvecs else 0.0) + self.num_matvecs * self.matvec_gradients

    @abstractmethod
    def _product(self, vector: Tensor) -> Tensor: ...

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors shaped like the trainable parameters as one vector."""
        return torch.cat([t.detach().reshape(-1).to(self.dtype) for t in tensors])

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Return the parts of a vector, each in the shape and dtype of its parameter."""
        parts = torch.split(vector, [p.numel() for p in self.parameters])
        return [part.view(p.shape).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)]

    def _gradient(self, batch: Any) -> tuple[float, tuple[Tensor, ...]]:
        """Return loss and gradient of one micro-batch, with their graph if the operator differentiates twice."""
        torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would reach devices that are not put back
        if self.device.type == "cuda":
            torch.cuda.manual_seed(self.seed)
        value = self.loss(self.module, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"loss must return a scalar tensor, the mean over the batch, got {found}")
        if not value.requires_grad:
            raise UserError("loss must depend on the trainable parameters, got a constant; do not detach it")
        gradient = torch.autograd.grad(
            value.squeeze(), self.parameters, create_graph=self.needs_second_derivatives, materialize_grads=True
        )
        return float(value.detach()), gradient

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Return the context of every product: gradients on, autocast off, the host's generators put back."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))  # backward passes look at it, too
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(torch.random.fork_rng([self.device] if self.device.type == "cuda" else []))
            if self.needs_second_derivatives:
                # Neither fused attention nor compiled graphs can be differentiated twice.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield


class HessianOperator(CurvatureOperator):
    """Exact products `H v = grad(grad L . v)` by differentiating the gradient once more.

    With one micro-batch the graph of the gradient is kept, and a product costs 2.3 gradients: what fits for one
    product then fits for all, since the graph is needed during a product anyway. With several micro-batches the graph
    is built anew for each, which costs 3.5 gradients and the memory of one micro-batch.

    The weights must stay as they are while the operator is in use.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994.

    >>> module = nn.Linear(2, 1, bias=False)  # 0.5 (w1 x1 + w2 x2)^2: H = x x'
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> hessian = HessianOperator(module, lambda m, batch: 0.5 * m(batch).square().mean(), [x])
    >>> hessian(torch.tensor([1.0, 0.0]))
    tensor([1., 2.])
    """

    needs_second_derivatives = True

    def __init__(
        self, module: nn.Module, loss: Loss, batches: Batches, *, retain_graph: bool | None = None, seed: int = 0
    ) -> None:
        """Take the function apart; nothing is computed yet.

        Args:
            module: see :class:`CurvatureOperator`.
            loss: see :data:`Loss`.
            batches: see :data:`Batches`.
            retain_graph: keep the graphs of all micro-batches; None keeps it for a single one.
            seed: of the noise that the loss may contain.
        """
        super().__init__(module, loss, batches, seed=seed)
        self.retain_graph = len(self.batches) == 1 if retain_graph is None else retain_graph
        self.setup_gradients = 1.2 if self.retain_graph else 0.0
        self.matvec_gradients = 2.3 if self.retain_graph else 3.5
        self._graphs: list[tuple[float, tuple[Tensor, ...]]] | None = None
        self._versions = [p._version for p in self.parameters]

    def release(self) -> None:
        """Free the graph; the next product builds it again."""
        self._graphs = None

    def _product(self, vector: Tensor) -> Tensor:
        if self._versions != [p._version for p in self.parameters]:
            raise UserError(
                "weights must stay as they are while an operator is in use; build a new one after an update"
            )
        if self.retain_graph and self._graphs is None:
            self._graphs = [self._gradient(batch) for batch, _ in self.batches]
        direction = self.unflatten(vector)
        product = torch.zeros_like(vector)
        mean_loss = 0.0
        for index, (batch, share) in enumerate(self.batches):
            value, gradient = self._graphs[index] if self._graphs is not None else self._gradient(batch)
            product.add_(self._differentiate(gradient, direction), alpha=share)
            mean_loss += share * value
        self.mean_loss = mean_loss
        return product

    def _differentiate(self, gradient: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
        # A parameter that enters linearly, or not at all, has a gradient without a graph: its rows are zero.
        pairs = [(g, d) for g, d in zip(gradient, direction, strict=True) if g.requires_grad]
        if not pairs:
            return torch.zeros(self.size, dtype=self.dtype, device=self.device)
        products = torch.autograd.grad(
            [g for g, _ in pairs],
            self.parameters,
            grad_outputs=[d for _, d in pairs],
            retain_graph=self.retain_graph,
            materialize_grads=True,
        )
        return self.flatten(products)


class FiniteDifferenceHessian(CurvatureOperator):
    """Products by differences of gradients, for smooth networks: one gradient each, or two for a central one.

        H v = |v| (g(w + eps v/|v|) - g(w)) / eps + O(eps)

    The error sits where it matters: on a GPT with 241k weights, early in training, eps = 0.02 is off by 0.3 % for a
    random v, but by 9 % along the sharpest direction, where the curvature changes within the step; 0.005 by 0.1 % and
    2 %. So check along the vector that was found, not along a random one. Networks with kinks (ReLU, max pooling) are
    not for this: a difference sees the kinks that it crosses, and stops being symmetric.

    Fused attention and compiled modules work and keep their speed. The weights are moved during a product and put back
    bit by bit, also after an exception.
    """

    needs_second_derivatives = False
    setup_gradients = 1.0
    matvec_gradients = 1.0

    def __init__(
        self, module: nn.Module, loss: Loss, batches: Batches, *, eps: float | None = None, seed: int = 0
    ) -> None:
        """Take the function apart; nothing is computed yet.

        Args:
            module: see :class:`CurvatureOperator`.
            loss: see :data:`Loss`.
            batches: see :data:`Batches`.
            eps: length of the step in parameter space, > 0. None: 0.005 in float32, where rounding and curvature
                weigh the same for random vectors on small GPTs; in proportion to sqrt(machine epsilon).
            seed: of the noise that the loss may contain.

        Raises:
            UserError: eps is not positive and finite.
        """
        super().__init__(module, loss, batches, seed=seed)
        if eps is None:
            eps = 0.005 * math.sqrt(torch.finfo(self.dtype).eps / torch.finfo(torch.float32).eps)
        if not (math.isfinite(eps) and eps > 0):
            raise UserError(f"eps must be positive and finite, got {eps}; 0.005 suits float32")
        self.eps = eps
        self._base: Tensor | None = None

    def _product(self, vector: Tensor) -> Tensor:
        if self._base is None:
            self.mean_loss, self._base = self._mean_gradient()
        length = float(torch.linalg.vector_norm(vector))
        if length == 0.0:
            return torch.zeros_like(vector)
        ahead = self._gradient_at(vector * (self.eps / length))
        return ahead.sub_(self._base).mul_(length / self.eps)

    def central(self, vector: Tensor) -> Tensor:
        """Return the product with `vector`, not zero, to second order in a quarter of the step; two gradients.

        Meant for eigenvectors, whose products are large enough for the shorter step.
        """
        self.num_matvecs += 2
        length = float(torch.linalg.vector_norm(vector))
        step = vector * (0.25 * self.eps / length)
        with self._surroundings():
            ahead, behind = self._gradient_at(step), self._gradient_at(-step)
        return ahead.sub_(behind).mul_(length / (0.5 * self.eps))

    def _gradient_at(self, step: Tensor) -> Tensor:
        with self._moved_by(self.unflatten(step)):
            return self._mean_gradient()[1]

    def _mean_gradient(self) -> tuple[float, Tensor]:
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        mean_loss = 0.0
        for batch, share in self.batches:
            value, gradient = self._gradient(batch)
            total.add_(self.flatten(gradient), alpha=share)
            mean_loss += share * value
        return mean_loss, total

    @contextmanager
    def _moved_by(self, step: Sequence[Tensor]) -> Iterator[None]:
        originals = [p.detach().clone() for p in self.parameters]
        try:
            for parameter, original, delta in zip(self.parameters, originals, step, strict=True):
                # `.data`: version counters stay, so graphs that the host holds are usable once the bits are back.
                parameter.data.copy_(original + delta)
            yield
        finally:
            for parameter, original in zip(self.parameters, originals, strict=True):
                parameter.data.copy_(original)
