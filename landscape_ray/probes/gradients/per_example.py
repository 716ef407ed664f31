"""Gradients of single examples and of micro-batches, and what statistics need of them.

An example is one row of `inputs`; its loss is the mean of its targets' losses. For a language model it is a sequence.
The gradients of examples come by the first route of these that gives, on two examples, what one backward pass for each
gives:

    factored   all parameters belong to linear layers (and layer norms) that see one vector for each example: one
               backward pass, and no gradient is written out
    vmap       torch.func.vmap of the gradient, in chunks
    loop       one backward pass for each example; works always

Measured on one CPU core, in gradients on the batch: a multilayer perceptron with 301k weights and 256 examples 2 in
factored form, 36 by vmap and 21 by loop; a convolutional net with 289k and 64 examples 2.6 by vmap and 4.6 by loop; a
GPT with 822k and 16 sequences of 128 tokens 1.4 by either.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FORWARD, Batches, FixedLoss, mixes_examples, weighted
from landscape_ray.probes.gradients.layer_calls import LayerCalls
from landscape_ray.probes.gradients.rows import DenseRows, FactoredRows, Rows
from landscape_ray.probes.gradients.units import MAX_BYTES, Gradients
from landscape_ray.probes.losses import DetailedLoss

ExampleRoute: TypeAlias = Literal["factored", "vmap", "loop"]
"""How gradients of examples are computed; see the module."""

VMAP_PRICE = 2.5
"""Of all examples by vmap, in gradients: 1.4 for GPTs, 2.6 for convolutional nets."""

LOOP_PRICE = 0.1
"""Of each example alone, in gradients on the batch: between 0.07 and 0.09 where the work of an example is not tiny."""

FACTORED_PRICE = 2.0
"""Of all examples in factored form, in gradients, with what is asked of them."""


class ExampleGradients(Gradients):
    """One gradient for each example; all count the same, whatever the weights of their micro-batches."""

    route: ExampleRoute
    row_price = LOOP_PRICE

    def __init__(
        self,
        function: FixedLoss,
        loss: DetailedLoss,
        *,
        route: ExampleRoute | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Choose the route.

        Args:
            function: see :class:`Gradients`, in eval mode.
            loss: that of `function`.
            route: None for the first that is right for the module.
            max_bytes: of gradients that are kept; as much again for those in work.

        Raises:
            UserError: batches that are not (inputs, targets) with one row for each example, or a layer that mixes them.
        """
        self.loss = loss
        self._pairs = [inputs_and_targets(batch) for batch, _ in function.batches]
        _check_apart(function.module)
        super().__init__(function, [1] * sum(len(inputs) for inputs, _ in self._pairs), max_bytes)
        names = {id(parameter): name for name, parameter in function.module.named_parameters()}
        self._names = [names[id(parameter)] for parameter in function.parameters]
        self.route = route or self._choose()

    def _choose(self) -> ExampleRoute:
        inputs, targets = self._pairs[0]
        ends = torch.tensor([0, len(inputs) - 1], device=inputs.device)
        inputs, targets = inputs[ends], targets[ends]
        wanted = self._by_loop(inputs, targets).matrix
        slack = 10 * torch.finfo(wanted.dtype).eps ** 0.5
        attempts: list[tuple[ExampleRoute, Callable[[Tensor, Tensor], Rows | None]]] = [("factored", self._by_factors)]
        if self._chunk > 1:  # one by one, the loop has the better kernels
            attempts.append(("vmap", self._by_vmap))
        for route, compute in attempts:
            try:
                with warnings.catch_warnings():
                    # where vmap has no rule for an operation it loops, with a warning: no gain, but memory
                    warnings.filterwarnings("error", message=".*batching rule.*")
                    rows = compute(inputs, targets)
            except Exception:
                continue  # whatever a route cannot do, the next one may
            if rows is not None:
                found = torch.stack([rows.combination(e) for e in torch.eye(2, device=inputs.device)])
                if bool(((found - wanted).norm(dim=1) <= slack * wanted.norm(dim=1)).all()):
                    return route
        return "loop"

    def _compute(self) -> Iterator[Rows]:
        function = self.function
        for inputs, targets in self._pairs:
            chunk = len(inputs) if self.route == "factored" else self._chunk
            for begin in range(0, len(inputs), chunk):
                rows = slice(begin, begin + chunk)
                share = len(inputs[rows]) / self.num_local
                match self.route:
                    case "factored":
                        function.spent_gradients += FACTORED_PRICE * share
                        factored = self._by_factors(inputs[rows], targets[rows])
                        assert factored is not None  # it was there when the route was chosen
                        yield factored
                    case "vmap":
                        function.spent_gradients += VMAP_PRICE * share
                        yield self._by_vmap(inputs[rows], targets[rows])
                    case "loop":
                        yield self._by_loop(inputs[rows], targets[rows])

    @property
    def _chunk(self) -> int:
        """Examples whose gradients are in work together: on a CPU few enough for its caches."""
        in_work = min(self.max_bytes, 2**24) if self.function.device.type == "cpu" else self.max_bytes
        return max(1, in_work // (self.function.size * self.function.dtype.itemsize))

    def _one(self, index: int) -> Tensor:
        for inputs, targets in self._pairs:
            if index < len(inputs):
                return self._by_loop(inputs[index : index + 1], targets[index : index + 1]).matrix[0]
            index -= len(inputs)
        raise IndexError(index)

    def _by_loop(self, inputs: Tensor, targets: Tensor) -> DenseRows:
        function = self.function
        function.spent_gradients += LOOP_PRICE * len(inputs)
        with function.surroundings():
            examples = zip(torch.split(inputs, 1), torch.split(targets, 1), strict=True)
            return DenseRows(torch.stack([function.flatten(function.differentiate(e)[1]) for e in examples]))

    def _by_vmap(self, inputs: Tensor, targets: Tensor) -> DenseRows:
        function = self.function

        def loss_of_one(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            outputs = torch.func.functional_call(function.module, parameters, (inputs[None],))
            return self.loss.per_target(outputs, targets[None]).mean()

        gradients = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))
        # neither the fused attention of the CPU nor compiled graphs have rules for vmap
        with function.surroundings(second_derivatives=True), sdpa_kernel(SDPBackend.MATH):
            function.seed_noise()
            parameters = {name: p.detach() for name, p in zip(self._names, function.parameters, strict=True)}
            found = gradients(parameters, inputs, targets)
            parts = [found[name].reshape(len(inputs), -1).to(function.dtype) for name in self._names]
        return DenseRows(torch.cat(parts, dim=1))

    def _by_factors(self, inputs: Tensor, targets: Tensor) -> FactoredRows | None:
        function = self.function
        with function.surroundings(), LayerCalls(len(inputs)) as calls:
            losses = _losses(function, self.loss, inputs, targets)
            parts = calls.parts(losses.sum(), function.parameters)
        return None if parts is None else FactoredRows([part.to(function.dtype) for part in parts])


def example_losses(function: FixedLoss, loss: DetailedLoss) -> Tensor:
    """Return the loss of each example of this process, (m,) float64; a forward.

    Args:
        function: on batches of `(inputs, targets)`, in eval mode.
        loss: that of `function`.

    Raises:
        UserError: batches that are not (inputs, targets) with one row for each example, a layer that mixes them, or a
            loss that does.
    """
    _check_apart(function.module)
    function.spent_gradients += FORWARD
    with function.surroundings(), torch.no_grad():
        return torch.cat(
            [_losses(function, loss, *inputs_and_targets(batch)).double() for batch, _ in function.batches]
        )


def _losses(function: FixedLoss, loss: DetailedLoss, inputs: Tensor, targets: Tensor) -> Tensor:
    function.seed_noise()
    losses = loss.per_target(function.module(inputs), targets)
    if losses.dim() == 0 or losses.numel() % len(inputs):
        raise UserError(
            "loss must give one value for each target where single examples are told apart, "
            f"got shape {tuple(losses.shape)} for {len(inputs)} examples; do not reduce it, or leave the probe out"
        )
    return losses.reshape(len(inputs), -1).mean(1)


def inputs_and_targets(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the two parts of a batch whose rows are examples.

    Raises:
        UserError: it is not of that form.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        inputs, targets = batch
        if inputs.dim() > 0 and targets.dim() > 0 and 0 < len(inputs) == len(targets):
            return inputs, targets
    raise UserError(
        f"batch must be a pair of tensors (inputs, targets) with one row for each example, got {type(batch).__name__}; "
        "single examples are taken from its rows"
    )


def _check_apart(module: nn.Module) -> None:
    if (layer := mixes_examples(module)) is not None:
        raise UserError(
            f"layer '{layer}' must use running statistics, got those of the batch, which mix its examples; "
            "measure in eval mode, with track_running_stats=True"
        )


def examples_at(batches: Batches, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of examples by their number, counted over all micro-batches, to look at them.

    Args:
        batches: of `(inputs, targets)`, see :data:`landscape_ray.probes.fixed_loss.Batches`.
        indices: (k,) int64.

    Returns:
        (k, ...) each, in the order of the indices.

    Raises:
        UserError: batches that are not such pairs.

    >>> batches = [((torch.tensor([1.0, 2.0]), torch.tensor([0, 1])), 2), ((torch.tensor([3.0]), torch.tensor([1])), 1)]
    >>> examples_at(batches, torch.tensor([2, 0]))
    (tensor([3., 1.]), tensor([1, 0]))
    """
    inputs, targets = zip(*(inputs_and_targets(batch) for batch, _ in weighted(batches)), strict=True)
    rows = [(b, i) for b, block in enumerate(inputs) for i in range(len(block))]
    chosen = [rows[i] for i in indices.tolist()]
    return torch.stack([inputs[b][i] for b, i in chosen]), torch.stack([targets[b][i] for b, i in chosen])
