"""One model over several processes: each computes its part of every batch, and all take the same step.

Where a process group of torch.distributed exists, a `TrainState` is one replica of a run, as probes take theirs for one
part of a measurement. Batches, updates and held-out losses are those of the run in one process, up to the rounding of
sums: the batch of a step is cut into equal parts, gradients are averaged before they are clipped, and sums over
held-out examples are added up. Every process keeps weights and optimizer whole. Only dropout differs: each process has
masks of its own, so that they depend on how many there are.

Not torch's DistributedDataParallel, for two reasons. It lays its buckets out anew after the first update of a process,
in the order in which gradients came: with three processes or more an element is then summed in another order, and a run
that is continued is no longer the undisturbed one to the bit. And probes, averages and checkpoints want the module
itself. The price is that gradients travel after the backward pass and not during it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import mixes_examples

if TYPE_CHECKING:
    from landscape_ray.training.config import TrainConfig

BUCKET_BYTES = 32 * 2**20
"""Gradients that travel as one message. Fewer cost latency, and each takes its size in memory meanwhile."""

T = TypeVar("T")


class World(NamedTuple):
    """The processes of a run."""

    rank: int = 0
    size: int = 1

    def part(self, items: Sequence[T]) -> list[T]:
        """Return this process' share of items that stand for themselves: every `size`-th."""
        return list(items[self.rank :: self.size])

    def slice(self, tensor: Tensor) -> Tensor:
        """Return this process' share of a batch, equal and consecutive parts of its first axis where they divide it."""
        return tensor if self.size == 1 else tensor.tensor_split(self.size)[self.rank]


def world() -> World:
    """Return rank and size of the process group; of a single process where there is none."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return World()
    return World(distributed.get_rank(), distributed.get_world_size())


def check_parts(config: TrainConfig, num_workers: int) -> None:
    """Raise unless a run can be cut into equal parts.

    Raises:
        UserError: a batch that does not divide, or a probe that needs all its examples in one process.
    """
    if num_workers == 1:
        return
    if config.batch_size % (num_workers * config.accumulation_steps):
        raise UserError(
            f"batch_size must be a multiple of workers x accumulation_steps = {num_workers} x "
            f"{config.accumulation_steps}, got {config.batch_size}; each worker takes an equal part of every batch"
        )
    for name, table in config.probes.tables.items():
        if name == "opposing_signals":
            raise UserError("probes.opposing_signals must be measured in one process, got workers; leave the probe out")
        too_few = table.batch_size if table.num_batches == 1 else table.num_batches
        if too_few != "auto" and too_few < num_workers:
            field = "batch_size" if table.num_batches == 1 else "num_batches"
            raise UserError(
                f"probes.{name}.{field} must be at least the number of workers, {num_workers}, got {too_few}; "
                "each measures its part"
            )


def check_module(module: nn.Module, num_workers: int) -> None:
    """Raise for a network whose output for an example depends on the others of its batch, which is cut here.

    Raises:
        UserError: names the layer.
    """
    if num_workers > 1 and (layer := mixes_examples(module)) is not None:
        raise UserError(
            f"a model over {num_workers} workers must not use statistics of the batch, got the batch normalisation "
            f"'{layer}'; choose another normalisation (group, layer), or workers = 1"
        )


def probe_part(batches: list[tuple[tuple[Tensor, Tensor], int]]) -> list[tuple[tuple[Tensor, Tensor], int]]:
    """Return this process' share of a probe's batches: whole ones, or of a single one a slice."""
    here = world()
    if here.size == 1 or not batches:
        return batches
    if len(batches) > 1:
        return here.part(batches)
    ((inputs, targets), _) = batches[0]
    inputs = here.slice(inputs)
    return [((inputs, here.slice(targets)), len(inputs))]


def total(values: Tensor) -> Tensor:
    """Return the sum over all processes."""
    if world().size > 1:
        distributed.all_reduce(values)
    return values


class Reducer:
    """Averages the gradients of a run over its processes, each in the same place of the same message every time.

    Args:
        parameters: in the same order in every process.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._size = world().size
        self._present: list[bool] | None = None

    @torch.no_grad()
    def __call__(self, loss: Tensor) -> Tensor:
        """Put the mean gradients into `.grad`; return the mean loss. In one process nothing happens.

        Raises:
            UserError: the network uses other parameters than in its first update.
        """
        if self._size == 1:
            return loss
        present = [parameter.grad is not None for parameter in self._parameters]
        if self._present is None:  # those that any process has: the mean is zero in the others, not nothing
            counts = torch.tensor(present, dtype=torch.int32, device=loss.device)
            self._present = total(counts).bool().tolist()
        if any(here and not known for here, known in zip(present, self._present, strict=True)):
            raise UserError(
                "a model over several workers must use the same parameters in every update, got one that had no "
                "gradient in the first; set workers = 1"
            )
        gradients = [loss.clone()]
        for parameter, known in zip(self._parameters, self._present, strict=True):
            if known:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        sent = []
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            sent.append((bucket, flat, distributed.all_reduce(flat, async_op=True)))
        for bucket, flat, work in sent:
            assert work is not None
            work.wait()
            flat /= self._size
            for gradient, mean in zip(bucket, torch.split(flat, [each.numel() for each in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        return gradients[0]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield consecutive tensors of one type, up to a size."""
    bucket: list[Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or num_bytes + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(tensor)
        num_bytes += tensor.nbytes
    if bucket:
        yield bucket


@torch.no_grad()
def fingerprint(module: nn.Module) -> int:
    """Return a sum over the bits of all parameters: equal for equal weights, in whatever order it is taken."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [
        parameter.detach().contiguous().view(whole[parameter.element_size()]).sum(dtype=torch.int64) * (2 * index + 1)
        for index, parameter in enumerate(module.parameters())
    ]
    return int(torch.stack([each.cpu() for each in sums]).sum())
