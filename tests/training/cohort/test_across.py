"""The formulas over all members are torch's kernels for one member after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from landscape_ray.training.cohort import Cohort, across, updates

from .conftest import Configs

ROWS, COLUMNS, UPDATES = 4, 50, 6


def gradients(step: int) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step % 3 - 1)


def start() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(99))


def test_adamw_is_that_of_torch() -> None:
    groups: list[dict[str, Any]] = [
        {"lr": 10.0**-row, "betas": (0.1 * row, 0.9 + 0.03 * row), "weight_decay": 0.2 * row, "eps": 10.0 ** -(4 + row)}
        for row in range(ROWS)
    ]
    weights, means, squares = start(), torch.zeros(ROWS, COLUMNS), torch.zeros(ROWS, COLUMNS)
    counts = torch.zeros(ROWS)
    rows = [torch.nn.Parameter(row.clone()) for row in start()]
    theirs = [torch.optim.AdamW([row], **group, fused=True) for row, group in zip(rows, groups, strict=True)]
    for step in range(UPDATES):
        for row, part, gradient in zip(rows, theirs, gradients(step), strict=True):
            row.grad = gradient.clone()
            part.step()
        counts += 1
        across.adamw(weights, gradients(step), means, squares, counts, groups, torch.ones(ROWS, dtype=torch.bool))
        torch.testing.assert_close(weights, torch.stack([row.detach() for row in rows]), rtol=1e-5, atol=1e-6)
    for name, ours in (("exp_avg", means), ("exp_avg_sq", squares)):
        state = torch.stack([part.state[row][name] for row, part in zip(rows, theirs, strict=True)])
        torch.testing.assert_close(ours, state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_is_that_of_torch(decay: float) -> None:
    groups: list[dict[str, Any]] = [
        {"lr": 10.0**-row, "momentum": momentum, "weight_decay": decay * row, "nesterov": nesterov}
        for row, (momentum, nesterov) in enumerate([(0.0, False), (0.9, False), (0.9, True), (0.5, True)])
    ]
    weights, velocities = start(), torch.zeros(ROWS, COLUMNS)
    rows = [torch.nn.Parameter(row.clone()) for row in start()]
    theirs = [torch.optim.SGD([row], **group) for row, group in zip(rows, groups, strict=True)]
    for step in range(UPDATES):
        for row, part, gradient in zip(rows, theirs, gradients(step), strict=True):
            row.grad = gradient.clone()
            part.step()
        across.sgd(weights, gradients(step), velocities, groups, torch.ones(ROWS, dtype=torch.bool))
        torch.testing.assert_close(weights, torch.stack([row.detach() for row in rows]), rtol=1e-5, atol=1e-5)
    assert not velocities[0].any()  # a member without momentum keeps no mean


def test_a_member_that_is_not_finite_stays_to_the_bit() -> None:
    finite = torch.tensor([True, False, True, True])
    adam = [{"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}] * ROWS
    sgd = [{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}] * ROWS
    broken = gradients(0)
    broken[1] = torch.nan
    for rule in ("adamw", "sgd"):
        weights, first, second = start(), start() * 0.1, start().square()
        before = [tensor.clone() for tensor in (weights, first, second)]
        if rule == "adamw":
            across.adamw(weights, broken.clone(), first, second, torch.tensor([1.0, 0.0, 1.0, 1.0]), adam, finite)
        else:
            across.sgd(weights, broken.clone(), first, sgd, finite)
        after = [weights, first, second]
        assert all(torch.equal(a[1], b[1]) for a, b in zip(after, before, strict=True))
        assert all(not torch.equal(weights[row], before[0][row]) for row in (0, 2, 3))
        assert weights.isfinite().all()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_cohort_may_take_them_on_the_cpu_too(configs: Configs, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = configs(optimizer__name=name, optimizer__weight_decay=0.1)
    by_row, joint = (Cohort.create(settings, route="stacked") for _ in range(2))
    list(by_row.train())
    monkeypatch.setattr(updates, "BY_ROW", ())
    list(joint.train())
    for one, other in zip(by_row.members, joint.members, strict=True):
        for ours, theirs in zip(one.module.parameters(), other.module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
