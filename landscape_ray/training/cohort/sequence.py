"""A sequence of kernels as one call, which does not come back to Python between them.

PyTorch's interpreter of graphs starts a kernel sooner than Python does, and other threads may use Python meanwhile. The
graph has a node for each kernel, as it is; tensors are its inputs, all other arguments are constants.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

NUMBERS = {torch.strided: 0, torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2}
"""What the arguments that graphs have no constants of are in there."""


class Step(NamedTuple):
    """One kernel."""

    op: Any
    """An `OpOverload`."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    into: list[Tensor]
    """Where results are copied that the kernel cannot put there itself."""

    @property
    def arguments(self) -> list[Any]:
        """All arguments in the order of the schema."""
        places = self.op._schema.arguments
        given = dict(zip((place.name for place in places), self.args, strict=False)) | self.kwargs
        return [given.get(place.name, place.default_value) for place in places]


class Graph(ABC):
    """Some steps, for any tensors."""

    @abstractmethod
    def on(self, steps: Sequence[Step]) -> Callable[[], Any]:
        """Return what does these steps, the same as those of the graph but for their tensors."""


def graph_of(steps: Sequence[Step]) -> Graph:
    """Return a graph; these steps are done once on the way."""
    with torch.inference_mode():
        try:
            graph = Interpreted(steps)
            graph.on(steps)()
        except (AttributeError, RuntimeError, TypeError):  # of a PyTorch whose graphs are made in another way
            return OneByOne()
    return graph


class OneByOne(Graph):
    """Every kernel by a call from Python."""

    def on(self, steps: Sequence[Step]) -> Callable[[], Any]:
        """Return what does these steps."""
        kernels = [(functools.partial(step.op._op, *step.args, **step.kwargs), step.into) for step in steps]

        def run() -> None:
            for kernel, into in kernels:
                found = kernel()
                if into:
                    torch._foreach_copy_(into, [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)])

        return run


class Interpreted(Graph):
    """What PyTorch's interpreter does in one call."""

    def __init__(self, steps: Sequence[Step]) -> None:
        """Make the graph.

        Raises:
            TypeError: an argument is of a kind that graphs have no constants of, or some results are None.
        """
        self._graph = graph = torch._C.Graph()
        for step in steps:
            values = [self._value(argument) for argument in step.arguments]
            node = graph.insertNode(graph.create(step.op._schema.name, values, len(step.op._schema.returns)))
            if step.into and len(step.into) < len(step.op._schema.returns):
                raise TypeError(f"{step.op} leaves some results out")
            for found, place in zip(node.outputs(), map(self._value, step.into), strict=False):
                graph.insertNode(graph.create("aten::copy_", [place, found, graph.insertConstant(False)], 1))
        graph.registerOutput(graph.insertConstant(0))
        self._run = torch._C._create_function_from_graph("kernels", graph)

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            value = self._graph.addInput()
            value.setType(torch._C.TensorType.get())
            return value
        if _holds_tensors(argument):
            values = [self._value(each) for each in argument]
            node = self._graph.insertNode(self._graph.create("prim::ListConstruct", values, 1))
            node.output().setType(torch._C.ListType(torch._C.TensorType.get()))
            return node.output()
        number = NUMBERS.get(argument) if isinstance(argument, (torch.layout, torch.memory_format)) else None
        return self._graph.insertConstant(argument if number is None else number)

    def on(self, steps: Sequence[Step]) -> Callable[[], Any]:
        """Return what does these steps."""
        return functools.partial(self._run, *(tensor for step in steps for tensor in _tensors(step)))


def _holds_tensors(argument: Any) -> bool:
    return isinstance(argument, (list, tuple)) and any(isinstance(each, Tensor) for each in argument)


def _tensors(step: Step) -> Iterator[Tensor]:
    """Yield the tensors of a step in the order in which `Interpreted` makes inputs of them."""
    for argument in (*step.arguments, step.into):
        if isinstance(argument, Tensor):
            yield argument
        elif _holds_tensors(argument):
            yield from argument
