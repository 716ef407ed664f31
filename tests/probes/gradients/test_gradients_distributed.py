"""Statistics of gradients whose units lie in two data-parallel processes, on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.gradients.coherence import gradient_coherence
from landscape_ray.probes.gradients.noise_scale import gradient_noise_scale
from landscape_ray.probes.gradients.norms import gradient_norms
from landscape_ray.probes.gradients.opposing import opposing_groups
from landscape_ray.probes.losses import OutputLoss

BATCHES = [(0, 9), (9, 14), (14, 20)]
"""First example and end of each."""


def measure(parts: list[tuple[int, int]]) -> dict[str, Any]:
    """Return what a process finds that holds these batches."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    X, y = torch.randn(20, 3, generator=generator).double(), torch.randint(4, (20,), generator=generator)
    batches = [((X[a:b], y[a:b]), b - a) for a, b in parts]
    loss = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")
    apart = gradient_noise_scale(module, loss, batches, num_products=4)
    together = gradient_noise_scale(module, loss, batches, source="micro_batches")
    coherence = gradient_coherence(module, loss, batches, max_bytes=1)
    assert apart.hessian_weighted is not None
    estimates = [
        apart.covariance_trace,
        apart.gradient_norm_squared,
        apart.hessian_weighted,
        together.covariance_trace,
        together.gradient_norm_squared,
        coherence.m_coherence,
        coherence.mean_cosine,
        gradient_norms(module, loss, batches).total,
    ]
    found = {"estimates": [[e.value, e.standard_error] for e in estimates], "refused": ""}
    update = [torch.ones_like(p) for p in module.parameters()]
    try:
        opposing_groups(module, loss, batches, update)
    except UserError as error:
        found["refused"] = str(error)
    return found


def in_process(rank: int, folder: Path) -> None:
    """Be one of two processes."""
    torch.save(measure([BATCHES[:1], BATCHES[1:]][rank]), folder / f"{rank}.pt")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_find_what_one_does(two_processes):
    alone = measure(BATCHES)
    folder = two_processes(__file__)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    for found in (first, second):
        torch.testing.assert_close(torch.tensor(found["estimates"]), torch.tensor(alone["estimates"]))
        assert "must be measured in one process" in found["refused"]
    assert alone["refused"] == ""
