import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from landscape_ray.domains import Domain
from landscape_ray.populations import explore, initial_members

SPACE = {
    "lr": Domain(log_uniform=[1e-4, 1e-1]),
    "wd": Domain(uniform=[0.0, 1.0]),
    "depth": Domain(integers=[1, 8]),
    "shape": Domain(choices=["a", "b", "c"]),
}


@given(st.integers(0, 2**32), st.floats(0, 1), st.lists(st.floats(0.01, 100), min_size=1, max_size=4))
def test_values_stay_in_their_domains(seed: int, resample: float, factors: list[float]) -> None:
    generator = np.random.default_rng(seed)
    values = initial_members(SPACE, 1, generator)[0]
    for _ in range(20):
        values = explore(values, SPACE, generator, factors=factors, resample_probability=resample)
        assert all(SPACE[name].contains(value) for name, value in values.items())


def test_without_resampling_a_value_moves_by_one_factor_or_one_neighbour() -> None:
    generator = np.random.default_rng(0)
    start = {"lr": 1e-2, "wd": 0.5, "depth": 4, "shape": "b", "other": 7.0}
    seen = [explore(start, SPACE, generator, factors=(0.8, 1.25), resample_probability=0.0) for _ in range(50)]
    assert {round(v["lr"], 12) for v in seen} == {8e-3, 1.25e-2}
    assert {v["depth"] for v in seen} == {3, 5}
    assert {v["shape"] for v in seen} == {"a", "c"}
    assert {v["other"] for v in seen} == {7.0}
    assert start["lr"] == 1e-2


@pytest.mark.parametrize("value", [-3, -1, 0, 1, 2, 3, 7])
@pytest.mark.parametrize(("factor", "sign"), [(0.8, -1), (0.99, -1), (1.0, 0), (1.01, 1), (1.25, 1)])
def test_an_integer_moves_by_at_least_one_in_the_direction_of_the_factor(value: int, factor: float, sign: int) -> None:
    space = {"n": Domain(integers=[-50, 50])}
    moved = explore({"n": value}, space, np.random.default_rng(0), factors=(factor,), resample_probability=0.0)["n"]
    assert isinstance(moved, int)
    away = (moved - value) * (-1 if value < 0 else 1)  # from zero
    assert away * sign >= 1 if sign else away == 0
    assert abs(away) == round(abs(away)) <= max(1, round(abs(value * factor - value)))


@pytest.mark.parametrize(("value", "factor"), [(1, 0.8), (3, 1.25)])
def test_an_integer_stays_at_the_edge_of_its_domain(value: int, factor: float) -> None:
    space = {"n": Domain(integers=[1, 3])}
    moved = explore({"n": value}, space, np.random.default_rng(0), factors=(factor,), resample_probability=0.0)
    assert moved == {"n": value}


def test_resampling_covers_the_domain_evenly_in_its_own_scale() -> None:
    generator = np.random.default_rng(1)
    draws = [
        explore({"lr": 1e-2}, SPACE, generator, factors=(1.0,), resample_probability=1.0)["lr"] for _ in range(600)
    ]
    decades = np.histogram(np.log10(draws), bins=[-4, -3, -2, -1])[0]
    assert decades.min() > 150


def test_one_seed_one_history() -> None:
    def history(seed: int) -> list[dict[str, object]]:
        generator = np.random.default_rng(seed)
        members = initial_members(SPACE, 3, generator)
        return [explore(m, SPACE, generator, factors=(0.8, 1.2), resample_probability=0.3) for m in members]

    assert history(5) == history(5)
    assert history(5) != history(6)


@given(st.integers(2, 12), st.integers(0, 1000))
def test_initial_members_are_a_latin_hypercube(num_members: int, seed: int) -> None:
    members = initial_members({"wd": SPACE["wd"]}, num_members, np.random.default_rng(seed))
    strata = sorted(int(float(m["wd"]) * num_members) for m in members)
    assert strata == list(range(num_members))
