"""Gradients of the units that a batch consists of, micro-batches or examples, and what statistics need of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.gradients.rows import DenseRows, Rows

MAX_BYTES = 2**28
"""Of gradients that are kept. What needs more computes them again."""


def check_max_bytes(max_bytes: int) -> None:
    """Check the memory for gradients.

    Raises:
        UserError: there is none.
    """
    if max_bytes < 1:
        raise UserError(f"max_bytes must be at least 1, got {max_bytes}; {MAX_BYTES} is usual")


class Gradients(ABC):
    """Gradients of units that a batch consists of: its examples, or its micro-batches.

    Where a process group exists, results cover the units of all processes, those of the first process first.

    Attributes:
        function: whose gradients; its weights must stay as they are.
        sizes: examples in each unit, (m,) float64.
        route: how they are computed.
        row_price: of the gradient of one unit by itself.
    """

    route: str
    row_price: float

    def __init__(self, function: FixedLoss, sizes: Sequence[int], max_bytes: int) -> None:
        check_max_bytes(max_bytes)
        self.function, self.max_bytes = function, max_bytes
        self.num_local = len(sizes)
        self.sizes, self._offset = gathered(torch.tensor(sizes, dtype=torch.float64, device=function.device))
        self._kept: list[Rows] | None = None

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self.sizes)

    @abstractmethod
    def _compute(self) -> Iterator[Rows]:
        """Return the gradients of this process, in order, in blocks of which two fit into memory."""

    @abstractmethod
    def _one(self, index: int) -> Tensor:
        """Return the gradient of one unit of this process, (size,)."""

    def _blocks(self) -> Iterator[Rows]:
        """Return the gradients of this process in blocks, kept from the first pass where they fit."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Rows] = []
        num_bytes = 0
        for block in self._compute():
            num_bytes += block.num_bytes
            if num_bytes <= self.max_bytes:
                kept.append(block)
            else:
                kept.clear()
            yield block
        if num_bytes <= self.max_bytes:
            self._kept = kept

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return squared norms (m,) float64, the mean gradient (size,), and the mean of the gradients at unit length.

        The mean weighs each unit by its size, that of unit gradients weighs all alike; gradients that are zero count as
        zero. One pass.
        """
        local = self.sizes[self._offset : self._offset + self.num_local]
        mean = torch.zeros(self.function.size, dtype=self.function.dtype, device=self.function.device)
        unit_mean = torch.zeros_like(mean)
        norms: list[Tensor] = []
        begin = 0
        for block in self._blocks():
            squared = block.squared_norms()
            mean += block.combination(local[begin : begin + len(block)])
            unit_mean += block.combination(inverse_roots(squared))
            norms.append(squared)
            begin += len(block)
        total, reduce = float(self.sizes.sum()), self.function.reduce
        return gathered(torch.cat(norms))[0], reduce(mean) / total, reduce(unit_mean) / len(self)

    def products(self, *vectors: Tensor) -> Tensor:
        """Return the inner products of k vectors (size,) with each gradient, (k, m) float64; one pass."""
        blocks = [torch.stack([block.products(vector) for vector in vectors]) for block in self._blocks()]
        return gathered(torch.cat(blocks, dim=1).mT)[0].mT

    def row(self, index: int) -> Tensor:
        """Return the gradient of one unit, (size,), computed by itself."""
        local = index - self._offset
        if 0 <= local < self.num_local:
            return self.function.reduce(self._one(local))
        return self.function.reduce(
            torch.zeros(self.function.size, dtype=self.function.dtype, device=self.function.device)
        )

    def gram(self) -> Tensor:
        """Return the inner products of the gradients of this process, (m, m) float64.

        Where they don't fit into memory, every pair of blocks is computed anew: k blocks cost (k + 1) / 2 passes.
        """
        gram = self.sizes.new_zeros(self.num_local, self.num_local)
        row = 0
        for block in self._blocks():
            rows = slice(row, row + len(block))
            column = 0
            for other in self._blocks():
                if column == row:  # the block itself: no need to have it twice
                    break
                columns = slice(column, column + len(other))
                gram[rows, columns] = block.gram(other)
                gram[columns, rows] = gram[rows, columns].mT
                column += len(other)
            gram[rows, rows] = block.gram(block)
            row += len(block)
        return gram


class MicroBatchGradients(Gradients):
    """One gradient for each micro-batch; one gradient in price, and as many vectors in memory as fit in `max_bytes`."""

    route = "micro_batches"

    def __init__(self, function: FixedLoss, *, max_bytes: int = MAX_BYTES) -> None:
        """Nothing is computed yet.

        Args:
            function: see :class:`Gradients`.
            max_bytes: of gradients that are kept.

        Raises:
            UserError: a micro-batch that does not tell its number of examples.
        """
        super().__init__(function, [num_examples(batch) for batch, _ in function.batches], max_bytes)
        self.row_price = 1 / self.num_local

    def _compute(self) -> Iterator[Rows]:
        for index in range(self.num_local):
            yield DenseRows(self._one(index)[None])

    def _one(self, index: int) -> Tensor:
        function = self.function
        batch, _ = function.batches[index]
        function.spent_gradients += 1 / self.num_local
        with function.surroundings():
            return function.flatten(function.differentiate(batch)[1])


def gathered(values: Tensor) -> tuple[Tensor, int]:
    """Return the values (m, ...) of all processes, those of the first process first, and where one's own begin."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values, 0
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, values.cpu())
    offset = sum(len(part) for part in parts[: torch.distributed.get_rank()])
    return torch.cat(parts).to(values.device), offset


def agreed(price: float) -> float:
    """Return the mean over all processes: a price that one decides by must be the same in all."""
    return float(gathered(torch.tensor([price], dtype=torch.float64))[0].mean())


def num_examples(batch: Any) -> int:
    """Return the number of examples: `batch.num_examples`, or the rows of the first tensor in it.

    Raises:
        UserError: there is neither.

    >>> num_examples((torch.zeros(4, 2), torch.zeros(4)))
    4
    """
    if hasattr(batch, "num_examples"):
        return int(batch.num_examples)
    first = batch
    while isinstance(first, (tuple, list, Mapping)) and first:
        first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    if not isinstance(first, Tensor) or first.dim() == 0:
        raise UserError(
            f"batch must have num_examples or begin with a tensor of one row for each example, "
            f"got {type(batch).__name__}; give it an attribute num_examples"
        )
    return len(first)


def inverse_roots(squares: Tensor) -> Tensor:
    """Return 1 / sqrt(squares), and 0 for 0.

    >>> inverse_roots(torch.tensor([4.0, 0.0]))
    tensor([0.5000, 0.0000])
    """
    return torch.where(squares > 0, squares.rsqrt(), 0.0)


def jackknife_error(left_out: Tensor) -> Tensor:
    """Return the standard error of a statistic from its values with one unit left out at a time.

        sqrt((m - 1) / m sum_u (t_(-u) - mean t_(-u))^2)

    Args:
        left_out: (..., m), m >= 2.

    References:
        Efron and Stein, The jackknife estimate of variance, Annals of Statistics 9(3), 1981: on average not too small.
    """
    num = left_out.shape[-1]
    deviations = left_out - left_out.mean(-1, keepdim=True)
    return math.sqrt((num - 1) / num) * deviations.square().sum(-1).sqrt()
