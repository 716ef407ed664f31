"""The table of a sweep: groups, units, and what is wrong with it."""

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import Sweep

LR = [1e-3, 2e-3, 4e-3]


def test_groups_and_excess():
    sweep = Sweep([1, 2, 1, 2], [2.0, 2.2, 1.5, 1.8], N=[1e6, 1e6, 1e7, 1e7])
    assert list(sweep.groups) == [(1e6, 1.0), (1e7, 1.0)]
    np.testing.assert_allclose(sweep.excess, [0, 0.1, 0, 0.2])
    kept = sweep.take(sweep.excess < 0.15)
    assert kept.run_ids == ("0", "1", "2")
    assert kept.D is None


def test_columns_are_mapped_and_units_converted():
    table = {"eta": LR, "final": [2.0, 2.1, 2.2], "bs": [8, 8, 8], "tokens": [1e6] * 3, "steps": [61, 61, 61]}
    names = {"lr": "eta", "loss": "final", "batch": "bs", "D": "tokens"}
    sweep = Sweep.from_table(table, names, batch=2048)
    assert sweep.batch.tolist() == [16384.0] * 3
    with pytest.raises(UserError, match=r"D is 2049.18 times batch \* steps; multiply the batch"):
        Sweep.from_table(table, names)
    with pytest.raises(UserError, match="table must have the columns lr, loss, got a"):
        Sweep.from_table({"a": LR})
    with pytest.raises(UserError, match="table must have the columns width"):
        Sweep.from_table({"lr": LR, "loss": LR}, {"N": "width"})
    with pytest.raises(UserError, match=r"columns must be named for .*, got 'rate'"):
        Sweep.from_table({"lr": LR, "loss": LR}, {"rate": "lr"})


def test_mixed_units_are_refused():
    with pytest.raises(UserError, match=r"batch must be in one unit in all runs, but D is 2048 times .* in 1 of 3"):
        Sweep(LR, LR, D=[2048e3] * 3, batch=[2048, 2048, 1], steps=[1000] * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": [2.0, -1.0, 2.0]}, "loss must be > 0, got -1; drop runs that diverged"),
        ({"loss": [2.0, np.nan, 2.0]}, "must be finite"),
        ({"lr": [0.0, 1.0, 2.0]}, "lr must be > 0, got 0"),
        ({"lr": [1e3, 1.0, 2.0]}, "lr must be a learning rate <= 100, got 1000"),
        ({"N": [1.0, 2.0]}, "N must have shape"),
        ({"run_ids": ["a", "a", "b"]}, "run_ids must be distinct"),
    ],
)
def test_bad_columns_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Sweep(**({"lr": LR, "loss": [2.0, 2.1, 2.2]} | change))


def test_sizes_counted_in_two_ways_and_edges_are_named():
    sweep = Sweep(LR * 2, [2.0, 2.1, 2.2, 2.0, 1.9, 2.0], N=[1.00e8] * 3 + [1.06e8] * 3, batch=[1, 2, 4] * 2)
    warnings = sweep.warnings()
    assert warnings[0].startswith("near_sizes: N 1e+08 and 1.06e+08 differ by less than 10%")
    assert warnings[1] == "edge: the best lr of N 1e+08, D 1 is the last one tried, 0.001"
    assert warnings[2] == "edge: the best batch of N 1e+08, D 1 is the last one tried, 1"
    assert len(warnings) == 3
