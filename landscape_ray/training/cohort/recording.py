"""The operations of a function on tensors, recorded once and done again in the same memory.

For a small network PyTorch takes longer to find out what to do (modules, the graph of the backward pass, memory for
every result) than to do it, the same in every update. A recording is the list of kernels with their arguments and the
places of their results, what a CUDA graph is on a GPU: whoever wants other results writes other values into the tensors
that the function read, and replays it. They are the same kernels in the same order, and so are the bits.

Places are used again as soon as nothing reads them any more, because what counts for small networks is how much of
their memory stays in the cache of the processor.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from landscape_ray.training.cohort.memory import zeros
from landscape_ray.training.cohort.sequence import Graph, Step, graph_of

Result = TypeVar("Result")

ALIGNMENT = 64
"""Bytes."""

LIMIT = 2**28
"""Bytes that a function may make: they are all there at once when it is recorded."""

CHANGING = {
    torch.Tag.data_dependent_output: "looks at values",
    torch.Tag.dynamic_output_shape: "gives results whose shapes depend on values",
}
"""What would not be the same again."""


_RECORDING = threading.Lock()
"""Held while a function is recorded: torch's modes keep something in common to all threads, as do its generators."""


class NotRecordableError(RuntimeError):
    """A function does something that cannot be done again on other values."""


class _Call(NamedTuple):
    """One kernel, and the tensors that it made."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[Tensor]

    def step(self) -> Step:
        """Return what does it again, with its results in the same places."""
        found = _writing(self.op)
        if self.made and found is not None and len(found[1]) == len(self.made):  # fewer where some are None
            op, names = found
            return Step(op, self.args, self.kwargs | dict(zip(names, self.made, strict=True)), [])
        return Step(self.op, self.args, self.kwargs, self.made)

    def mapped(self, move: Callable[[Tensor], Tensor]) -> _Call:
        """Return the call on other tensors."""
        return _Call(self.op, *tree_map_only(Tensor, move, (self.args, self.kwargs, self.made)))


class Recording(Generic[Result]):
    """What a function did.

    Attributes:
        result: what it returned; `replay` puts other values into the tensors in there.
    """

    def __init__(self, result: Result, calls: Sequence[_Call], graph: Graph) -> None:
        """Keep what `record` found, and the graph of these calls."""
        self.result, self._calls, self._graph = result, calls, graph
        self._run = graph.on([call.step() for call in calls])

    @torch.inference_mode()  # a kernel starts sooner than under no_grad
    def replay(self) -> Result:
        """Do it again; return `result`."""
        self._run()
        return self.result

    def moved(self, matrix: Tensor, rows: int) -> Recording[Result]:
        """Return the same for rows of a matrix that are so many further down; all other memory is common to both.

        Args:
            matrix: what the function read views of.
            rows: how many; may be negative.
        """
        place, shift = _place(matrix), rows * matrix.stride(0)

        def move(tensor: Tensor) -> Tensor:
            return _put(tensor, tensor.untyped_storage(), shift) if _place(tensor) == place else tensor

        return Recording(self.result, [call.mapped(move) for call in self._calls], self._graph)


def record(function: Callable[[], Result]) -> Recording[Result]:
    """Call a function and return what it did.

    Args:
        function: it may build and differentiate a graph. Of what it does besides operations on tensors nothing is done
            again. Tensors in its result, and those that it read, must not be written to but by `replay` and for it.

    Raises:
        NotRecordableError: it draws random numbers, looks at values, or makes more than `LIMIT`.
    """
    with _RECORDING, _Recorder() as recorder:
        result = function()
    offsets, num_bytes = _packed(recorder.calls, _tensors(result))
    memory = zeros(-(-num_bytes // 4), device=torch.device("cpu")).untyped_storage()

    def move(tensor: Tensor) -> Tensor:
        offset = offsets.get(_place(tensor))
        return tensor if offset is None else _put(tensor, memory, offset // tensor.element_size())

    calls = [call.mapped(move) for call in recorder.calls]
    return Recording(tree_map_only(Tensor, move, result), calls, graph_of([call.step() for call in calls]))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Sees every operation below autograd, those of backward passes too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.calls: list[_Call] = []
        self._made = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tag, what in CHANGING.items():
            if tag in op.tags:
                raise NotRecordableError(f"{op} {what}")
        # operations with this tag draw numbers under some arguments only
        before = torch.get_rng_state() if torch.Tag.nondeterministic_seeded in op.tags else None
        result = op(*args, **kwargs)
        if before is not None and not torch.equal(before, torch.get_rng_state()):
            raise NotRecordableError(f"{op} draws random numbers")
        if op._schema.is_mutable:
            self.calls.append(_Call(op, args, kwargs, []))
            return result
        made, given = _tensors(result), {_place(tensor) for tensor in _tensors((args, kwargs))}
        if any(_place(tensor) not in given for tensor in made):  # else a view, which sees what its memory holds
            self.calls.append(_Call(op, args, kwargs, made))
            self._made += sum(tensor.untyped_storage().nbytes() for tensor in made)
            if self._made > LIMIT:
                raise NotRecordableError(
                    f"it makes more than {LIMIT >> 20} MB, all of which a recording needs at first"
                )
        return result


def _packed(calls: Sequence[_Call], kept: Sequence[Tensor]) -> tuple[dict[int, int], int]:
    """Return where in one block of memory everything that calls made can be, so that it is small.

    Args:
        calls: in their order.
        kept: tensors to be read when all is done.

    Returns:
        Bytes from the start of the block, for each storage by its present place; and the size of the block.
    """
    last = {_place(tensor): number for number, call in enumerate(calls) for tensor in _tensors(call)}
    last |= {_place(tensor): len(calls) for tensor in kept}
    offsets: dict[int, int] = {}
    free: dict[int, list[int]] = defaultdict(list)
    sizes: dict[int, int] = {}
    end = 0
    for number, call in enumerate(calls):
        ending = {_place(t) for t in _tensors((call.args, call.kwargs)) if last[_place(t)] == number} & offsets.keys()
        for tensor in call.made:
            place, size = _place(tensor), -(-tensor.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
            heir = next((each for each in ending if _overwrites(call, tensor, each)), None)
            if heir is not None:
                ending.remove(heir)
                offsets[place] = offsets[heir]
            elif free[size]:
                offsets[place] = free[size].pop()
            else:
                offsets[place], end = end, end + size
            sizes[place] = size
        for place in ending | {_place(tensor) for tensor in call.made if last[_place(tensor)] == number}:
            free[sizes[place]].append(offsets[place])
    return offsets, end


def _overwrites(call: _Call, made: Tensor, place: int) -> bool:
    """Return whether a call may put what it makes where one of its arguments is: element by element."""
    there = [tensor for tensor in _tensors((call.args, call.kwargs)) if _place(tensor) == place]
    return torch.Tag.pointwise in call.op.tags and len(call.made) == 1 and all(_alike(t, made) for t in there)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and all(
        getattr(one, name)() == getattr(other, name)() for name in ("size", "stride", "storage_offset")
    )


@functools.cache
def _writing(op: Any) -> tuple[Any, tuple[str, ...]] | None:
    """Return the variant of an operation that takes the places of its results, and what it calls them."""
    wanted = _signature(op)
    for name in op.overloadpacket.overloads():
        other = getattr(op.overloadpacket, name)
        names = tuple(argument.name for argument in other._schema.arguments if argument.is_write)
        if len(names) == len(op._schema.returns) and _signature(other, names) == wanted:
            return other, names
    return None


def _signature(op: Any, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    return [(each.name, str(each.type)) for each in op._schema.arguments if each.name not in without]


def _put(tensor: Tensor, storage: UntypedStorage, shift: int = 0) -> Tensor:
    """Return a tensor like this one in a storage, so many elements further on."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, tensor.storage_offset() + shift, tensor.size(), tensor.stride())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
