"""A budget in data-parallel processes whose clocks differ."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from landscape_ray.probes import Host, Monitor, SharpnessProbe


def measured(rank: int) -> list[int]:
    """Return the steps at which a process measured; the second is the slower one."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(4, 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)
    part = slice(0, 3) if rank == 0 else slice(3, 8)
    probe = SharpnessProbe([((x[part], y[part]), len(x[part]))])
    monitor = Monitor([probe], None, budget=0.5)
    steps = []
    for step in range(1, 101):
        time.sleep(0.01 * (1 + rank))
        found = list(monitor(step, module, loss, Host(batch_size=8), num_steps=100))
        steps += [step] * len(found)
    return steps


def in_process(rank: int, folder: Path) -> None:
    """Be one of two processes."""
    (folder / f"{rank}.json").write_text(json.dumps(measured(rank)))


def loss(module, batch):
    return 0.5 * (module(batch[0]) - batch[1]).square().mean()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_processes_with_other_clocks_measure_at_the_same_steps(two_processes):
    """Where one of them decided to measure alone, it would wait for the other, until the time is up."""
    folder = two_processes(__file__)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first[-1] == 100
    assert 2 <= len(first) < 100
