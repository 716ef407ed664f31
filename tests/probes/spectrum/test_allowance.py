"""What the probes of the spectrum and of gradients spend, and what they refuse before they see a batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes import PROBES, Host
from landscape_ray.probes.gradients.coherence import GradientCoherenceProbe
from landscape_ray.probes.gradients.noise_scale import GradientNoiseScaleProbe
from landscape_ray.probes.gradients.opposing import OpposingSignalsProbe
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.spectrum.density import SpectralDensityProbe, spectral_density
from landscape_ray.probes.spectrum.eigenpairs import EigenvaluesProbe, eigenvalues
from landscape_ray.probes.spectrum.ggn_trace import GGNTraceProbe, ggn_trace
from landscape_ray.probes.spectrum.trace import TraceProbe, trace

LOSS = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")


def problem(sizes, activation=nn.Tanh):
    """Return a network of 115 weights and micro-batches of these sizes."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 6), nn.LayerNorm(6)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    batches = [
        ((torch.randn(n, 6, generator=generator).double(), torch.randint(6, (n,), generator=generator)), n)
        for n in sizes
    ]
    return module, batches


@pytest.mark.parametrize("sizes", [(24,), (12, 7, 5)], ids=["one", "three"])
@pytest.mark.parametrize("allowance", [12.0, 30.0])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("eigenvalues", {"tol": 1e-9}),
        ("eigenvalues", {"tol": 1e-9, "curvature": "ggn"}),
        ("spectral_density", {}),
        ("spectral_density", {"num_vectors": 2}),
        ("spectral_density", {"curvature": "fisher"}),
        ("trace", {"tol": 1e-6}),
        ("trace", {"tol": 1e-6, "curvature": "ggn", "method": "hutch++"}),
        ("trace", {"tol": 1e-6, "method": "xtrace", "route": "finite_difference"}),
        ("trace", {"tol": 1e-6, "route": "auto"}),
        ("ggn_trace", {"tol": 1e-6}),
        ("gradient_noise_scale", {"num_products": 12}),
        ("gradient_noise_scale", {"num_products": 12, "source": "micro_batches"}),
        ("gradient_noise_scale", {"num_products": 12, "max_bytes": 1}),
        ("gradient_coherence", {}),
        ("gradient_norms", {}),
        ("distance_from_init", {}),
        ("opposing_signals", {}),
    ],
)
def test_no_measurement_costs_more_than_it_may(name, settings, allowance, sizes):
    module, batches = problem((8,) * 3 if settings.get("source") == "micro_batches" else sizes)
    update = [torch.full_like(p, 0.01) for p in module.parameters()]

    def spend(allowance):
        host = Host(allowance_gradients=allowance, update=update)
        found = PROBES[name](batches, **settings).measure(module, LOSS, host)
        assert math.isfinite(found[name].value) or name == "gradient_noise_scale"
        return found[name].price_gradients

    assert spend(allowance) <= max(allowance, spend(0.0)) + 1e-9


@pytest.mark.parametrize("num_batches", [1, 2])
def test_price_is_that_of_the_batches_given_later(num_batches):
    module, batches = problem((8,) * num_batches)
    for settings in ({}, {"curvature": "ggn"}):
        density = SpectralDensityProbe([], num_steps=4, **settings)
        density.batches = batches
        spent = density.measure(module, LOSS)["spectral_density"].price_gradients
        assert density.price_gradients == pytest.approx(spent - 2 / 3)
        few = EigenvaluesProbe([], tol=1e-12, max_matvecs=6, **settings)
        few.batches = batches
        expected = few.price_gradients
        assert few.measure(module, LOSS)["eigenvalues"].price_gradients == pytest.approx(expected + 2 / 3)


@pytest.mark.parametrize("function", [eigenvalues, trace, spectral_density, ggn_trace])
def test_losses_that_are_not_fixed_are_refused(function):
    module, batches = problem((8,))
    values = iter(range(100))
    noisy = OutputLoss(lambda outputs, targets: LOSS.criterion(outputs, targets) * (1 + 0.1 * next(values)))
    noisy.likelihood = "categorical"
    with pytest.raises(UserError, match="loss must be a fixed function of the weights"):
        function(module, noisy, batches)


@pytest.mark.parametrize(
    ("probe", "settings", "message"),
    [
        (EigenvaluesProbe, {"tol": 0.0}, "tol must be positive"),
        (EigenvaluesProbe, {"curvature": "ntk"}, "curvature must be one of"),
        (EigenvaluesProbe, {"k": 0}, "k must be at least 1"),
        (EigenvaluesProbe, {"max_matvecs": 3}, "max_matvecs at least their sum"),
        (EigenvaluesProbe, {"cold_every": 0}, "cold_every must be at least 1"),
        (SpectralDensityProbe, {"num_steps": 2}, "num_steps must be at least 3"),
        (SpectralDensityProbe, {"num_vectors": 0}, "num_vectors must be at least 1"),
        (SpectralDensityProbe, {"min_gap": 1.0}, "min_gap must be between"),
        (SpectralDensityProbe, {"curvature": "ntk"}, "curvature must be one of"),
        (TraceProbe, {"method": "xtrace", "max_matvecs": 7}, "max_matvecs must be at least 8"),
        (TraceProbe, {"max_matvecs": 1}, "max_matvecs must be at least 2"),
        (TraceProbe, {"tol": math.nan}, "tol must be positive"),
        (TraceProbe, {"curvature": "fisher", "route": "auto"}, "route must be exact for curvature fisher"),
        (GGNTraceProbe, {"tol": math.inf}, "tol must be positive"),
        (GGNTraceProbe, {"max_gradients": 0.0}, "max_gradients must be positive"),
        (GradientNoiseScaleProbe, {"source": "all"}, "source must be one of"),
        (GradientNoiseScaleProbe, {"num_products": 1}, "num_products must be 0 or at least 2"),
        (GradientNoiseScaleProbe, {"smoothing": 1.0}, "smoothing must be at least 0"),
        (GradientNoiseScaleProbe, {"max_bytes": 0}, "max_bytes must be at least 1"),
        (GradientCoherenceProbe, {"max_bytes": 0}, "max_bytes must be at least 1"),
        (OpposingSignalsProbe, {"max_bytes": 0}, "max_bytes must be at least 1"),
        (OpposingSignalsProbe, {"fraction": 0.6}, "fraction must be above 0"),
        (OpposingSignalsProbe, {"num_permutations": 18}, "num_permutations must be at least 19"),
    ],
)
def test_settings_are_refused_without_batches(probe, settings, message):
    with pytest.raises(UserError, match=message):
        probe([], **settings)
