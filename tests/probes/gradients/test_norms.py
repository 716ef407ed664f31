from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.gradients.norms import (
    DistanceFromInitProbe,
    GradientNormsProbe,
    distance_from_init,
    gradient_norms,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 4)
        self.head.weight = self.body[2].weight  # counted with body.2
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        return self.scale * self.head(self.body(x))


def net():
    module = Net().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def loss(module, batch):
    return module(batch).square().mean()


BATCH = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_norms_are_those_of_backward():
    module = net()
    found = gradient_norms(module, loss, [BATCH])
    loss(module, BATCH).backward()

    def norm(*parameters):
        return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))

    first, second = module.body[0], module.body[2]
    assert found.layers == pytest.approx(
        {
            "root": norm(module.scale),
            "body.0": norm(first.weight, first.bias),
            "body.2": norm(second.weight, second.bias),
        }
    )
    assert found.total.value == pytest.approx(norm(*(p for p in module.parameters() if p.requires_grad)))
    assert found.total.value**2 == pytest.approx(sum(x**2 for x in found.layers.values()))
    assert (found.total.standard_error, found.total.price_gradients) == (0.0, 1.0)


def test_gradient_norms_probe():
    module = net()
    found = GradientNormsProbe([BATCH]).measure(module, loss)
    assert list(found) == [f"gradient_norms{part}" for part in ("", "/root", "/body.0", "/body.2")]
    assert found["gradient_norms"].value == gradient_norms(module, loss, [BATCH]).total.value
    assert list(GradientNormsProbe([BATCH], layers=False).measure(module, loss)) == ["gradient_norms"]
    nn.init.constant_(module.scale, math.inf)
    assert math.isnan(gradient_norms(module, loss, [BATCH]).total.value)


def test_distance_is_from_the_first_measurement():
    module, probe = net(), DistanceFromInitProbe([BATCH])
    initial = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    start = probe.measure(module, loss)
    assert {name: estimate.value for name, estimate in start.items()} == {
        f"distance_from_init{part}": 0.0 for part in ("", "/root", "/body.0", "/body.2", "/relative")
    }
    length = math.sqrt(sum(float(p.detach().square().sum()) for p in module.parameters() if p.requires_grad))
    with torch.no_grad():
        module.scale += 3.0
        module.body[0].weight[0, 0] -= 4.0
    resumed = DistanceFromInitProbe([BATCH])
    resumed.load_state_dict(probe.state_dict())
    for one in (probe, resumed):
        found = one.measure(module, loss)
        assert found["distance_from_init"].value == pytest.approx(5.0)
        assert found["distance_from_init/relative"].value == pytest.approx(5.0 / length)
        assert found["distance_from_init/root"].value == pytest.approx(3.0)
        assert found["distance_from_init/body.0"].value == pytest.approx(4.0)
        assert found["distance_from_init/body.2"].value == 0.0
    assert found["distance_from_init"].standard_error == 0.0
    alone = distance_from_init(module, initial)
    assert alone.total.value == found["distance_from_init"].value
    assert alone.layers == {"root": 3.0, "body.0": 4.0, "body.2": 0.0}
    with pytest.raises(UserError, match=r"initial must hold 'scale' of shape \(\), got nothing"):
        distance_from_init(module, {})
    with pytest.raises(UserError, match=r"of shape \(\), got shape \(2,\)"):
        distance_from_init(module, initial | {"scale": torch.zeros(2)})
    with pytest.raises(UserError, match="must have a parameter with requires_grad, got none"):
        distance_from_init(nn.Tanh(), {})
    nn.init.constant_(module.scale, math.inf)
    assert math.isnan(distance_from_init(module, initial).total.value)


def test_the_first_measurement_keeps_a_copy_and_waits_for_finite_weights():
    module, probe = net(), DistanceFromInitProbe([BATCH], layers=False)
    before = module.scale.item()
    nn.init.constant_(module.scale, math.nan)
    assert math.isnan(probe.measure(module, loss)["distance_from_init"].value)
    nn.init.constant_(module.scale, before)
    assert probe.measure(module, loss)["distance_from_init"].value == 0.0
    assert list(probe.measure(module, loss)) == ["distance_from_init", "distance_from_init/relative"]


def test_a_checkpoint_of_another_module_is_refused():
    probe = DistanceFromInitProbe([BATCH])
    probe.measure(net(), loss)
    with pytest.raises(UserError, match="must have 16 weights, got 37"):
        probe.measure(nn.Linear(3, 4).double(), loss)


def test_weights_that_begin_at_zero_have_no_relative_distance():
    module = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(module.weight)
    probe = DistanceFromInitProbe([BATCH], layers=False)
    assert list(probe.measure(module, loss)) == ["distance_from_init"]
