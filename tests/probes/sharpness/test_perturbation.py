from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.sharpness.average_case import AverageCaseSharpnessProbe, average_case_sharpness
from landscape_ray.probes.sharpness.logits import logit_sharpness
from landscape_ray.probes.sharpness.perturbation import Ball, affordable, ball_around, subsets_of
from landscape_ray.probes.sharpness.sam import SamSharpnessProbe, sam_sharpness
from landscape_ray.probes.sharpness.worst_case import WorstCaseSharpnessProbe, worst_case_sharpness

CROSS_ENTROPY = OutputLoss(nn.CrossEntropyLoss(reduction="none"), likelihood="categorical")
ALL = {"sam": sam_sharpness, "worst": worst_case_sharpness, "average": average_case_sharpness}


def relu_net(scale=1.0, dtype=torch.float64):
    """W1, b1 times `scale`, W2 divided by it: the same function for a ReLU network."""
    generator = torch.Generator().manual_seed(3)
    module = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10)).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
        for parameter in module[0].parameters():
            parameter.mul_(scale)
        module[2].weight.div_(scale)
    return module


def digits(dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(64, 16, generator=generator).to(dtype), torch.randint(10, (64,), generator=generator)


@pytest.mark.acceptance
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scaling", ["elementwise", "filterwise"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_adaptive_sharpness_does_not_see_rescaled_layers(name, scaling, norm):
    settings = {"radius": 0.1, "scaling": scaling, "norm": norm}
    first, second, third = (
        ALL[name](relu_net(scale), CROSS_ENTROPY, [digits()], **settings).value for scale in (1.0, 3.0, 0.1)
    )
    assert second == pytest.approx(first, rel=1e-9)
    assert third == pytest.approx(first, rel=1e-9)
    plain = [
        ALL[name](relu_net(scale), CROSS_ENTROPY, [digits()], **{**settings, "scaling": "standard"}).value
        for scale in (1.0, 3.0)
    ]
    assert abs(plain[1] / plain[0] - 1) > 0.05


@pytest.mark.parametrize("scaling", ["elementwise", "filterwise"])
def test_eta_gives_the_invariance_up(scaling):
    values = [
        sam_sharpness(relu_net(scale), CROSS_ENTROPY, [digits()], radius=0.1, scaling=scaling, eta=0.5).value
        for scale in (1.0, 10.0)
    ]
    assert abs(values[1] / values[0] - 1) > 0.01


def test_units_by_explicit_loops():
    module = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 4, bias=False)).double()
    function = FixedLoss(module, lambda m, x: m(x).mean(), [torch.ones(1, 2, 2, 2).double()])
    expected = {"standard": [], "elementwise": [], "filterwise": []}
    for parameter in module.parameters():
        for index, part in enumerate(parameter.detach()):
            for weight in part.flatten().tolist():
                expected["standard"].append(1.0)
                expected["elementwise"].append(abs(weight) + 0.25)
                lone = parameter.dim() == 1
                length = abs(weight) if lone else math.sqrt(sum(w**2 for w in parameter[index].flatten().tolist()))
                expected["filterwise"].append(length + 0.25)
    for scaling, units in expected.items():
        ball = ball_around(function, scaling=scaling, norm="l2", eta=0.25)
        torch.testing.assert_close(ball.scale, torch.tensor(units, dtype=torch.float64), rtol=1e-12, atol=0)


def test_what_is_left_out_stays():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()
    module[0].weight.requires_grad_(False)
    function = FixedLoss(module, lambda m, x: m(x).mean(), [torch.ones(1, 3).double()])
    assert not ball_around(function, scaling="standard", norm="l2", one_dimensional=False).scale.any()
    with pytest.raises(UserError, match=r"module must have weights that may move, got none.*one_dimensional to true"):
        sam_sharpness(module, lambda m, x: m(x).mean(), [torch.ones(1, 3).double()], one_dimensional=False)


def test_weights_at_zero_rest_unless_eta_moves_them():
    module = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.0, 2.0]]))
    loss = lambda m, x: m(x).sum()  # noqa: E731 - the gradient is x = (100, 1)
    batch = torch.tensor([[100.0, 1.0]], dtype=torch.float64)
    assert sam_sharpness(module, loss, [batch], radius=0.1, scaling="elementwise").value == pytest.approx(0.2)
    moved = sam_sharpness(module, loss, [batch], radius=0.1, scaling="elementwise", eta=0.01).value
    assert moved == pytest.approx(0.1 * math.hypot(0.01 * 100, 2.01))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_geometry_of_the_ball(norm):
    generator = torch.Generator().manual_seed(0)
    ball = Ball(scale=torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=torch.float64), norm=norm)
    order = torch.inf if norm == "linf" else 2
    slope = ball.scale * torch.randn(4, generator=generator, dtype=torch.float64)
    steepest = ball.steepest(slope)
    assert float(torch.linalg.vector_norm(steepest, ord=order)) == pytest.approx(1.0)
    assert float(slope @ steepest) == pytest.approx(ball.reach(slope))
    for _ in range(200):  # nothing in the ball beats it, and the projection is the nearest point
        inside = ball.project(3 * torch.randn(4, generator=generator, dtype=torch.float64), 1.0)
        assert float(torch.linalg.vector_norm(inside, ord=order)) <= 1 + 1e-12
        assert float(slope @ inside) <= ball.reach(slope) + 1e-12
        outside = 2 * torch.randn(4, generator=generator, dtype=torch.float64)
        nearest = ball.project(outside, 1.0)
        assert torch.dist(outside, nearest) <= torch.dist(outside, inside) + 1e-12
        edge = ball.draw_boundary(generator)
        assert float(torch.linalg.vector_norm(edge, ord=order)) == pytest.approx(1.0)
        assert float(edge[1]) == 0.0
    assert not ball.steepest(torch.zeros(4, dtype=torch.float64)).any()


@pytest.mark.parametrize(("norm", "variance"), [("l2", 1.0), ("linf", 1 / 3)])
def test_noise_has_the_variance_of_its_name(norm, variance):
    scale = torch.ones(20000)
    scale[::2] = 0
    noise = Ball(scale=scale, norm=norm).draw_noise(torch.Generator().manual_seed(1))
    assert not noise[::2].any()
    assert float(noise[1::2].var()) == pytest.approx(variance, rel=0.05)
    assert abs(float(noise[1::2].mean())) < 0.04
    if norm == "linf":
        assert float(noise.abs().max()) <= 1


def test_subsets_make_up_the_whole():
    inputs, targets = digits()
    batches = [((inputs[:40], targets[:40]), 40), ((inputs[40:], targets[40:]), 24)]
    function = FixedLoss(relu_net(), CROSS_ENTROPY, batches)
    subsets = subsets_of(function, 16)
    assert [len(subset.examples[0]) for subset in subsets] == [16, 16, 8, 16, 8]
    zero = torch.zeros(function.size, dtype=torch.float64)
    whole, gradient = function.gradient()
    spent = function.spent_gradients
    found = [subset.gradient_at(zero) for subset in subsets]
    assert function.spent_gradients - spent == pytest.approx(1.0)
    assert math.fsum(s.share * value for s, (value, _) in zip(subsets, found, strict=True)) == pytest.approx(whole)
    torch.testing.assert_close(sum(s.share * g for s, (_, g) in zip(subsets, found, strict=True)), gradient)
    assert [s.value_at(zero) for s in subsets] == [value for value, _ in found]


class Meeting:
    """Two threads that add up their tensors, in the place of two processes."""

    def __init__(self):
        self.barrier, self.brought = threading.Barrier(2, timeout=60), {}

    def reduce(self, tensor):
        self.brought[threading.get_ident()] = tensor.clone()
        self.barrier.wait()
        total = sum(self.brought.values())
        self.barrier.wait()
        return total


@pytest.mark.parametrize(
    "measure",
    [
        partial(sam_sharpness, subset_examples=8),
        partial(worst_case_sharpness, subset_examples=8, num_steps=3, tol=0.0),
        partial(worst_case_sharpness, num_steps=3, num_starts=2),
        partial(average_case_sharpness, num_pairs=3),
        logit_sharpness,
    ],
)
def test_parts_on_two_processes_make_up_the_whole(measure, monkeypatch):
    inputs, targets = digits()
    parts = [((inputs[a:b], targets[a:b]), b - a) for a, b in [(0, 24), (24, 40), (40, 64)]]
    alone = measure(relu_net(), CROSS_ENTROPY, parts)
    meeting = Meeting()
    monkeypatch.setattr(FixedLoss, "reduce", lambda self, tensor: meeting.reduce(tensor))
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(measure, relu_net(), CROSS_ENTROPY, mine) for mine in (parts[:1], parts[1:])]
        found = [job.result() for job in jobs]
    assert found[0].value == found[1].value == pytest.approx(alone.value, rel=1e-9)
    assert found[0].price_gradients == pytest.approx(alone.price_gradients)


def test_affordable():
    assert affordable(20, 2, 0.5, math.inf) == 20
    assert affordable(20, 2, 0.5, 4.9) == 9
    assert affordable(20, 2, 0.5, -1.0) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radii": []}, r"radii must be one or more different numbers, positive and finite, got \[\]"),
        ({"radii": [0.1, 0.0]}, "radii must be one or more different numbers"),
        ({"radii": [0.1, math.inf]}, "radii must be one or more different numbers"),
        ({"radii": [0.1, 0.1]}, "radii must be one or more different numbers"),
        ({"radii": [0.1, 0.10000001]}, "radii must be one or more different numbers"),
        ({"scaling": "layerwise"}, "scaling must be one of standard, elementwise, filterwise, got 'layerwise'"),
        ({"norm": "l1"}, "norm must be one of l2, linf, got 'l1'"),
        ({"eta": -0.1}, "eta must be finite and at least 0, got -0.1"),
        ({"eta": 0.1, "scaling": "standard"}, "eta must be 0 where scaling is standard, got 0.1"),
    ],
)
@pytest.mark.parametrize("probe", [SamSharpnessProbe, WorstCaseSharpnessProbe, AverageCaseSharpnessProbe])
def test_settings_out_of_range(probe, settings, message):
    with pytest.raises(UserError, match=message):
        probe([None], **settings)


def test_subsets_need_a_loss_and_batches_that_can_be_cut():
    function = FixedLoss(relu_net(), lambda m, b: m(b[0]).mean(), [digits()])
    with pytest.raises(UserError, match="per_target and likelihood for a sharpness on subsets"):
        subsets_of(function, 4)
    inputs, targets = digits()
    function = FixedLoss(relu_net(), CROSS_ENTROPY, [[inputs, targets]])
    with pytest.raises(UserError, match=r"batches must be pairs of tensors .* got list; set subset_examples to 0"):
        subsets_of(function, 4)
    with pytest.raises(UserError, match="subset_examples must be at least 0, got -1"):
        SamSharpnessProbe([None], subset_examples=-1)
