from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from landscape_ray.errors import UserError
from landscape_ray.probes.lanczos import lanczos, unit_vector


def rotated(spectrum, seed=0):
    """Return a dense symmetric matrix with this spectrum."""
    spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    return Q * spectrum @ Q.T


def solve(A, **options):
    return lanczos(lambda v: A @ v, len(A), dtype=A.dtype, **options)


@pytest.mark.parametrize(
    "spectrum",
    [
        [5.0, 4.0, 3.0, 2.0, 1.0],
        [-9.0, -3.0, 0.5, 2.0],  # the most negative eigenvalue is larger in magnitude
        [-4.0, -3.0, -2.0],  # all negative
        [1.0, 1.0, 1.0],  # one eigenspace
        [3.0, 3.0, 0.0, 0.0, -3.0],  # repeated
        [7.0],
        [1.0, 0.0, 0.0, 0.0],
        [-1.0, -1.0, 0.0],  # the largest is zero
    ],
)
def test_prescribed_spectra(spectrum):
    A = rotated(spectrum)
    result = solve(A, tol=1e-10)
    assert result.value == pytest.approx(max(spectrum), abs=1e-10)
    assert result.converged
    assert float((A @ result.vector - result.value * result.vector).norm()) < 1e-8
    assert float(result.vector.norm()) == pytest.approx(1.0)
    assert result.num_matvecs <= len(spectrum)


def test_zero_operator():
    result = lanczos(torch.zeros_like, 5)
    assert (result.value, result.residual, result.converged, result.num_matvecs) == (0.0, 0.0, True, 1)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    max_matvecs=st.integers(1, 12),
    tol=st.sampled_from([0.0, 1e-6, 0.03, 0.3]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_residual_bounds_the_distance_to_an_eigenvalue(size, seed, max_matvecs, tol, scale):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(size, size, generator=generator, dtype=torch.float64) * scale
    A = A + A.T
    eigenvalues = torch.linalg.eigvalsh(A)
    result = solve(A, tol=tol, max_matvecs=max_matvecs, seed=seed)
    rounding = 1e-12 * float(eigenvalues.abs().max())
    assert float((eigenvalues - result.value).abs().min()) <= result.residual + rounding
    assert result.value <= float(eigenvalues[-1]) + rounding
    assert float((A @ result.vector - result.value * result.vector).norm()) <= result.residual + rounding
    assert result.asymmetry <= rounding
    assert len(result.ritz_values) == result.num_matvecs <= min(size, max_matvecs)
    if result.converged and result.num_matvecs < size:
        assert result.residual <= max(tol, 1e-12) * max(abs(result.value), 2e-8 * float(eigenvalues.abs().max()))


@pytest.mark.acceptance
def test_no_ghost_copies_after_100_float32_steps():
    wanted = [100.0 * 0.8**k for k in range(12)]
    bulk = torch.linspace(-1.0, 1.0, 600 - len(wanted)).tolist()
    spectrum = torch.tensor(bulk + wanted[::-1])
    result = lanczos(lambda v: spectrum * v, 600, tol=0.0, max_matvecs=100)
    assert result.num_matvecs == 100
    found = result.ritz_values[-12:].tolist()
    assert found == pytest.approx(wanted[::-1], rel=1e-5)

    # The trap is real: without reorthogonalisation the same steps return copies.
    q, previous, beta, alphas, betas = unit_vector(600), torch.zeros(600), 0.0, [], []
    for _ in range(100):
        w = spectrum * q - beta * previous
        alphas.append(float(w @ q))
        w = w - alphas[-1] * q
        previous, beta = q, float(w.norm())
        betas.append(beta)
        q = w / beta
    T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    T += torch.diag(torch.tensor(betas[:-1], dtype=torch.float64), -1)
    ghosts = torch.linalg.eigvalsh(T)[-12:]
    assert int((ghosts > 99.9).sum()) > 1


def test_second_orthogonalisation_pass_keeps_small_values_next_to_a_dominant_one():
    # From a start almost along the dominant vector, one pass leaves rounding of the size of the next direction.
    spectrum = torch.cat([torch.linspace(-1.0, 1.0, 497), torch.tensor([2.0, 5.0, 1000.0])])
    start = torch.eye(500)[-1] + 0.01 * unit_vector(500, seed=3)
    result = lanczos(lambda v: spectrum * v, 500, start=start, tol=0.0, max_matvecs=25)
    assert result.ritz_values[-3:].tolist() == pytest.approx([2.0, 5.0, 1000.0], rel=1e-6)
    assert result.asymmetry < 1e-4


def test_basis_is_used_at_the_requested_tolerance_and_no_further():
    A = rotated([10.0, *torch.linspace(0.0, 1.0, 99).tolist()])
    loose, tight = solve(A, tol=0.1), solve(A, tol=1e-8)
    assert loose.num_matvecs < tight.num_matvecs < 30
    assert loose.residual < 0.1 * loose.value
    assert not solve(A, tol=1e-8, max_matvecs=3).converged


def test_warm_start_saves_products_and_an_eigenvector_needs_one():
    A = rotated(torch.linspace(0.0, 1.0, 200).square())
    cold = solve(A, tol=1e-3, max_matvecs=100)
    near = cold.vector + 0.01 * unit_vector(200, seed=5, dtype=torch.float64)
    assert solve(A, tol=1e-3, start=near, max_matvecs=100).num_matvecs < cold.num_matvecs
    assert solve(A, tol=1e-2, start=cold.vector).num_matvecs == 1


def test_operator_that_is_not_symmetric_shows():
    A = rotated([3.0, 2.0, 1.0, 0.5, 0.1])
    skew = torch.zeros_like(A)
    skew[0, 1] = 0.2
    assert solve(A, tol=0.0).asymmetry < 1e-14
    whole = solve(A + skew, tol=0.0)
    assert whole.asymmetry > 0.01
    given_up = solve(A + skew, tol=0.0, max_asymmetry=0.003)
    assert given_up.asymmetry > 0.003 * 3
    assert given_up.num_matvecs < whole.num_matvecs
    assert not given_up.converged


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_products_give_nan(bad):
    calls = []

    def breaks_later(v):
        calls.append(v)
        return torch.arange(5.0) * v if len(calls) < 3 else torch.full_like(v, bad)

    result = lanczos(breaks_later, 5, tol=0.0)
    assert str(result.value) == str(result.residual) == "nan"
    assert (result.converged, result.num_matvecs) == (False, 3)


def test_products_may_reuse_one_buffer():
    buffer, diagonal = torch.empty(6), torch.arange(6.0)
    result = lanczos(lambda v: torch.mul(diagonal, v, out=buffer), 6, tol=1e-6)
    assert result.value == pytest.approx(5.0, rel=1e-6)


def test_start_is_drawn_by_its_own_generator():
    state = torch.get_rng_state()
    assert torch.equal(unit_vector(9, seed=1), unit_vector(9, seed=1))
    assert not torch.equal(unit_vector(9, seed=1), unit_vector(9, seed=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_refused_arguments():
    with pytest.raises(UserError, match="size must be at least 1, got 0"):
        lanczos(torch.clone, 0)
    with pytest.raises(UserError, match="tol must be finite and at least 0, got -1"):
        lanczos(torch.clone, 2, tol=-1.0)
    with pytest.raises(UserError, match="max_matvecs must be at least 1, got 0"):
        lanczos(torch.clone, 2, max_matvecs=0)
    with pytest.raises(UserError, match=r"start must have shape \(2,\), got \(3,\)"):
        lanczos(torch.clone, 2, start=torch.ones(3))
    for start in (torch.zeros(2), torch.full((2,), float("nan"))):
        with pytest.raises(UserError, match="start must be finite and not zero"):
            lanczos(torch.clone, 2, start=start)
