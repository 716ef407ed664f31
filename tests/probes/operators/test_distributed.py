"""Data-parallel processes that hold parts of the same function, on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.operators.fisher import EmpiricalFisher, SampledFisher
from landscape_ray.probes.operators.gauss_newton import GGNOperator
from landscape_ray.probes.operators.hessian import HessianOperator

BATCHES = [(0, 11), (11, 23), (23, 30)]
"""First example and end of each."""


def measure(parts: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Return what a process finds that holds these batches."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    X, y = torch.randn(30, 3, generator=generator).double(), torch.randint(4, (30,), generator=generator)
    batches = [((X[a:b], y[a:b]), b - a) for a, b in parts]
    loss = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")
    function = FixedLoss(module, loss, batches)
    function.check_deterministic()
    v = torch.randn(function.size, generator=generator).double()
    value, gradient = function.gradient()
    hessian, ggn, empirical = HessianOperator(function), GGNOperator(function), EmpiricalFisher(function)
    fisher = SampledFisher(function)
    found = {
        "shares": torch.tensor([share for _, share in function.batches]),
        "gradient": gradient,
        "hessian": hessian(v),
        "ggn": ggn(v),
        "empirical": empirical(v),
        "fisher": fisher(v),
        "values": torch.tensor([function.value(), value, function.value_at(0.1 * v), hessian.mean_loss, ggn.mean_loss]),
        "labels": fisher._draws[0].flatten(),
        "refused": torch.tensor(False),
    }
    try:
        FixedLoss(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)).double(), loss, batches[:1])
    except UserError as error:
        found["refused"] = torch.tensor("must not use the statistics of each micro-batch" in str(error))
    return found


def in_process(rank: int, folder: Path) -> None:
    """Be one of two processes; the second has more batches, and fewer examples."""
    torch.save(measure([BATCHES[:1], BATCHES[1:]][rank]), folder / f"{rank}.pt")


@pytest.mark.acceptance
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_measure_what_one_does(two_processes):
    alone = measure(BATCHES)
    folder = two_processes(__file__)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    for name in ("gradient", "hessian", "ggn", "empirical", "values"):
        torch.testing.assert_close(first[name], alone[name], rtol=1e-10, atol=1e-12)
        assert torch.equal(first[name], second[name])
    assert torch.cat([first["shares"], second["shares"]]).tolist() == pytest.approx([11 / 30, 12 / 30, 7 / 30])
    # every process draws labels of its own, and all have the sum
    assert torch.equal(first["fisher"], second["fisher"])
    assert torch.equal(first["labels"], alone["labels"])
    assert not torch.equal(first["labels"], second["labels"][: len(first["labels"])])
    # one micro-batch in each of two processes is several
    assert [bool(found["refused"]) for found in (alone, first, second)] == [False, True, True]
