"""Tables of points, and what is said of unsound ones."""

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import Objective, Points
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA

N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
LOSS = 1.7 + 400 * N**-0.34 + 400 * D**-0.28


def test_runs_are_numbered_by_first_appearance():
    points = Points({"N": [1, 2, 3, 4]}, [1, 2, 3, 4], ["b", "a", "b", "c"])
    assert points.run_ids == ("b", "a", "c")
    assert points.run.tolist() == [0, 1, 0, 2]
    part = points.take([True, False, True, True])
    assert part.run_of == ("b", "b", "c")
    assert part.variables["N"].tolist() == [1, 3, 4]


def test_a_summary_tells_what_was_fitted_and_its_hash_what_changed():
    points = Points({"N": N, "D": D}, LOSS)
    summary = points.summary()
    assert summary["num_points"] == 16
    assert summary["ranges"]["N"] == pytest.approx([1e7, 1e9])
    assert Points({"N": N, "D": D}, LOSS).summary() == summary
    for other in (Points({"N": N, "D": D}, LOSS * 1.0001), Points({"N": N, "D": D}, LOSS, weights=np.ones(16))):
        assert other.summary()["sha256"] != summary["sha256"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"N": [1, 2]}, [1, 2, 3]), r"N must have shape \(3,\) and a point at least, got \(2,\)"),
        (({"N": []}, []), r"response must have shape \(num_points,\) and a point at least, got \(0,\)"),
        (({"N": [1, 2]}, [1, np.nan]), "response must be finite, got nan"),
        (({"N": ["a", "b"]}, [1, 2]), "N must hold numbers"),
        (({"N": [1, 2]}, [1, 2], ["a"]), "run_of must name a run for each of 2 points, got 1"),
        (({"N": [1, 2]}, [1, 2], None, [-1, 1]), "weights must be >= 0 and somewhere > 0, got -1"),
    ],
)
def test_unsound_tables(arguments, message):
    with pytest.raises(UserError, match=message):
        Points(*arguments)


@pytest.mark.parametrize(
    ("variables", "loss", "message"),
    [
        ({"N": N}, LOSS, "points must have the variables of law 'chinchilla', missing: D; there: N"),
        ({"N": N, "D": D}, -LOSS, "loss must be > 0, got -"),
        ({"N": -N, "D": D}, LOSS, "N must be > 0, got -"),
        ({"N": np.full(16, 1e8), "D": D}, LOSS, "N must have at least 3 different values, got 1"),
    ],
)
def test_what_the_law_cannot_be_fitted_to(variables, loss, message):
    with pytest.raises(UserError, match=message):
        Points(variables, loss).check(CHINCHILLA)


def test_what_is_warned_of():
    twice = Points({"N": np.append(N, N[0]), "D": np.append(D, D[0])}, np.append(LOSS, LOSS[0]))
    (warning,) = twice.check(CHINCHILLA)
    assert warning.startswith("duplicates: 1 points repeat")
    assert Points({"N": N, "D": D}, LOSS).check(CHINCHILLA) == ()


def test_objectives():
    assert Objective.of("huber", np.inf) == Objective("least_squares")
    assert Objective("huber", 0.01).threshold == 0.01
    assert Objective("least_squares").threshold == np.inf
    assert Objective("least_absolute").value(4.7e-9) == pytest.approx(1.0)
    with pytest.raises(UserError, match="objective must be one of huber, least_absolute, least_squares, got 'l1'"):
        Objective("l1")
    with pytest.raises(UserError, match="huber_delta must be > 0, got 0"):
        Objective("huber", 0)
