"""What holds for all probes of the room: settings are checked without batches, and allowances are kept."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes import Host
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.sharpness import (
    AverageCaseSharpnessProbe,
    BatchSharpnessProbe,
    CriticalSharpnessProbe,
    DirectionalSharpnessProbe,
    LayerSharpnessProbe,
    LinfSmoothnessProbe,
    LogitSharpnessProbe,
    PreconditionedSharpnessProbe,
    SamSharpnessProbe,
    SharpnessProbe,
    WorstCaseSharpnessProbe,
    average_case_sharpness,
    batch_sharpness,
    critical_sharpness,
    directional_sharpness,
    layer_sharpness,
    linf_smoothness,
    logit_sharpness,
    preconditioned_sharpness,
    sam_sharpness,
    sharpness,
    worst_case_sharpness,
)

LOSS = OutputLoss(nn.CrossEntropyLoss(reduction="none"), likelihood="categorical")

ALL = [
    (SharpnessProbe, {"tol": 1e-6}),
    (SharpnessProbe, {"tol": 1e-6, "route": "finite_difference"}),
    (SharpnessProbe, {"tol": 1e-6, "route": "auto"}),
    (SharpnessProbe, {"tol": 0.03, "route": "auto"}),
    (PreconditionedSharpnessProbe, {"tol": 1e-6}),
    (PreconditionedSharpnessProbe, {"tol": 1e-6, "route": "finite_difference"}),
    (LayerSharpnessProbe, {"tol": 1e-6}),
    (LayerSharpnessProbe, {"tol": 1e-6, "kind": "eigenvalue"}),
    (BatchSharpnessProbe, {}),
    (BatchSharpnessProbe, {"route": "finite_difference"}),
    (DirectionalSharpnessProbe, {}),
    (DirectionalSharpnessProbe, {"tol": 1e-9}),
    (DirectionalSharpnessProbe, {"route": "gradient"}),
    (CriticalSharpnessProbe, {"tol": 1e-9, "max_forwards": 200}),
    (SamSharpnessProbe, {}),
    (WorstCaseSharpnessProbe, {"num_steps": 50, "num_starts": 2, "tol": 0.0}),
    (WorstCaseSharpnessProbe, {"num_steps": 50, "subset_examples": 16, "tol": 0.0}),
    (AverageCaseSharpnessProbe, {"num_pairs": 100, "radii": [0.05, 0.1]}),
    (LogitSharpnessProbe, {}),
    (LinfSmoothnessProbe, {}),
    (LinfSmoothnessProbe, {"num_vectors": 3, "num_ascents": 100}),
]


def settings_of(value):
    return ",".join(f"{name}={given}" for name, given in value.items()) if isinstance(value, dict) else None


@pytest.fixture
def wide():
    """A smooth network in float32, many-sided enough that nothing converges early."""
    generator = torch.Generator().manual_seed(3)
    module = nn.Sequential(
        nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24), nn.Linear(24, 4)
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
    return module, torch.randn(60, 12, generator=generator), torch.randint(4, (60,), generator=generator)


def host_for(module, allowance_gradients=math.inf):
    gradients = torch.autograd.grad(sum(p.square().sum() for p in module.parameters()), list(module.parameters()))
    return Host(
        step=5,
        lr=0.1,
        momentum=0.9,
        optimizer="adamw",
        preconditioner=lambda: [p.detach().abs() + 0.1 for p in module.parameters()],
        update=[-0.001 * g for g in gradients],
        allowance_gradients=allowance_gradients,
    )


@pytest.mark.acceptance
@pytest.mark.parametrize(("probe", "settings"), ALL, ids=settings_of)
@pytest.mark.parametrize("sizes", [[60], [30, 20, 10]], ids=["whole", "parts"])
@pytest.mark.parametrize("allowance", [0.0, 12.0, 30.0])
def test_no_cold_measurement_exceeds_its_allowance(wide, probe, settings, sizes, allowance):
    """The least there is: the check of the loss, a setup, three products and what checks them."""
    module, inputs, targets = wide
    parts = zip(inputs.split(sizes), targets.split(sizes), sizes, strict=True)
    batches = [((some, wanted), size) for some, wanted, size in parts]
    if probe is BatchSharpnessProbe and len(sizes) == 1:
        pytest.skip("a spread needs two minibatches")
    found = probe(batches, **settings).measure(module, LOSS, host_for(module, allowance))
    main = next(iter(found.values()))
    assert math.isfinite(main.value) or (probe is CriticalSharpnessProbe and not allowance)  # four losses: no crossing
    least = 2 / 3 + 3 * 3.5
    assert main.price_gradients <= max(allowance, least) + 1e-9
    if allowance == 30:  # what is cut short is not cut to nothing
        whole = probe(batches, **settings).measure(module, LOSS, host_for(module))
        assert main.price_gradients >= min(0.55 * allowance, next(iter(whole.values())).price_gradients) - 1e-9


@pytest.mark.parametrize("sizes", [[60], [30, 20, 10]], ids=["whole", "parts"])
def test_sampled_and_sought_values_that_were_cut_short_are_not_converged(wide, sizes):
    module, inputs, targets = wide
    batches = list(zip(zip(inputs.split(sizes), targets.split(sizes), strict=True), sizes, strict=True))
    for probe, settings in [
        (AverageCaseSharpnessProbe, {"num_pairs": 30, "radii": [0.05, 0.1]}),
        (LinfSmoothnessProbe, {"num_vectors": 10, "num_ascents": 3}),
        (LayerSharpnessProbe, {}),
        (SharpnessProbe, {"tol": 1e-4}),
        (PreconditionedSharpnessProbe, {"tol": 1e-4}),
    ]:
        cut = probe(batches, **settings).measure(module, LOSS, host_for(module, 8.0))
        assert not any(estimate.converged for estimate in cut.values()), probe.name
    for probe, settings in [
        (AverageCaseSharpnessProbe, {"num_pairs": 4}),
        (LinfSmoothnessProbe, {"num_vectors": 3}),
        (LayerSharpnessProbe, {"max_matvecs": 100}),
    ]:
        uncut = probe(batches, **settings).measure(module, LOSS, host_for(module))
        assert all(estimate.converged for estimate in uncut.values()), probe.name


class Hinge(nn.Module):
    """ReLU of another make: its kinks are not held."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.0)


def test_differences_that_fail_are_remembered_where_exact_products_cannot_be_paid(wide):
    """Kinks: with an allowance for the check only, the estimate stands as it is, and the next one is exact."""
    _, inputs, targets = wide
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 16), Hinge(), nn.Linear(16, 4))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    probe = SharpnessProbe([(inputs, targets)], route="auto", tol=1e-4, max_matvecs=8)
    short = probe.measure(module, LOSS, Host(allowance_gradients=2 / 3 + 1 + 8 + 3.5 + 2.3))["sharpness"]
    assert (short.route, short.converged) == ("finite_difference", False)
    assert short.price_gradients <= 2 / 3 + 1 + 8 + 3.5 + 2.3
    assert probe.measure(module, LOSS)["sharpness"].route == "exact"


ONE_DIMENSIONAL = (SamSharpnessProbe, WorstCaseSharpnessProbe, AverageCaseSharpnessProbe)


@pytest.mark.parametrize(
    ("probe", "settings"),
    [
        *itertools.product(
            [
                SharpnessProbe,
                PreconditionedSharpnessProbe,
                LayerSharpnessProbe,
                BatchSharpnessProbe,
                DirectionalSharpnessProbe,
                CriticalSharpnessProbe,
            ],
            [{"tol": 0.0}, {"tol": -1.0}, {"tol": math.nan}, {"tol": math.inf}],
        ),
        *itertools.product(
            [SharpnessProbe, PreconditionedSharpnessProbe, LayerSharpnessProbe], [{"max_matvecs": 0}, {"cold_every": 0}]
        ),
        *itertools.product(
            [SharpnessProbe, PreconditionedSharpnessProbe, BatchSharpnessProbe, DirectionalSharpnessProbe],
            [{"route": "none"}],
        ),
        (LayerSharpnessProbe, {"kind": "none"}),
        *itertools.product([DirectionalSharpnessProbe], [{"step": 0.0}, {"step": math.nan}]),
        (CriticalSharpnessProbe, {"max_forwards": 3}),
        *itertools.product(
            [*ONE_DIMENSIONAL, LogitSharpnessProbe], [{"radii": []}, {"radii": [0.0]}, {"radii": [math.nan]}]
        ),
        *itertools.product(
            ONE_DIMENSIONAL,
            [
                {"scaling": "none"},
                {"norm": "l1"},
                {"eta": -1.0},
                {"eta": math.nan},
                {"eta": 0.1, "scaling": "standard"},
            ],
        ),
        *itertools.product([SamSharpnessProbe, WorstCaseSharpnessProbe], [{"subset_examples": -1}]),
        *itertools.product([WorstCaseSharpnessProbe], [{"num_steps": 0}, {"num_starts": 0}, {"tol": -1.0}]),
        (AverageCaseSharpnessProbe, {"num_pairs": 1}),
        *itertools.product([LinfSmoothnessProbe], [{"num_vectors": 2}, {"num_ascents": -1}]),
    ],
    ids=settings_of,
)
def test_settings_out_of_range_are_refused_without_batches(probe, settings):
    assert probe(batches=[]).price_gradients > 0
    field = next(iter(settings))
    with pytest.raises(UserError, match=rf"^{field} must .*, got "):
        probe(batches=[], **settings)


@pytest.mark.parametrize(
    "measure",
    [
        sharpness,
        lambda *a: preconditioned_sharpness(*a, [p.detach().abs() + 1 for p in a[0].parameters()]),
        layer_sharpness,
        batch_sharpness,
        lambda *a: directional_sharpness(*a, torch.ones(72)),
        lambda *a: critical_sharpness(*a, torch.ones(72), lr=0.1),
        sam_sharpness,
        worst_case_sharpness,
        average_case_sharpness,
        logit_sharpness,
        linf_smoothness,
    ],
)
def test_every_function_refuses_a_loss_that_is_not_one(wide, measure):
    _, inputs, targets = wide
    module = nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 4))
    numbers = itertools.count(1)

    class Drifting(OutputLoss):
        def __call__(self, module, batch):
            return next(numbers) * super().__call__(module, batch)

    loss = Drifting(nn.CrossEntropyLoss(reduction="none"), likelihood="categorical")
    batches = [((inputs[:40], targets[:40]), 40), ((inputs[40:], targets[40:]), 20)]
    with pytest.raises(UserError, match="loss must be a fixed function of the weights"):
        measure(module, loss, batches)
