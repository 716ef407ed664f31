"""Spectra of a function whose parts lie in two data-parallel processes, on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.gradients.noise_scale import GradientNoiseScaleProbe
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.probe import Host
from landscape_ray.probes.spectrum.batch_size import batch_size_effect
from landscape_ray.probes.spectrum.density import SpectralDensityProbe
from landscape_ray.probes.spectrum.eigenpairs import EigenvaluesProbe
from landscape_ray.probes.spectrum.ggn_trace import GGNTraceProbe
from landscape_ray.probes.spectrum.trace import TraceProbe

BATCHES = [(0, 11), (11, 23), (23, 30)]
"""First example and end of each."""


def measure(parts: list[tuple[int, int]]) -> dict[str, Any]:
    """Return what a process finds that holds these batches."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    X, y = torch.randn(30, 3, generator=generator).double(), torch.randint(4, (30,), generator=generator)
    batches = [((X[a:b], y[a:b]), b - a) for a, b in parts]
    loss = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")
    found: dict[str, Any] = {"prices": [], "refused": ""}
    for probe in (
        EigenvaluesProbe(batches, tol=1e-9),
        EigenvaluesProbe(batches, tol=1e-9, curvature="ggn"),
        SpectralDensityProbe(batches, num_vectors=2),
        TraceProbe(batches, tol=1e-6),
        GGNTraceProbe(batches, tol=1e-6, max_gradients=1.9),  # too little for the exact trace
        GradientNoiseScaleProbe(batches, num_products=8),
    ):
        before = probe.price_gradients
        for allowance in (12.0, 27.0):
            estimates = probe.measure(module, loss, Host(allowance_gradients=allowance))
            key = f"{probe.name} {len(found)}"
            found[key] = [[e.value, e.standard_error, e.num_matvecs] for e in estimates.values()]
            found["prices"] += [before, probe.price_gradients]
    try:
        batch_size_effect(module, loss, (X, y), [2, 4])
    except UserError as error:
        found["refused"] = str(error)
    return found


def in_process(rank: int, folder: Path) -> None:
    """Be one of two processes; the second has more batches."""
    torch.save(measure([BATCHES[:1], BATCHES[1:]][rank]), folder / f"{rank}.pt")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_processes_with_unequal_numbers_of_batches_go_the_same_way(two_processes):
    alone = measure(BATCHES)
    folder = two_processes(__file__)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert first == second
    for name in alone:
        if name.startswith(("eigenvalues", "spectral_density", "trace")):  # the others draw by process
            torch.testing.assert_close(torch.tensor(first[name]), torch.tensor(alone[name]), rtol=1e-6, atol=1e-8)
    assert "must be measured in one process, got several" in first["refused"]
    assert alone["refused"] == ""
