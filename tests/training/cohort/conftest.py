"""Small populations whose members differ in everything that members may differ in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from landscape_ray.config import parse, with_values
from landscape_ray.training import TrainConfig
from landscape_ray.training.cohort import Cohort
from landscape_ray.training.state import TrainState

DIGITS: dict[str, Any] = {
    "num_steps": 12,
    "batch_size": 8,
    "data": {"name": "images", "source": "digits"},
    "model": {"name": "mlp", "width": 16},
    "eval": {"every_steps": 6, "num_batches": 2, "batch_size": 8},
}

OWN: list[dict[str, Any]] = [
    {"seed": 0, "schedule.peak_lr": 0.003},
    {"seed": 1, "schedule.name": "cosine", "schedule.warmup_steps": 3, "model.dropout": 0.3, "clipping.name": "none"},
    {"seed": 2, "optimizer.weight_decay": 0.3, "schedule.peak_lr": 0.01, "clipping.threshold": 0.1, "num_steps": 9},
]
"""What the three members of the tests have of their own."""

Configs = Callable[..., list[TrainConfig]]


@pytest.fixture
def configs() -> Configs:
    """A function that returns three configurations on the digits, with these values for all of them."""

    def make(**shared: Any) -> list[TrainConfig]:
        values = {name.replace("__", "."): value for name, value in shared.items()}
        return [parse(TrainConfig, with_values(DIGITS, {**own, **values}), "test") for own in OWN]

    return make


Threads = Callable[[int], None]


@pytest.fixture
def threads() -> Iterator[Threads]:
    """A function that sets the number of torch's threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def weights(member: TrainState) -> torch.Tensor:
    """Return all parameters of a member as one vector, a copy."""
    return torch.cat([p.detach().flatten() for p in member.module.parameters()]).clone()


def memory(cohort: Cohort, k: int) -> list[torch.Tensor]:
    """Return a copy of all tensors of a member: weights, buffers and optimizer state."""
    member = cohort.members[k]
    states = [value for part in member.optimizer.parts for state in part.state.values() for value in state.values()]
    return [tensor.clone() for tensor in (*member.module.state_dict().values(), *states)]
