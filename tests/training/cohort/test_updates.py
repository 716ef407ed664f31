"""Updates by rows are those of torch's optimizers, whatever the number of updates before."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from landscape_ray.training.cohort.buffers import Buffers
from landscape_ray.training.cohort.updates import Clip, Updater, orthogonalised
from landscape_ray.training.state import TrainState

from .conftest import Configs, weights

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_a_stack_is_orthogonalised_like_each_matrix(shape: tuple[int, int]) -> None:
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    ours = orthogonalised(stack, COEFFICIENTS, 5, 1e-7).float()
    for mine, matrix in zip(ours, stack, strict=True):
        theirs = _zeropower_via_newtonschulz(matrix, COEFFICIENTS, 5, 1e-7).float()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0.02)
        values = torch.linalg.svdvals(mine)
        assert values.min() > 0.5
        assert values.max() < 1.3


@pytest.mark.parametrize("clipping", ["none", "norm", "auto"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_rows_of_any_age_are_updated_like_torch(configs: Configs, name: str, clipping: str) -> None:
    settings = configs(optimizer__name=name, model__dropout=0.0, clipping__name=clipping)
    members, twins = ([TrainState.create(config) for config in settings] for _ in range(2))
    buffers = Buffers(members)
    gradients = torch.zeros_like(buffers.weights)
    update = Updater(buffers, members, slice(0, 3), gradients)
    generator = torch.Generator().manual_seed(1)
    moving = torch.tensor([[True, True, True], [True, False, True], [True, False, False], [True, True, True]])
    for finite in moving:
        for row, (member, twin) in enumerate(zip(members, twins, strict=True)):
            own = buffers.parameters(twin)
            for slot, parameter in zip(buffers.slots, own, strict=True):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                gradients[row, slot.start : slot.stop] = parameter.grad.flatten()
            for state in (member, twin):
                state.optimizer.set_values(lr=0.01 * (row + 1), weight_decay=0.1 * row, momentum=0.9 - 0.2 * row)
            if finite[row]:
                twin.clipper(own)
                twin.optimizer.step()
            else:
                gradients[row, 0] = math.nan
        update(torch.zeros(3), [True] * 3)
    for member, twin in zip(members, twins, strict=True):
        tolerance = 1e-3 if name == "muon" else 3e-6
        torch.testing.assert_close(weights(member), weights(twin), rtol=tolerance, atol=tolerance)
    if name == "adamw":
        assert buffers.updates.unique(dim=1).flatten().tolist() == [4.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ["norm", "coordinate", "auto", "none"])
def test_rows_are_clipped_like_runs_alone(configs: Configs, name: str) -> None:
    settings = configs()
    bounds = (0.5, 1e9, 2.0)
    members, twins = (
        [
            TrainState.create(
                config.model_copy(
                    update={"clipping": config.clipping.model_copy(update={"name": name, "threshold": bound})}
                )
            )
            for config, bound in zip(settings, bounds, strict=True)
        ]
        for _ in range(2)
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradients = torch.randn(3, 50, generator=generator)
        gradients[1, 7] = math.nan
        expected = gradients.clone()
        norms = Clip(members, gradients)([True, True, True])
        for row, twin in enumerate(twins):
            holder = torch.zeros(50)
            holder.grad = expected[row]
            assert norms[row].item() == pytest.approx(float(twin.clipper([holder])), rel=1e-6, nan_ok=True)
        torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_a_member_that_is_not_updated_keeps_its_history_of_norms(configs: Configs) -> None:
    members = [TrainState.create(config) for config in configs(clipping__name="auto")]
    gradients = torch.ones(3, 4)
    norms = Clip(members, gradients)([True, False, True])
    assert norms.tolist() == [2.0, 0.0, 2.0]
    assert [int(member.clipper.state_dict()["count"]) for member in members] == [1, 0, 1]
