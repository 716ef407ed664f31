from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy import stats
from torch import nn

from landscape_ray.errors import UserError
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.probe import Host
from landscape_ray.probes.spectrum.density import SpectralDensityProbe, spectral_density
from landscape_ray.probes.spectrum.quadrature import lanczos_quadrature
from landscape_ray.probes.spectrum.sign_samples import random_signs

CROSS_ENTROPY = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")
NUM_SEEDS = 200


def rotated(spectrum, seed=0):
    spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    return Q * spectrum @ Q.T


def quadrature(A, **options):
    return lanczos_quadrature(lambda v: A @ v, len(A), dtype=A.dtype, **options)


def true_density(spectrum, grid, sigma):
    normal = torch.distributions.Normal(torch.as_tensor(spectrum, dtype=torch.float64), sigma)
    return normal.log_prob(grid[:, None]).exp().mean(1)


BULK = torch.linspace(-1.0, 1.0, 200).tolist()


@pytest.mark.acceptance
def test_moments_of_a_run_are_those_of_its_vector():
    A = rotated([*BULK, 4.0, 9.0])
    found = quadrature(A, num_steps=8, num_vectors=3, seed=5)
    generator = torch.Generator().manual_seed(5)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        v = random_signs(len(A), generator, torch.float64, torch.device("cpu"))
        power = v
        for degree in range(16):  # exact below 2 m
            assert float((weights * nodes**degree).sum()) == pytest.approx(float(v @ power) / len(A), rel=1e-9)
            power = A @ power


@pytest.mark.acceptance
def test_density_of_a_small_matrix_converges_to_the_truth():
    spectrum = [-2.0, -0.3, 0.0, 0.0, 0.1, 0.2, 0.5, 1.0, 3.0, 6.0]
    A = rotated(spectrum)
    few, many = (quadrature(A, num_steps=10, num_vectors=n, sigma=0.3) for n in (4, 150))
    grid = torch.linspace(-4.0, 8.0, 400, dtype=torch.float64)
    exact = true_density(spectrum, grid, 0.3)
    distances = []
    for found in (few, many):
        density, error = found.at(grid)
        assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=1e-6)
        distances.append(float((density - exact).abs().max()))
    assert bool(((density - exact).abs() <= 4 * error + 1e-9).all())
    assert distances[1] < 0.05
    assert distances[1] < 0.5 * distances[0]


def test_density_of_a_semicircle():
    size = 400
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(size, size, generator=generator, dtype=torch.float64) / math.sqrt(2 * size)
    found = quadrature(A + A.T, num_steps=30, num_vectors=20, sigma=0.2)
    grid = torch.linspace(-1.5, 1.5, 50, dtype=torch.float64)
    density, error = found.at(grid)
    assert float(error.max()) < 0.03
    assert bool(((density - (4 - grid**2).sqrt() / (2 * math.pi)).abs() < 4 * error).all())
    assert (found.num_above.value, found.num_below.value) == (0, 0)
    assert found.bulk_upper.value == pytest.approx(2.0, abs=0.1)
    assert found.bulk_lower.value == pytest.approx(-2.0, abs=0.1)
    assert quadrature(A + A.T, num_steps=3, num_vectors=1).density_error is None


@pytest.mark.parametrize("spectrum", [[*BULK, 30.0], [0.0] * 9, [2.5], [-1.0, 1.0], [1e-9] * 3, BULK])
@pytest.mark.parametrize("num_vectors", [1, 2])
def test_grid_carries_the_whole_density(spectrum, num_vectors):
    found = quadrature(rotated(spectrum), num_steps=40, num_vectors=num_vectors)
    assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1.0, abs=1e-5)
    assert bool((found.density >= 0).all())
    assert bool((found.grid.diff() >= 0).all())
    assert found.at(found.grid)[0].tolist() == found.density.tolist()
    assert found.sigma > 0


@pytest.mark.acceptance
@pytest.mark.parametrize("spectrum", [[*BULK, 5.0, 9.0], torch.linspace(-3.0, 0.5, 40).tolist()])
def test_errors_of_trace_and_norm_cover_the_truth(spectrum):
    A = rotated(spectrum)
    trace, norm, num_vectors = sum(spectrum), math.sqrt(sum(value**2 for value in spectrum)), 6
    found = [quadrature(A, num_steps=3, num_vectors=num_vectors, seed=seed) for seed in range(NUM_SEEDS)]
    for name, truth in (("trace", trace), ("frobenius_norm", norm)):
        hits = sum(abs(getattr(f, name).value - truth) <= getattr(f, name).standard_error for f in found)
        low, high = stats.binom(NUM_SEEDS, 0.683).ppf([1e-3, 1 - 1e-3])
        assert low <= hits <= high, name


@pytest.mark.acceptance
def test_error_of_one_vector_is_that_of_the_trace_and_no_less():
    spectrum = [*BULK, 5.0, 9.0]
    A = rotated(spectrum)
    found = [quadrature(A, num_steps=3, num_vectors=1, seed=seed).trace for seed in range(NUM_SEEDS)]
    spread = torch.tensor([estimate.value for estimate in found]).std()
    stated = torch.tensor([estimate.standard_error**2 for estimate in found]).mean().sqrt()
    exact = math.sqrt(2 * (sum(value**2 for value in spectrum) - float(A.diagonal().square().sum())))
    assert float(spread) == pytest.approx(exact, rel=0.2)
    assert exact < float(stated) < 1.3 * exact
    hits = sum(abs(estimate.value - sum(spectrum)) <= 2 * estimate.standard_error for estimate in found)
    assert hits >= stats.binom(NUM_SEEDS, 0.95).ppf(1e-3)


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("outliers_above", "outliers_below"), [([3.0, 4.0, 4.5, 20.0], [-8.0]), ([2.0], []), ([], [-4.0, -2.0]), ([], [])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outliers_are_told_from_the_bulk(outliers_above, outliers_below, dtype):
    size = 600
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64) / math.sqrt(8 * size)
    Q, _ = torch.linalg.qr(torch.randn(size, 8, generator=generator, dtype=torch.float64))
    wanted = [*outliers_above, *outliers_below]
    A = noise + noise.T + Q[:, : len(wanted)] * torch.tensor(wanted, dtype=torch.float64) @ Q[:, : len(wanted)].T
    found = quadrature(A.to(dtype), num_steps=50, num_vectors=2)
    eigenvalues = torch.linalg.eigvalsh(A)
    few = len(outliers_below)
    exact = [*eigenvalues[size - len(outliers_above) :].flip(0).tolist(), *eigenvalues[:few].flip(0).tolist()]
    assert (found.num_above.value, found.num_below.value) == (len(outliers_above), few)
    assert found.outliers.tolist() == pytest.approx(exact, rel=1e-4)
    assert found.bulk_upper.value == pytest.approx(float(eigenvalues[size - 1 - len(outliers_above)]), rel=0.02)
    assert found.bulk_lower.value == pytest.approx(float(eigenvalues[few]), rel=0.02)
    assert found.largest.value == pytest.approx(float(eigenvalues[-1]), rel=1e-2)
    assert found.smallest.value == pytest.approx(float(eigenvalues[0]), rel=1e-2)


@pytest.mark.acceptance
def test_dense_hessian_in_one_run(case, dense_hessian):
    H = dense_hessian(case)
    exact = torch.linalg.eigvalsh(H)
    found = spectral_density(case.module, case.loss, [case.batch], num_steps=len(H), num_vectors=1)
    assert found.largest.value == pytest.approx(float(exact[-1]), rel=1e-6)
    assert found.smallest.value == pytest.approx(float(exact[0]), rel=1e-6)
    assert found.price_gradients == pytest.approx(2 / 3 + 1.2 + 2.3 * found.num_matvecs)
    found = spectral_density(case.module, case.loss, [case.batch], num_steps=3, num_vectors=40)
    assert abs(found.trace.value - float(H.trace())) <= 4 * found.trace.standard_error
    assert abs(found.frobenius_norm.value - float(H.norm())) <= 4 * found.frobenius_norm.standard_error
    ggn = spectral_density(case.module, CROSS_ENTROPY, [case.batch], curvature="ggn", num_steps=20)
    assert ggn.smallest.value > -1e-9


def wide(activation, seed=0):
    """Return a network of 3,413 weights in float32, where a step of differences crosses kinks."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(16, 48), activation(), nn.Linear(48, 48), activation(), nn.Linear(48, 5))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
    inputs = torch.randn(128, 16, generator=generator)
    return module, (inputs, (inputs @ torch.randn(16, 5, generator=generator)).argmax(1))


class Hinge(nn.Module):
    """ReLU of another make: its kinks are not held."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.0)


@pytest.mark.acceptance
@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
@pytest.mark.parametrize("route", ["finite_difference", "auto"])
def test_differences_give_the_same_for_half_the_price(activation, route):
    module, batch = wide(activation)
    settings = {"num_steps": 30, "num_vectors": 2, "seed": 1}
    exact = spectral_density(module, CROSS_ENTROPY, [batch], **settings)
    found = spectral_density(module, CROSS_ENTROPY, [batch], route=route, **settings)
    assert found.by_differences
    assert not exact.by_differences
    for part in ("trace", "frobenius_norm", "largest", "smallest", "bulk_upper"):
        one, other = getattr(found, part), getattr(exact, part)
        assert one.value == pytest.approx(other.value, rel=0.02, abs=0.01 * exact.largest.value), part
        assert one.converged == other.converged
    assert found.num_above.value == exact.num_above.value
    assert abs(found.largest.value - exact.largest.value) <= found.largest.standard_error + exact.largest.standard_error
    # a gradient at the weights, one for each product, and two products that check: the first, and the largest value
    checks = 1.2 + 2 * 2.3 if route == "auto" else 4.0
    assert found.price_gradients == pytest.approx(2 / 3 + 1 + 60 + checks)
    assert found.num_matvecs == 60 + (2 if route == "auto" else 4)
    probe = SpectralDensityProbe([batch], num_steps=30, num_vectors=2, route=route, seed=1)
    assert probe.measure(module, CROSS_ENTROPY)["spectral_density/largest"].value == found.largest.value
    assert probe.price_gradients == pytest.approx(found.price_gradients - 2 / 3)
    fresh = SpectralDensityProbe([batch], num_steps=30, num_vectors=2, route=route)
    fresh.load_state_dict(probe.state_dict())
    assert fresh.price_gradients == probe.price_gradients


def test_differences_across_unknown_kinks_are_found_out():
    module, batch = wide(Hinge)
    exact = spectral_density(module, CROSS_ENTROPY, [batch], num_steps=20, num_vectors=1)
    auto = spectral_density(module, CROSS_ENTROPY, [batch], num_steps=20, num_vectors=1, route="auto")
    assert not auto.by_differences
    assert auto.largest.value == pytest.approx(exact.largest.value, rel=1e-4)
    assert auto.largest.converged == exact.largest.converged
    forced = spectral_density(module, CROSS_ENTROPY, [batch], num_steps=20, num_vectors=1, route="finite_difference")
    assert not any(e.converged for e in (forced.trace, forced.largest, forced.bulk_upper))
    assert forced.largest.standard_error > 0.05 * forced.largest.value


def test_an_allowance_pays_for_the_checks_too():
    module, batch = wide(nn.Tanh)
    for route in ("finite_difference", "auto"):
        probe = SpectralDensityProbe([batch], num_steps=50, route=route)
        found = probe.measure(module, CROSS_ENTROPY, Host(allowance_gradients=25.0))
        assert 20.0 < found["spectral_density"].price_gradients <= 25.0
        assert not any(estimate.converged for estimate in found.values())


def test_probe_agrees_with_the_function(smooth_case):
    probe = SpectralDensityProbe([smooth_case.batch], num_steps=12, num_vectors=2, seed=3)
    assert probe.price_gradients == pytest.approx(1.2 + 2.3 * 12 * 2)
    found = probe.measure(smooth_case.module, smooth_case.loss)
    whole = spectral_density(
        smooth_case.module, smooth_case.loss, [smooth_case.batch], num_steps=12, num_vectors=2, seed=3
    )
    parts = ["bulk_lower", "num_above", "num_below", "largest", "smallest", "trace", "frobenius_norm"]
    assert list(found) == ["spectral_density", *(f"spectral_density/{part}" for part in parts)]
    assert found["spectral_density"].value == whole.bulk_upper.value
    assert found["spectral_density"].num_matvecs == whole.num_matvecs == 24
    for part in parts:
        assert found[f"spectral_density/{part}"].value == getattr(whole, part).value
    again = probe.measure(smooth_case.module, smooth_case.loss)
    assert again["spectral_density/trace"].value != found["spectral_density/trace"].value
    cheap = probe.measure(smooth_case.module, smooth_case.loss, Host(allowance_gradients=30.0))
    assert cheap["spectral_density"].num_matvecs == 12


def test_ritz_values_with_large_residuals_are_not_converged(smooth_case, dense_hessian):
    exact = float(torch.linalg.eigvalsh(dense_hessian(smooth_case))[-1])
    parts = ("largest", "smallest", "bulk_upper", "bulk_lower")
    arguments = smooth_case.module, smooth_case.loss, [smooth_case.batch]
    short = spectral_density(*arguments, num_steps=3, num_vectors=1)
    assert abs(short.largest.value - exact) > 0.05 * exact
    assert not short.largest.converged
    for found in (short, spectral_density(*arguments, num_steps=20, num_vectors=2)):
        scale = 0.01 * max(abs(found.largest.value), abs(found.smallest.value))
        for estimate in (found.largest, found.smallest):
            assert estimate.converged == (estimate.standard_error <= 0.05 * max(abs(estimate.value), scale))
        assert found.trace.converged
    whole = spectral_density(*arguments, num_steps=len(dense_hessian(smooth_case)), num_vectors=1)
    assert all(getattr(whole, part).converged for part in parts)


def test_nothing_is_converged_that_the_allowance_cut_short(smooth_case):
    probe = SpectralDensityProbe([smooth_case.batch], num_steps=len(smooth_case.batch[0]))
    arguments = smooth_case.module, smooth_case.loss
    assert all(estimate.converged for estimate in probe.measure(*arguments).values())
    cut = probe.measure(*arguments, Host(allowance_gradients=60.0))
    assert math.isfinite(cut["spectral_density"].value)
    assert not any(estimate.converged for estimate in cut.values())


def test_not_finite_values_give_nan(smooth_case):
    def explodes(module, batch):
        return smooth_case.loss(module, batch) * float("inf")

    with torch.no_grad():
        next(smooth_case.module.parameters())[0] = float("nan")
    for loss in (smooth_case.loss, explodes):
        found = spectral_density(smooth_case.module, loss, [smooth_case.batch], num_steps=5)
        assert math.isnan(found.trace.value)
        assert len(found.grid) == 0
    assert math.isnan(lanczos_quadrature(lambda v: v * float("nan"), 4).largest.value)


def test_result_is_frozen():
    found = quadrature(rotated([1.0, 2.0]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.sigma = 1.0


def test_refused_arguments():
    A = rotated([1.0, 2.0])
    for bad, message in (
        ({"num_steps": 2}, "num_steps must be at least 3, got 2"),
        ({"num_vectors": 0}, "num_vectors must be at least 1, got 0"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0"),
        ({"min_gap": 1.0}, "min_gap must be between 0 and 1, got 1"),
    ):
        with pytest.raises(UserError, match=message):
            quadrature(A, **bad)
    with pytest.raises(UserError, match="sigma must be positive and finite, got -1"):
        quadrature(A).at(torch.zeros(3), sigma=-1.0)
    with pytest.raises(UserError, match="curvature must be one of"):
        SpectralDensityProbe([0], curvature="ntk")
    with pytest.raises(UserError, match="route must be one of exact, finite_difference, auto, got 'fast'"):
        SpectralDensityProbe([0], route="fast")
    with pytest.raises(UserError, match="route must be exact for curvature ggn, got 'auto'"):
        SpectralDensityProbe([0], curvature="ggn", route="auto")
