"""How the gradients of several members are computed: one program for all of them, or one after the other.

    stacked   the network works on stacked parameters itself: every layer is one batched product
    recorded  as stacked, without asking the network again in every update (on the CPU)
    abreast   recorded programs side by side, one on each thread of the CPU
    graphed   the same as a CUDA graph
    vmap      torch.func.vmap turns the network's forward into one for stacked parameters
    single    the members' own modules, one after the other

All take the weights from the same memory and leave the gradients in the same kind of matrix, so that a cohort may
change from one to another at any update. A program covers some neighbouring rows: the intermediate values of a few
members fit into the cache where those of all do not.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape_ray.data import Batch
from landscape_ray.models.layers import Dropout, reserved
from landscape_ray.training.cohort.buffers import Buffers, stacked_views
from landscape_ray.training.cohort.recording import Recording, record
from landscape_ray.training.precision import autocast
from landscape_ray.training.state import TrainState


class Program(ABC):
    """Computes losses, gradients and outputs of c members that are neighbours.

    Attributes:
        rows: their rows in the buffers.
        members: the runs.
        gradients: (c, P), where the gradients go.
    """

    name: ClassVar[str]
    side_by_side: ClassVar[bool] = False
    """Whether threads share programs out, and not each kernel."""

    def __init__(self, buffers: Buffers, members: Sequence[TrainState], rows: slice, gradients: Tensor) -> None:
        """Take the rows of `members` (all of the cohort's), and c rows of memory, zero, for the gradients."""
        self.rows, self.members, self.gradients = rows, members[rows], gradients
        self._into = stacked_views(gradients, buffers.slots)

    @property
    @abstractmethod
    def _leaves(self) -> list[Tensor]:
        """The weights to differentiate by, in the order of the slots, each with the shape of its gradient's view."""

    @abstractmethod
    def train(self, steps: Sequence[int]) -> None:
        """Put what `losses` uses into training mode, with the dropout of these steps."""

    @abstractmethod
    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean training loss of each member, (c,), for inputs and targets (c, B, ...)."""

    @abstractmethod
    def outputs(self, inputs: Tensor) -> Tensor:
        """Return the outputs of each member in evaluation mode, (c, B, ...), for inputs (B, ...) shared by all."""

    def follow(self, leader: Program) -> None:  # noqa: B027 - most programs have nothing to share
        """Share memory with a program of the same route that is run before this one."""

    def gradient(self, inputs: Tensor, targets: Tensor, steps: Sequence[int]) -> Tensor:
        """Put the gradient of each member's mean loss into its row of `gradients`; return the losses, (c,).

        Args:
            inputs: (c, B, ...).
            targets: (c, B, ...).
            steps: updates completed before this one, for each member.

        Raises:
            RuntimeError: a parameter has no part in the loss.
        """
        config = self.members[0].config
        parts = config.accumulation_steps
        return self._part(inputs, targets, steps) if parts == 1 else self._parts(inputs, targets, steps, parts)

    def _part(self, inputs: Tensor, targets: Tensor, steps: Sequence[int], *, add: bool = False) -> Tensor:
        self.train(steps)
        with autocast(self.gradients.device, self.members[0].config.precision):
            losses = self.losses(inputs, targets)
        # one backward pass couples nothing: the loss of a member depends on its own weights only
        found = torch.autograd.grad(losses, self._leaves, torch.ones_like(losses))
        if add:
            torch._foreach_add_(self._into, found)
        else:
            torch._foreach_copy_(self._into, found)
        return losses.detach()

    def _parts(self, inputs: Tensor, targets: Tensor, steps: Sequence[int], parts: int) -> Tensor:
        total = torch.zeros(len(self.members), device=self.gradients.device)
        for index, (x, y) in enumerate(zip(inputs.chunk(parts, 1), targets.chunk(parts, 1), strict=True)):
            total += self._part(x, y, [step * parts + index for step in steps], add=index > 0)
        self.gradients.div_(parts)
        return total / parts


class Single(Program):
    """One member, by its own module."""

    name = "single"

    def __init__(self, buffers: Buffers, members: Sequence[TrainState], rows: slice, gradients: Tensor) -> None:
        super().__init__(buffers, members, rows, gradients)
        (self._member,) = self.members
        self._into = [view[0] for view in self._into]
        self._parameters = buffers.parameters(self._member)

    @property
    def _leaves(self) -> list[Tensor]:
        return self._parameters

    def train(self, steps: Sequence[int]) -> None:
        """Put the member's module into training mode."""
        module = self._member.module
        if not module.training:
            module.train()
        module.set_noise(self._member.config.seed, steps[0])

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the member's loss, (1,)."""
        return self._member.loss((inputs[0], targets[0])).view(1)

    def outputs(self, inputs: Tensor) -> Tensor:
        """Return the member's outputs, (1, B, ...)."""
        self._member.module.eval()
        outputs: Tensor = self._member.module(inputs)
        return outputs[None]


class _Joint(Program):
    """What stacked and vmap share: a module that stands for all members, and their dropout."""

    def __init__(self, buffers: Buffers, members: Sequence[TrainState], rows: slice, gradients: Tensor) -> None:
        super().__init__(buffers, members, rows, gradients)
        self._stack = [view.detach().requires_grad_() for view in stacked_views(buffers.weights[rows], buffers.slots)]
        self._module = self._skeleton(buffers.parameters(self.members[0]))
        self._noisy = [
            (layer, [member.module.get_submodule(name) for member in self.members])
            for name, layer in self._module.named_modules()
            if isinstance(layer, Dropout)
        ]
        for layer, own in self._noisy:
            layer.active = any(each.active for each in own)
            layer.rate = torch.stack([each.rate for each in own])  # type: ignore[misc]
            layer.key = torch.zeros(len(own), dtype=torch.int64, device=gradients.device)
        self._noisy = [(layer, own) for layer, own in self._noisy if layer.active]

    def _skeleton(self, parameters: list[Tensor]) -> nn.Module:
        """Return the module that `_apply` uses."""
        # what deepcopy finds in its memo it does not copy
        memo = {id(parameter): parameter for parameter in parameters}
        return copy.deepcopy(self.members[0].module, memo)

    @abstractmethod
    def _apply(self, inputs: Tensor) -> Tensor:
        """Return the outputs for stacked inputs (c, B, ...)."""

    @property
    def _leaves(self) -> list[Tensor]:
        return self._stack

    def train(self, steps: Sequence[int]) -> None:
        if not self._module.training:
            self._module.train()
        if not self._noisy:
            return
        seeds = [member.config.seed for member in self.members]
        for layer, _ in self._noisy:
            keys = [layer.key_for(seed, step) for seed, step in zip(seeds, steps, strict=True)]
            layer.key.copy_(torch.tensor(keys))

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        per_target = self.members[0].objective.per_target(self._apply(inputs), targets)
        return per_target.view(len(self.members), -1).mean(1)

    def outputs(self, inputs: Tensor) -> Tensor:
        self._module.eval()
        return self._apply(inputs.expand(len(self.members), *inputs.shape))


class Stacked(_Joint):
    """Neighbouring members by one module whose parameters are stacked ones."""

    name = "stacked"

    def __init__(self, buffers: Buffers, members: Sequence[TrainState], rows: slice, gradients: Tensor) -> None:
        super().__init__(buffers, members, rows, gradients)
        compiled = self.members[0].config.compile
        self._call: Any = torch.compile(self._module) if compiled else self._module

    def _skeleton(self, parameters: list[Tensor]) -> nn.Module:
        memo = {id(parameter): leaf for parameter, leaf in zip(parameters, self._stack, strict=True)}
        return copy.deepcopy(self.members[0].module, memo)

    def _apply(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self._call(inputs)
        return outputs


class Recorded(Stacked):
    """Neighbouring members as stacked ones, by a recording of what that does in its first update.

    Programs of one size have a recording in common, and all of its memory but for the weights.
    """

    name = "recorded"

    def __init__(self, buffers: Buffers, members: Sequence[TrainState], rows: slice, gradients: Tensor) -> None:
        super().__init__(buffers, members, rows, gradients)
        self._weights = buffers.weights
        self._ones = torch.ones(len(self.members))  # made once, and not by the recording
        self._rates = [layer.rate for layer, _ in self._noisy]
        self._leader = self
        self._batches: dict[torch.Size, Batch] = {}
        self._recordings: dict[torch.Size, Recording[_Found]] = {}

    def follow(self, leader: Program) -> None:
        """Use the recording of a program whose members are as many, and drop out in the same layers."""
        assert isinstance(leader, Recorded)
        layers = [layer.salt for layer, _ in self._noisy]
        if len(leader.members) == len(self.members) and layers == [layer.salt for layer, _ in leader._noisy]:
            self._leader = leader
            pairs = zip(leader._noisy, self._noisy, strict=True)
            self._noisy = [(layer, own) for (layer, _), (_, own) in pairs]

    def train(self, steps: Sequence[int]) -> None:
        """Put the dropout of these members and steps where the recording reads it."""
        super().train(steps)
        for (layer, _), rate in zip(self._noisy, self._rates, strict=True):
            layer.rate.copy_(rate)

    def _part(self, inputs: Tensor, targets: Tensor, steps: Sequence[int], *, add: bool = False) -> Tensor:
        recording = self._recording(inputs, targets)
        self.train(steps)
        for place, given in zip(self._leader._batches[inputs.shape], (inputs, targets), strict=True):
            place.copy_(given)
        losses, into, found = recording.replay()
        if add:
            torch._foreach_add_(into, found)
        elif into:
            torch._foreach_copy_(into, found)
        return losses.clone()  # of the next program they will be in the same place

    def _recording(self, inputs: Tensor, targets: Tensor) -> Recording[_Found]:
        """Return the recording for batches of this shape; make it from this one where there is none yet."""
        shape, leader = inputs.shape, self._leader
        if shape not in self._recordings:
            if leader is self:
                self._batches[shape] = inputs.contiguous().clone(), targets.contiguous().clone()
                self.train([0] * len(self.members))
                self._recordings[shape] = record(lambda: self._found(*self._batches[shape]))
            else:
                rows = self.rows.start - leader.rows.start
                self._recordings[shape] = leader._recording(inputs, targets).moved(self._weights, rows)
        return self._recordings[shape]

    def _found(self, inputs: Tensor, targets: Tensor) -> _Found:
        config = self.members[0].config
        with autocast(self.gradients.device, config.precision):
            losses = self.losses(inputs, targets)
        places = list(zip(self._leaves, self._into, strict=True)) if config.accumulation_steps == 1 else []
        if torch.get_num_threads() > 1:
            # several threads share a batched product whose result is in one piece, and only that
            places = [(leaf, place) for leaf, place in places if leaf.dim() == 2]
        with reserved(places):
            found = torch.autograd.grad(losses, self._leaves, self._ones)
        pairs = zip(self._into, found, strict=True)
        elsewhere = [(place, own) for place, own in pairs if place.data_ptr() != own.data_ptr()]
        return _Found(losses.detach(), [place for place, _ in elsewhere], [own for _, own in elsewhere])


class Abreast(Recorded):
    """The same, each thread with programs of its own."""

    name = "abreast"
    side_by_side = True


class _Found(NamedTuple):
    """What is computed at once."""

    losses: Tensor
    """(c,)."""
    into: list[Tensor]
    """Where gradients belong, of those that are not there."""
    gradients: list[Tensor]
    """The same gradients where they are."""


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which graphs are captured: one, since libraries keep working memory for every stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's


class Graphed(Stacked):
    """Neighbouring members as stacked ones, by a CUDA graph of what that does.

    A GPU works on the gradients of small networks for less time than the host takes to start some hundred kernels. All
    programs put what they need on the way into one pool of memory, since they run one after the other.
    """

    name = "graphed"

    def __init__(self, buffers: Buffers, members: Sequence[TrainState], rows: slice, gradients: Tensor) -> None:
        super().__init__(buffers, members, rows, gradients)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Batch, Tensor, list[Tensor]]] = {}

    def follow(self, leader: Program) -> None:
        """Use the leader's pool of memory."""
        assert isinstance(leader, Graphed)
        self._pool = leader._pool

    def _part(self, inputs: Tensor, targets: Tensor, steps: Sequence[int], *, add: bool = False) -> Tensor:
        self.train(steps)
        if inputs.shape not in self._graphs:
            self._graphs[inputs.shape] = self._captured(inputs.contiguous().clone(), targets.contiguous().clone())
        graph, places, losses, found = self._graphs[inputs.shape]
        torch._foreach_copy_(places[:1], (inputs,))
        torch._foreach_copy_(places[1:], (targets,))
        graph.replay()
        if add:
            torch._foreach_add_(self._into, found)
        else:
            torch._foreach_copy_(self._into, found)
        return losses

    def _captured(self, inputs: Tensor, targets: Tensor) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor, list[Tensor]]:
        """Return a graph, where it reads its batch, and where it leaves losses and gradients."""
        graph = torch.cuda.CUDAGraph()
        current, aside = torch.cuda.current_stream(), _aside(self.gradients.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries set themselves up in their first calls, which cannot be captured
                self._found(inputs, targets)
            torch.cuda.synchronize()
            # other threads (the one that loads batches) may go on meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                losses, found = self._found(inputs, targets)
            finally:
                graph.capture_end()
        current.wait_stream(aside)
        return graph, (inputs, targets), losses, found

    def _found(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        with autocast(self.gradients.device, self.members[0].config.precision):
            losses = self.losses(inputs, targets)
        return losses.detach(), list(torch.autograd.grad(losses, self._leaves, torch.ones_like(losses)))


class Vmapped(_Joint):
    """Neighbouring members by `torch.func.vmap` over the weights of one module.

    A module that draws from the global generators raises under vmap, and so cannot take this route.
    """

    name = "vmap"

    def __init__(self, buffers: Buffers, members: Sequence[TrainState], rows: slice, gradients: Tensor) -> None:
        super().__init__(buffers, members, rows, gradients)
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        self._names = [names[id(parameter)] for parameter in buffers.parameters(self.members[0])]
        buffer_names = {id(buffer): name for name, buffer in self._module.named_buffers()}
        self._noise = {
            buffer_names[id(buffer)]: buffer for layer, _ in self._noisy for buffer in (layer.rate, layer.key)
        }

    def _apply(self, inputs: Tensor) -> Tensor:
        def one(values: dict[str, Tensor], x: Tensor) -> Any:
            return torch.func.functional_call(self._module, values, (x,))

        values = dict(zip(self._names, self._stack, strict=True)) | self._noise
        # the fused attention of the CPU has no rule for vmap, which would loop over the members, with a warning; the
        # memory-efficient one of CUDA has a rule whose backward pass refuses the layout that it gets
        with sdpa_kernel([SDPBackend.MATH] + [SDPBackend.FLASH_ATTENTION] * (inputs.device.type == "cuda")):
            outputs: Tensor = torch.func.vmap(one)(values, inputs)
        return outputs


ROUTES: dict[str, type[Program]] = {
    route.name: route for route in (Recorded, Abreast, Graphed, Stacked, Vmapped, Single)
}
