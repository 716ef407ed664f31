"""Which members can be computed together, and how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from landscape_ray.models.layers import Dropout
from landscape_ray.training.loss import LOSSES
from landscape_ray.training.state import TrainState


def why_not(name: str, members: Sequence[TrainState]) -> str | None:
    """Return why these members cannot take a route, in a few words; None where they can."""
    first = members[0]
    if name == "single":
        return None
    if any(True for name, _ in first.module.named_buffers() if name in first.module.state_dict()):
        return "the model keeps statistics of its batches"
    if any(not _equal(untrained(first), untrained(member)) for member in members[1:]):
        return "members differ in values that are not trained (frozen parameters, buffers or other tensors)"
    if (reason := _loss_apart(first)) is not None:
        return reason
    if name != "vmap" and not first.module.stackable:
        return "the model does not take stacked parameters"
    return _why_not_again(name, first) if name in ("recorded", "abreast", "graphed") else None


def _why_not_again(name: str, first: TrainState) -> str | None:
    if name in ("recorded", "abreast") and first.device.type != "cpu":
        return "recordings are for the CPU"
    if name == "graphed" and first.device.type != "cuda":
        return "graphs are for CUDA"
    if first.config.compile:
        return "the model is compiled"
    if first.objective.name not in LOSSES:
        return "the loss is the user's, and may do more than operations on tensors"
    return None


def untrained(member: TrainState) -> dict[str, Tensor]:
    """Return the tensors of a module that a joint program takes from its first member: all but weights and noise."""
    found: dict[str, Tensor] = {name: p for name, p in member.module.named_parameters() if not p.requires_grad}
    for prefix, layer in member.module.named_modules():
        noise = ("rate", "key") if isinstance(layer, Dropout) else ()
        plain = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)}
        buffers = {name: value for name, value in layer.named_buffers(recurse=False) if name not in noise}
        found |= {f"{prefix}.{name}" if prefix else name: value for name, value in (plain | buffers).items()}
    return found


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@torch.no_grad()
def _loss_apart(member: TrainState) -> str | None:
    """Return why a user's loss needs the outputs of each member apart; None where it takes those of several at once.

    Found out on a few held-out examples. It is the values that count: a loss may take the axis of the members for that
    of the examples, and an error shows it only where their sizes differ.
    """
    if member.objective.name in LOSSES:
        return None
    inputs, targets = (part[:3] for part in member.validation[0])
    mode = member.module.training
    member.module.eval()
    outputs = member.module(inputs)
    member.module.train(mode)
    both = (outputs, outputs.roll(1, 0))  # other values, but such as the model gives
    apart = [member.objective.per_target(each, targets) for each in both]
    if apart[0].dim() == 0:
        return "the loss gives one mean for all targets"
    try:
        joint = member.objective.per_target(torch.stack(both), torch.stack((targets, targets)))
    except Exception:  # a user's function raises what it likes
        return "the loss does not take outputs with an axis for the members"
    expected = torch.cat([losses.flatten() for losses in apart])
    if joint.numel() != expected.numel() or not torch.allclose(joint.flatten(), expected, 1e-3, 1e-5, equal_nan=True):
        return "the loss has other values for outputs with an axis for the members"
    return None
