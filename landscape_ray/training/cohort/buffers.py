"""The memory of a cohort: the weights and the optimizer state of K members as rows of a few matrices.

    weights          (K, P)    row k: all trainable parameters of member k
    exp_avg, ...     (K, Q)    the optimizer's state under torch's names, for the Q columns that have it
    updates          (K, n)    how many updates each of the n parameters has had, where the optimizer counts

The parameters and the optimizer state of each member are views into its row: module, optimizer, probes and checkpoints
of a member are those of a run alone, and see every update that is made on the matrices.

Columns follow the parameter groups of the optimizer, so that one group is one range of columns and the update of one
member is one kernel for each group. Parameters begin at multiples of 64 bytes; the gaps hold zeros, which stay zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_ray.training.cohort.memory import zeros
from landscape_ray.training.state import TrainState

ALIGNMENT = 16
"""Elements of float32 in 64 bytes: the matrix kernels are faster on aligned operands."""

STATE_NAMES: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Muon: ("momentum_buffer",),
}
"""The optimizers whose state can be stacked: what torch calls the tensors that have the shape of the parameter."""

COUNTING = (torch.optim.AdamW,)
"""Those of them that count updates."""


class Slot(NamedTuple):
    """Where one parameter is."""

    number: int
    """Position among the parameters of the optimizer."""
    start: int
    """First column."""
    shape: torch.Size

    @property
    def stop(self) -> int:
        """The column after the last one."""
        return self.start + self.shape.numel()


class Section(NamedTuple):
    """The columns of one parameter group of one part of the optimizer."""

    part: int
    group: int
    slots: tuple[Slot, ...]

    @property
    def start(self) -> int:
        """First column."""
        return self.slots[0].start

    @property
    def stop(self) -> int:
        """The column after the last one, the gap included."""
        return _aligned(self.slots[-1].stop)


def _aligned(column: int) -> int:
    return -(-column // ALIGNMENT) * ALIGNMENT


class Buffers:
    """The matrices, and the ways in and out of their rows.

    Attributes:
        sections: one for each parameter group, in the order of the columns.
        slots: one for each trainable parameter, in the order of the columns.
        weights: (K, P) float32.
        states: for each part of the optimizer its state by name, (K, Q) with the Q columns of the part.
        updates: (K, n) float32.
    """

    def __init__(self, members: Sequence[TrainState]) -> None:
        """Take the members' weights and optimizer states over; `why_not` must have been None for each."""
        first = members[0]
        self.sections = _sections(first)
        self.slots = tuple(slot for section in self.sections for slot in section.slots)
        size = self.sections[-1].stop
        device = first.device
        self.weights = zeros(len(members), size, device=device)
        self.updates = torch.zeros(len(members), len(self.slots), device=device)
        self.states = [
            {name: zeros(len(members), self._width(part), device=device) for name in STATE_NAMES[type(each)]}
            for part, each in enumerate(first.optimizer.parts)
        ]
        for row, member in enumerate(members):
            self.adopt(row, member)

    def _width(self, part: int) -> int:
        return sum(section.stop - section.start for section in self.sections if section.part == part)

    def state(self, section: Section, name: str) -> Tensor:
        """Return the columns of a section in a matrix of optimizer state, (K, stop - start)."""
        base = min(s.start for s in self.sections if s.part == section.part)
        return self.states[section.part][name][:, section.start - base : section.stop - base]

    @torch.no_grad()
    def adopt(self, row: int, member: TrainState) -> None:
        """Copy a member's weights and optimizer state into a row, and make them views of it."""
        for section, slot, parameter in self._parameters(member):
            view = self.weights[row, slot.start : slot.stop].view(slot.shape)
            view.copy_(parameter)
            parameter.data = view
            part = member.optimizer.parts[section.part]
            state = part.state[parameter]
            for name in STATE_NAMES[type(part)]:
                columns = self.state(section, name)[row, slot.start - section.start : slot.stop - section.start]
                view = columns.view(slot.shape)
                known = state.get(name)
                if known is None:
                    view.zero_()
                else:
                    view.copy_(known)
                state[name] = view
            if isinstance(part, COUNTING):
                count = self.updates[row, slot.number]
                count.copy_(state.get("step", torch.zeros(())))
                state["step"] = count

    @contextlib.contextmanager
    def apart(self, member: TrainState) -> Iterator[None]:
        """Give a member memory of its own inside the block: torch saves the whole matrix with each of its views."""
        views: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        for section, _, parameter in self._parameters(member):
            states = member.optimizer.parts[section.part].state
            views.append((parameter, parameter.data, states[parameter]))
            parameter.data = parameter.data.clone()
            states[parameter] = {name: value.clone() for name, value in states[parameter].items()}
        try:
            yield
        finally:
            for (section, _, parameter), (_, weight, state) in zip(self._parameters(member), views, strict=True):
                parameter.data = weight
                member.optimizer.parts[section.part].state[parameter] = state

    def parameters(self, member: TrainState) -> list[Tensor]:
        """Return a member's parameters in the order of `slots`."""
        return [parameter for _, _, parameter in self._parameters(member)]

    def _parameters(self, member: TrainState) -> Iterator[tuple[Section, Slot, Tensor]]:
        for section in self.sections:
            parameters = member.optimizer.parts[section.part].param_groups[section.group]["params"]
            for slot, parameter in zip(section.slots, parameters, strict=True):
                yield section, slot, parameter


def why_not(members: Sequence[TrainState]) -> str | None:
    """Return why weights and optimizer states cannot be rows, in a few words; None where they can."""
    for part in members[0].optimizer.parts:
        if type(part) not in STATE_NAMES:
            return f"optimizer.name = '{members[0].config.optimizer.name}' has no stacked form"
    grouped = [p for part in members[0].optimizer.parts for group in part.param_groups for p in group["params"]]
    if {id(p) for p in grouped} != {id(p) for p in members[0].module.parameters() if p.requires_grad}:
        return "the optimizer works on copies of some parameters"
    if any(p.dtype != torch.float32 for p in grouped):
        return "some parameters are not float32"
    if any(member.config.sam is not None for member in members):
        return "sam, sharpness-aware minimisation, takes two gradients for an update"
    if members[0].config.precision == "float16":
        return "precision = 'float16' scales the losses of each member"
    if members[0].config.simulated_precision is not None:
        return "simulated_precision rounds inside each module"
    return None


def _sections(member: TrainState) -> tuple[Section, ...]:
    sections: list[Section] = []
    column = index = 0
    for p, part in enumerate(member.optimizer.parts):
        for g, group in enumerate(part.param_groups):
            slots = []
            for parameter in group["params"]:
                slots.append(Slot(index, column, parameter.shape))
                column, index = _aligned(slots[-1].stop), index + 1
            sections.append(Section(p, g, tuple(slots)))
    return tuple(sections)


def stacked_views(matrix: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
    """Return the columns of a (K, P) matrix as one (K, *shape) view for each parameter."""
    return [matrix[:, slot.start : slot.stop].view(len(matrix), *slot.shape) for slot in slots]
