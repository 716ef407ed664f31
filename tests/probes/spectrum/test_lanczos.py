from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from landscape_ray.errors import UserError
from landscape_ray.probes.spectrum import krylov
from landscape_ray.probes.spectrum.krylov import Krylov
from landscape_ray.probes.spectrum.lanczos import extremal_pairs, lanczos, unit_vector


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


def pairs_of(A, **options):
    return extremal_pairs(lambda v: A @ v, len(A), dtype=A.dtype, **options)


def both_ends(A, k, num_smallest):
    eigenvalues = torch.linalg.eigvalsh(A.double())
    return torch.cat([eigenvalues.flip(0)[:k], eigenvalues[:num_smallest]])


SPECTRA = {
    "clustered": [*torch.linspace(-1.0, 1.0, 60).tolist(), 4.0, 4.01, 4.02, 4.03, 9.0],
    "negative_trace": [*torch.linspace(-8.0, -0.5, 50).tolist(), 0.2, 1.0, 3.0],
    "smallest_wins": [-20.0, *torch.linspace(-1.0, 1.0, 50).tolist(), 5.0, 6.0],
    "rank_deficient": [0.0] * 60 + [1.0, 2.0, 3.0, 4.0],
    "all_negative": torch.linspace(-3.0, -1.0, 40).tolist(),
}


@pytest.mark.acceptance
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("k", "num_smallest"), [(4, 0), (0, 3), (3, 2)])
def test_both_ends_of_prescribed_spectra(name, dtype, k, num_smallest):
    A = rotated(SPECTRA[name]).to(dtype)
    tol = 1e-5 if dtype is torch.float32 else 1e-9
    found = pairs_of(A, k=k, num_smallest=num_smallest, tol=tol, max_matvecs=200)
    norm = max(abs(value) for value in SPECTRA[name])
    rounding = (1e-5 if dtype is torch.float32 else 1e-11) * norm
    assert found.converged
    assert found.values.tolist() == pytest.approx(both_ends(A, k, num_smallest).tolist(), abs=rounding)
    exact = A @ found.vectors.T - found.vectors.T * found.values.to(dtype)
    assert bool((exact.norm(dim=0) <= found.residuals + rounding).all())
    assert float((found.vectors @ found.vectors.T - torch.eye(k + num_smallest)).abs().max()) < 1e-4


def test_every_wanted_pair_meets_the_tolerance():
    A = rotated([*torch.linspace(0.0, 1.0, 150).tolist(), 1.5, 1.6, 10.0])
    loose, tight = pairs_of(A, k=3, tol=1e-2, max_matvecs=100), pairs_of(A, k=3, tol=1e-6, max_matvecs=100)
    assert bool((loose.residuals < 1e-2 * loose.values).all())
    assert bool((tight.residuals < 1e-6 * tight.values).all())
    assert loose.num_matvecs < tight.num_matvecs < 100
    assert pairs_of(A, k=1, tol=1e-2).num_matvecs < loose.num_matvecs
    # small values count as known at a share of the largest: the floor
    low = rotated([*torch.linspace(-0.05, 1.0, 150).tolist(), 10.0])
    cheap = pairs_of(low, k=1, num_smallest=1, tol=1e-2, floor=0.1, max_matvecs=150)
    assert cheap.num_matvecs < pairs_of(low, k=1, num_smallest=1, tol=1e-2, max_matvecs=150).num_matvecs
    assert cheap.residuals[1] < 1e-2 * 0.1 * 10.0


def test_repeated_eigenvalues_need_a_block():
    A = rotated([5.0, 5.0, 4.0, *torch.linspace(-1.0, 1.0, 200).tolist()])
    single, double = (pairs_of(A, k=2, tol=1e-5, max_matvecs=150, block=block) for block in (1, 2))
    assert double.values.tolist() == pytest.approx([5.0, 5.0], abs=1e-9)
    assert single.values.tolist() == pytest.approx([5.0, 4.0], abs=1e-9)  # residuals do not tell
    assert single.converged
    assert double.converged
    triple = pairs_of(rotated([2.0] * 3 + [0.5] * 4 + [-1.0] * 3), k=4, tol=1e-8, block=3)
    assert triple.values.tolist() == pytest.approx([2.0, 2.0, 2.0, 0.5], abs=1e-9)


@pytest.mark.parametrize(
    ("spectrum", "k", "num_smallest"),
    [
        ([3.0, 3.0, 0.0, 0.0, -3.0], 2, 0),
        ([3.0, 3.0, 0.0, 0.0, -3.0], 3, 2),
        ([1.0] * 6, 4, 0),
        ([0.0] * 20 + [2.0], 3, 0),
        ([0.0] * 20, 2, 2),
        ([-1.0] * 3 + [1.0] * 3, 3, 3),
    ],
)
def test_exhausted_krylov_spaces_go_on_with_another_vector(spectrum, k, num_smallest):
    wanted = sorted(spectrum, reverse=True)[:k] + sorted(spectrum)[:num_smallest]
    for seed in range(30):  # rounding is another one in every basis, and on every machine
        found = pairs_of(rotated(spectrum, seed), k=k, num_smallest=num_smallest, tol=1e-9)
        assert found.values.tolist() == pytest.approx(wanted, abs=1e-9)
        assert found.converged
        assert found.exhausted
        assert found.num_matvecs <= len(spectrum)


@pytest.mark.parametrize("block", [1, 2])
def test_restarts_bound_the_basis_and_find_the_same(block):
    spectrum = [*torch.linspace(-1.0, 1.0, 300).tolist(), 1.2, 1.4, 1.6, 1.8, 2.0]
    A = rotated(spectrum)
    sizes = []

    def counting(v):
        sizes.append(v.untyped_storage().nbytes() // (8 * len(v)))  # rows of the basis that v is a row of
        return A @ v

    options = {"k": 4, "num_smallest": 1, "tol": 1e-7, "max_matvecs": 400, "block": block, "dtype": A.dtype}
    whole = extremal_pairs(lambda v: A @ v, len(A), **options)
    bounded = extremal_pairs(counting, len(A), max_basis=16, **options)
    assert max(sizes) == 16 < whole.num_matvecs
    assert bounded.num_restarts > 3
    assert whole.num_restarts == 0
    assert bounded.converged
    assert bounded.values.tolist() == pytest.approx(both_ends(A, 4, 1).tolist(), abs=1e-9)
    assert bounded.num_matvecs < 4 * whole.num_matvecs
    exact = A @ bounded.vectors.T - bounded.vectors.T * bounded.values
    assert exact.norm(dim=0).tolist() == pytest.approx(bounded.residuals.tolist(), abs=1e-11)
    assert bounded.weights is None


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(2, 14),
    k=st.integers(0, 3),
    num_smallest=st.integers(0, 3),
    block=st.integers(1, 3),
    spare=st.integers(0, 4),
    seed=st.integers(0, 2**31),
)
def test_projection_and_residuals_are_what_they_say(size, k, num_smallest, block, spare, seed):
    if not 1 <= k + num_smallest <= size:
        return
    A = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    A = A + A.T
    found = pairs_of(
        A,
        k=k,
        num_smallest=num_smallest,
        block=block,
        tol=1e-3,
        max_matvecs=2 * size + 4,
        max_basis=k + num_smallest + block + 2 + spare,
        seed=seed,
    )
    norm = float(torch.linalg.matrix_norm(A, 2))
    exact = A @ found.vectors.T - found.vectors.T * found.values
    assert exact.norm(dim=0).tolist() == pytest.approx(found.residuals.tolist(), abs=1e-11 * norm)
    assert found.values.tolist() == sorted(found.values[:k].tolist(), reverse=True) + sorted(found.values[k:].tolist())
    m = len(found.ritz_values)
    assert torch.equal(found.projected[:m], found.projected[:m].T)
    assert torch.linalg.eigvalsh(found.projected[:m]).tolist() == pytest.approx(found.ritz_values.tolist(), abs=1e-11)
    assert float(torch.linalg.svdvals(found.projected).max()) <= norm * (1 + 1e-12)
    if found.weights is not None:
        assert float(found.weights.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("num_matvecs", [3, 8, 13, 31])
def test_room_is_taken_as_the_basis_grows(num_matvecs, monkeypatch):
    taken: list[int] = []

    class Counting(Krylov):
        def multiply(self, matvec):
            done = super().multiply(matvec)
            taken.append(len(self.basis))
            return done

    monkeypatch.setattr("landscape_ray.probes.spectrum.lanczos.Krylov", Counting)
    spectrum = torch.linspace(1.0, 2.0, 200)

    def run(first_rows):
        monkeypatch.setattr("landscape_ray.probes.spectrum.lanczos.FIRST_ROWS", first_rows)
        products = iter(range(num_matvecs))

        def matvec(v):  # not finite at last: the iteration ends there, as if it had converged
            return spectrum * v if next(products) < num_matvecs - 1 else v * math.nan

        vectors: list[torch.Tensor] = []
        extremal_pairs(lambda v: (vectors.append(v.clone()), matvec(v))[1], 200, tol=1e-12, max_matvecs=80)
        return vectors

    grown = run(8)
    assert max(taken) <= max(8, 2 * num_matvecs)
    taken.clear()
    at_once = run(81)
    assert max(taken) == 81
    assert all(torch.equal(one, other) for one, other in zip(grown, at_once, strict=True))


def test_weights_are_gauss_quadrature():
    A = rotated(torch.linspace(-2.0, 3.0, 80).square())
    v = unit_vector(80, seed=4, dtype=torch.float64)
    found = pairs_of(A, start=v, tol=0.0, max_matvecs=5)
    power = v
    for degree in range(10):  # exact below 2 m
        quadrature = float((found.weights * found.ritz_values**degree).sum())
        assert quadrature == pytest.approx(float(v @ power), rel=1e-10)
        power = A @ power


def test_start_may_be_several_vectors():
    A = rotated([*torch.linspace(0.0, 1.0, 100).tolist(), 5.0, 6.0])
    known = pairs_of(A, k=2, tol=1e-9, max_matvecs=100)
    again = pairs_of(A, k=2, tol=1e-6, start=known.vectors)
    assert again.num_matvecs == 2
    twice = pairs_of(A, k=2, tol=1e-6, start=known.vectors[[0, 0]], max_matvecs=60)  # the second adds nothing
    assert twice.values.tolist() == pytest.approx([6.0, 5.0], rel=1e-6)


def test_not_finite_products_give_nan_for_all():
    found = extremal_pairs(lambda v: v * float("nan"), 5, k=2, num_smallest=1)
    assert bool(found.values.isnan().all())
    assert found.vectors.shape == (3, 5)
    assert (found.converged, found.num_matvecs) == (False, 1)


def test_refused_counts():
    with pytest.raises(UserError, match=r"k and num_smallest must not be negative and sum to 1 \.\.\. 3, got 2 and 2"):
        extremal_pairs(torch.clone, 3, k=2, num_smallest=2)
    with pytest.raises(UserError, match="k and num_smallest must not be negative"):
        extremal_pairs(torch.clone, 3, k=-1, num_smallest=2)
    with pytest.raises(UserError, match="max_matvecs must be at least 5, got 4"):
        extremal_pairs(torch.clone, 9, k=5, max_matvecs=4)
    with pytest.raises(UserError, match="block must be at least 1, got 0"):
        extremal_pairs(torch.clone, 9, block=0)
    with pytest.raises(UserError, match="max_basis must be at least 6, got 5"):
        extremal_pairs(torch.clone, 9, k=3, max_basis=5)


@pytest.mark.parametrize("shift", [0.0, -30.0])  # the second has no positive eigenvalue
def test_the_expected_gain_is_within_the_residual_and_near_the_next_product(shift):
    generator = torch.Generator().manual_seed(5)
    spectrum = torch.cat([torch.randn(400, generator=generator), torch.tensor([6.0, 9.0, 14.0, 25.0])]).double() + shift
    ratios, errors = [], []
    for seed in range(8):
        for products in (3, 4, 5):
            found = lanczos(lambda v: spectrum * v, 404, tol=0, max_matvecs=products, seed=seed, dtype=torch.float64)
            more = lanczos(lambda v: spectrum * v, 404, tol=0, max_matvecs=products + 1, seed=seed, dtype=torch.float64)
            assert 0 <= found.expected_gain <= found.residual
            ratios.append(found.expected_gain / (more.value - found.value))
            errors.append((25.0 + shift - found.value, 25.0 + shift - found.value - found.expected_gain))
    if shift == 0.0:
        assert 0.4 < sorted(ratios)[len(ratios) // 2] < 1.5
        assert sum(abs(after) for _, after in errors) < 0.7 * sum(before for before, _ in errors)


def test_nothing_is_gained_where_nothing_waits():
    spectrum = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    found = lanczos(lambda v: spectrum * v, 3, tol=0, dtype=torch.float64)
    assert found.expected_gain == 0.0
    lost = lanczos(lambda v: v * math.nan, 3)
    assert lost.expected_gain == 0.0


def test_directions_of_large_networks_are_of_bytes_and_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov, "LARGE", 1000)
    size = 100_003
    first, second = itertools.islice(krylov.random_directions(size, 3, torch.float32, "cpu"), 2)
    assert torch.equal(first, unit_vector(size, seed=3))
    assert not torch.equal(first, unit_vector(size, seed=4))
    for vector in (first, second):
        numbers = vector.double() * math.sqrt(size)
        assert len(vector.unique()) == 256
        assert abs(float(numbers.mean())) < 4 / math.sqrt(size)
        assert float((numbers**4).mean()) == pytest.approx(3.0, abs=0.15)
    assert abs(float(first @ second)) < 4 / math.sqrt(size)
