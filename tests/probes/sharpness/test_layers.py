from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes import Host
from landscape_ray.probes.sharpness.layers import LayerSharpnessProbe, layer_sharpness
from landscape_ray.probes.sharpness.top import sharpness


def blocks_of(module):
    """Return the positions of each layer's parameters: the slow way, one number at a time."""
    positions, begin, seen = {}, 0, set()
    for name, layer in module.named_modules():
        for parameter in layer._parameters.values():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            positions.setdefault(name, []).append(id(parameter))
    offsets = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            offsets[id(parameter)] = range(begin, begin + parameter.numel())
            begin += parameter.numel()
    return {name: torch.tensor([i for key in keys for i in offsets[key]]) for name, keys in positions.items()}


@pytest.mark.acceptance
def test_eigenvalues_are_those_of_dense_blocks(case, dense_hessian):
    hessian, blocks = dense_hessian(case), blocks_of(case.module)
    found = layer_sharpness(case.module, case.loss, [case.batch], kind="eigenvalue", tol=1e-6, max_matvecs=100)
    assert list(found) == list(blocks)
    for name, rows in blocks.items():
        expected = float(torch.linalg.eigvalsh(hessian[rows][:, rows])[-1])
        assert found[name].value == pytest.approx(expected, rel=1e-8)
        assert found[name].converged


@pytest.mark.acceptance
def test_quotients_are_those_of_the_dense_hessian(case, dense_hessian):
    hessian, blocks = dense_hessian(case), blocks_of(case.module)
    vector = torch.linalg.eigh(hessian)[1][:, -1]
    found = layer_sharpness(case.module, case.loss, [case.batch], tol=1e-8, max_matvecs=200)
    assert list(found) == list(blocks)
    for name, rows in blocks.items():
        part, block = vector[rows], hessian[rows][:, rows]
        assert found[name].value == pytest.approx(float(part @ block @ part / (part @ part)), rel=1e-5)
        gap = (torch.linalg.eigvalsh(block) - found[name].value).abs().min()
        assert float(gap) <= found[name].standard_error * (1 + 1e-6)


def test_quotient_eigenvalue_and_sharpness_are_in_order(smooth_case):
    arguments = smooth_case.module, smooth_case.loss, [smooth_case.batch]
    top = sharpness(*arguments, tol=1e-6, max_matvecs=100).value
    quotients = layer_sharpness(*arguments, tol=1e-6, max_matvecs=100)
    eigenvalues = layer_sharpness(*arguments, kind="eigenvalue", tol=1e-6, max_matvecs=100)
    for name, quotient in quotients.items():
        assert quotient.value <= eigenvalues[name].value <= top


def test_micro_batches_and_frozen_layers(smooth_case):
    inputs, targets = smooth_case.batch
    parts = [((inputs[:40], targets[:40]), 40), ((inputs[40:], targets[40:]), 24)]
    smooth_case.module[2].requires_grad_(False)
    for kind in ("quotient", "eigenvalue"):
        whole, split = (
            layer_sharpness(smooth_case.module, smooth_case.loss, batches, kind=kind, tol=1e-8, max_matvecs=100)
            for batches in ([smooth_case.batch], parts)
        )
        assert list(whole) == list(split) == ["0", "4"]
        for name in whole:
            assert split[name].value == pytest.approx(whole[name].value, rel=1e-6)


def test_main_estimate_is_the_sharpest_layer(smooth_case):
    probe = LayerSharpnessProbe([smooth_case.batch])
    found = probe.measure(smooth_case.module, smooth_case.loss)
    main, *names = found
    assert (main, names) == ("layer_sharpness", ["layer_sharpness/0", "layer_sharpness/2", "layer_sharpness/4"])
    assert found[main].value == max(found[name].value for name in names)
    assert found[main].price_gradients == pytest.approx(probe.price_gradients + 2 / 3)


def test_layers_that_do_not_matter():
    """A layer outside of the loss has no part of the eigenvector, and a block of zeros."""
    module = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)}).double()
    x = torch.ones(3, 2).double()
    loss = lambda m, batch: 0.5 * m["used"](batch).square().mean()  # noqa: E731
    found = layer_sharpness(module, loss, [x], tol=1e-8)
    assert found["used"].value == pytest.approx(3.0)
    blocks = layer_sharpness(module, loss, [x], kind="eigenvalue", tol=1e-8)
    assert blocks["unused"].value == 0
    probe = LayerSharpnessProbe([x])
    assert probe.measure(module, loss)["layer_sharpness"].value == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("kind", ["quotient", "eigenvalue"])
def test_warm_starts_and_resuming(smooth_case, kind):
    straight, first = (LayerSharpnessProbe([smooth_case.batch], kind=kind) for _ in range(2))
    prices = []
    for probe in (straight, first):
        probe.measure(smooth_case.module, smooth_case.loss)
        prices.append(probe.price_gradients)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = LayerSharpnessProbe([smooth_case.batch], kind=kind)
    second.load_state_dict(torch.load(file, weights_only=True))
    one, other = (p.measure(smooth_case.module, smooth_case.loss) for p in (straight, second))
    assert [e.value for e in one.values()] == [e.value for e in other.values()]
    assert straight.price_gradients < prices[0]


@pytest.mark.parametrize(("kind", "kept"), [("quotient", 1), ("eigenvalue", 1)])
def test_allowance_leaves_layers_out(smooth_case, kind, kept):
    probe = LayerSharpnessProbe([smooth_case.batch], kind=kind)
    found = probe.measure(smooth_case.module, smooth_case.loss, Host(allowance_gradients=1.0))
    assert len(found) == 1 + kept
    assert not found["layer_sharpness"].converged


def test_nan_weights_are_unknown(smooth_case):
    with torch.no_grad():
        smooth_case.module[0].weight.fill_(1e200)
    found = LayerSharpnessProbe([smooth_case.batch]).measure(
        smooth_case.module, lambda m, b: m(b[0]).exp().sum() * math.inf
    )
    assert list(found) == ["layer_sharpness"]
    assert math.isnan(found["layer_sharpness"].value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "norm"}, "kind must be one of quotient, eigenvalue"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"max_matvecs": 0}, "max_matvecs must be at least 1"),
        ({"cold_every": 0}, "cold_every must be at least 1"),
    ],
)
def test_refuses_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        LayerSharpnessProbe([None], **arguments)
