"""A sequence of kernels as one call, which does not come back to Python between them.

PyTorch's interpreter of graphs starts a kernel sooner than Python does, and other threads may use Python meanwhile. The
graph has a node for each kernel, as it is; tensors are its inputs, all other arguments are constants.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

NUMBERS = {torch.strided: 0, torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2}
"""What the arguments that graphs have no constants of are in there."""


class Number:
    """In the place of an argument: a float that is given at every call."""


class Step(NamedTuple):
    """One kernel."""

    op: Any
    """An `OpOverload`."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    into: Sequence[Tensor] = ()
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
    def on(self, steps: Sequence[Step]) -> Callable[..., Any]:
        """Return what does these steps, the same as those of the graph but for their tensors; it takes the numbers."""


def graph_of(steps: Sequence[Step]) -> Graph:
    """Return a graph; steps without a `Number` are done once on the way."""
    with torch.inference_mode():
        try:
            graph = Interpreted(steps)
            if not any(isinstance(argument, Number) for step in steps for argument in step.arguments):
                graph.on(steps)()
        except (AttributeError, RuntimeError, TypeError):  # of a PyTorch whose graphs are made in another way
            return OneByOne()
    return graph


class OneByOne(Graph):
    """Every kernel by a call from Python."""

    def on(self, steps: Sequence[Step]) -> Callable[..., Any]:
        """Return what does these steps."""
        kernels = []
        for step in steps:
            varying = [name for name, value in step.kwargs.items() if isinstance(value, Number)]
            kernels.append((functools.partial(step.op._op, *step.args, **step.kwargs), varying, step.into))

        def run(*numbers: float) -> None:
            left = iter(numbers)
            for kernel, varying, into in kernels:
                found = kernel(**{name: next(left) for name in varying})
                if into:
                    torch._foreach_copy_(list(into), [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)])

        return run


class Interpreted(Graph):
    """What PyTorch's interpreter does in one call."""

    def __init__(self, steps: Sequence[Step]) -> None:
        """Make the graph.

        Raises:
            TypeError: an argument is of a kind that graphs have no constants of, or some results are None.
        """
        self._graph = graph = cast(Any, torch._C.Graph())  # whose types do not know constants
        # lists are inputs as they are: what is written to the tensors of a list made here counts as unused
        tensor = torch._C.TensorType.get()
        kinds = [tensor if isinstance(each, Tensor) else torch._C.ListType(tensor) for each in _given(steps)]
        self._tensors = iter([self._input(kind) for kind in kinds])
        numbers = [each for step in steps for each in step.arguments if isinstance(each, Number)]
        self._numbers = iter([self._input(torch._C.FloatType.get()) for _ in numbers])
        for step in steps:
            schema = step.op._schema
            values = [
                self._value(argument, str(place.type))
                for argument, place in zip(step.arguments, schema.arguments, strict=True)
            ]
            node = graph.insertNode(graph.create(schema.name, values, len(schema.returns)))
            if node.schema() == "(no schema)":
                raise TypeError(f"{step.op} is unknown to graphs with these arguments")
            if step.into and len(step.into) < len(schema.returns):
                raise TypeError(f"{step.op} leaves some results out")
            for found, _ in zip(node.outputs(), step.into, strict=False):
                copied = [next(self._tensors), found, graph.insertConstant(False)]
                graph.insertNode(graph.create("aten::copy_", copied, 1))
        graph.registerOutput(graph.insertConstant(0))
        self._run = torch._C._create_function_from_graph("kernels", graph)

    def _input(self, kind: Any) -> Any:
        value = self._graph.addInput()
        value.setType(kind)
        return value

    def _value(self, argument: Any, kind: str) -> Any:
        if _is_given(argument, kind):
            return next(self._tensors)
        if isinstance(argument, Number):
            return next(self._numbers)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(argument)):
            raise TypeError(f"tensors cannot be given in a {kind}")
        number = NUMBERS.get(argument) if isinstance(argument, (torch.layout, torch.memory_format)) else None
        return self._graph.insertConstant(argument if number is None else number)

    def on(self, steps: Sequence[Step]) -> Callable[..., Any]:
        """Return what does these steps."""
        return functools.partial(self._run, *_given(steps))


def _is_given(argument: Any, kind: str) -> bool:
    return isinstance(argument, Tensor) or (kind == "List[Tensor]" and argument is not None)


def _given(steps: Sequence[Step]) -> list[Tensor | list[Tensor]]:
    """Return tensors and lists of tensors in the order of the inputs of `Interpreted`."""
    found: list[Tensor | list[Tensor]] = []
    for step in steps:
        pairs = zip(step.arguments, step.op._schema.arguments, strict=True)
        found += [argument for argument, place in pairs if _is_given(argument, str(place.type))]
        found += step.into
    return found
