"""The promise that a probe leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def host_untouched(module: nn.Module) -> Iterator[None]:
    """Return a context after which module and global random generators are bit-identical, also after an exception.

    Covered: parameters, their `.grad` (values, identity, absence) and `requires_grad`; buffers, such as running
    statistics of batch norm; train or eval mode of every submodule; the global generators of torch (CPU, and CUDA
    once initialised), Python and numpy. Identity counts too: a tensor that the body swapped for another is swapped
    back, so the optimizer and views into flat storage keep pointing at the right memory. Version counters do not
    move, so a graph that the host holds stays usable.

    Not covered, because nothing here touches it: the optimizer; and because it is out of sight: state that a loss
    function keeps outside the module, such as a metric or a file.

    Args:
        module: the module to protect. Memory: one copy of its parameters, gradients and buffers.

    >>> layer = nn.Dropout()
    >>> with host_untouched(layer):
    ...     _ = layer.eval()
    >>> layer.training
    True
    """
    members = [(m, m.training, dict(m._parameters), dict(m._buffers)) for m in module.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    gradients = [grad for _, _, grad in parameters if grad is not None]
    contents = _Contents([*module.parameters(), *module.buffers(), *gradients])
    generators = _Generators()
    try:
        yield
    finally:
        for member, training, own_parameters, own_buffers in members:
            member.training = training
            _refill(member._parameters, own_parameters)
            _refill(member._buffers, own_buffers)
        contents.restore()
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        generators.restore()


def _refill(target: dict[str, Any], saved: dict[str, Any]) -> None:
    target.clear()
    target.update(saved)


class _Contents:
    """The memory of some tensors, and a copy of what was in it."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.memory = [t.data for t in tensors]  # aliases: `.data` writes past the version counter, which is the point
        self.copies = [memory.clone() for memory in self.memory]

    def restore(self) -> None:
        if self.memory:
            torch._foreach_copy_(self.memory, self.copies)
        for tensor, memory in zip(self.tensors, self.memory, strict=True):
            tensor.data = memory


class _Generators:
    """The states of the global random generators."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        # A device that nobody has initialised has no state to keep, and asking would initialise it.
        cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.cuda = torch.cuda.get_rng_state_all() if cuda else None
        self.python = random.getstate()
        self.numpy = np.random.get_state()  # noqa: NPY002 - the host may use it

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
