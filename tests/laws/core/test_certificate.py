"""The verdict on a fit: every reason by itself."""

import numpy as np
import pytest

from landscape_ray.laws.core.certificate import certify, judge
from landscape_ray.laws.core.fitting import Optimum

SOUND = {
    "gradient_norm": 0.0,
    "agree_share": 1.0,
    "condition_number": 10.0,
    "bounds_hit": [],
    "points_per_parameter": 10.0,
}
INTERVALS = {"a": (0.9, 1.1), "b": (1.8, 2.2)}


def verdict(change, intervals=INTERVALS, identified=("a", "b")):
    return judge({"a": 1.0, "b": 2.0}, intervals, 1e-3, SOUND | change, identified)


def test_a_sound_fit_is_certified():
    assert verdict({}) == ("certified", ())
    assert verdict({}, intervals={}) == ("certified", ())


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"gradient_norm": 1e-6}, "failed", "the search did not reach an optimum (gradient norm 1.0e-06)"),
        ({"gradient_norm": float("nan")}, "failed", "the search did not reach an optimum (gradient norm nan)"),
        ({"agree_share": 0.25}, "weak", "only 25% of the starts agree on the optimum"),
        ({"condition_number": 1e5}, "weak", "the parameters are nearly collinear (condition number 1.0e+05)"),
        ({"bounds_hit": ["b"]}, "weak", "at a bound: b"),
        ({"points_per_parameter": 2.5}, "weak", "2.5 points per parameter, fewer than 3"),
    ],
)
def test_every_reason(change, status, reason):
    assert verdict(change) == (status, (reason,))


def test_wide_intervals_and_unidentified_parameters():
    assert verdict({}, {"a": (-0.1, 1.1), "b": (1.8, 2.2)}) == ("weak", ("intervals wider than the value: a",))
    assert verdict({"bounds_hit": ["b"]}, identified=("a",)) == ("certified", ())


def test_the_record_counts_the_starts_that_agree():
    found = Optimum(
        parameters=np.array([[0.0, 2.0], [0.0, 2.0], [1.0, 3.0], [1.0, 9.0]]),
        objective=np.array([1.0, 1.0 + 1e-8, 1.1, 2.0]),
        gradient=np.array([[0.0, -1e-9], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
        condition=np.array([7.0, 1.0, 1.0, 1.0]),
        at_bound=np.array([[True, False]] * 4),
    )
    record = certify(found, ("A", "alpha"), num_points=20, num_parameters=4)
    assert record["num_starts"] == 4
    assert record["agree_share"] == 0.5
    assert record["gradient_norm"] == 1e-9
    assert record["condition_number"] == 7.0
    assert record["bounds_hit"] == ["A"]
    assert record["points_per_parameter"] == 5.0
