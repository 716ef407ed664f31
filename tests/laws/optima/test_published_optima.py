"""The Step Law on its authors' runs: their regret, ours, ours on groups left out, and the intervals side by side."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from landscape_ray.laws import fit_step_law, leave_one_group_out, regret

pytestmark = [pytest.mark.data, pytest.mark.acceptance]
SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "bench_published_laws.py"))


@pytest.fixture(scope="module")
def sweep(published):
    return SCRIPT["step_law_runs"](published)


@pytest.fixture(scope="module")
def law(sweep):
    return fit_step_law(sweep, num_bootstrap=0)


def test_the_published_constants_have_their_regret(sweep):
    found = regret(sweep, SCRIPT["published_rule"])
    assert len(found.groups) == 17
    assert len(sweep) == 1911
    assert found.mean == pytest.approx(0.00096, abs=5e-6)


def test_ours_has_less_regret(sweep, law):
    assert law.fit.status == "certified"
    assert law.regret(sweep).mean <= 0.001
    assert law.regret(sweep).mean < regret(sweep, SCRIPT["published_rule"]).mean


@pytest.mark.slow
@pytest.mark.parametrize("by", ["group", "size"])
def test_ours_has_less_regret_on_runs_it_has_not_seen(sweep, by):
    held_out = leave_one_group_out(sweep, lambda runs: fit_step_law(runs, num_bootstrap=0).rule, by=by)
    assert held_out.mean <= 0.001


@pytest.mark.slow
def test_the_exponents_beside_the_published_bootstrap(sweep, published):
    """Intervals of lr over N and of batch over D meet those of the 1,000 released rows.

    That of lr over D lies lower (.17 to .27 against .27 to .35), and the best batch falls with N, which the published
    form leaves out: both are findings about the released runs, from which the authors' own procedure does not return
    their constants either.
    """
    rows = SCRIPT["read"](next((published / "step_law").glob("1004*.csv")))
    ours = fit_step_law(sweep, num_bootstrap=100, confidence=0.95)
    pairs = {
        "lr_coefN": [-end for end in ours.lr.intervals["by_size"]],
        "bs_coefD": ours.batch.intervals["by_horizon"],
    }
    for name, ends in pairs.items():
        low, high = np.quantile(np.array(rows[name], dtype=float), [0.025, 0.975])
        assert min(ends) < high, name
        assert max(ends) > low, name
    assert ours.lr.by_horizon < np.quantile(np.array(rows["lr_coefD"], dtype=float), 0.025)
    assert ours.batch.intervals["by_size"][0] > 0
