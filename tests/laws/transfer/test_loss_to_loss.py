"""From one loss to another: ordinary least squares, pairs of runs, refusals."""

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import FitResult, LossToLoss, fit_loss_to_loss, match_runs

LOSS = np.linspace(2.4, 4.5, 25)


def measured(noise=0.0, seed=0, kappa=1.1, factor=0.9, e0=1.7, e1=1.2):
    rng = np.random.default_rng(seed)
    return factor * (LOSS - e0) ** kappa * np.exp(noise * rng.standard_normal(len(LOSS))) + e1


def test_with_both_limits_given_it_is_a_regression_of_logarithms():
    other = measured(noise=0.02)
    found = fit_loss_to_loss(LOSS, other, irreducible=(1.7, 1.2), num_bootstrap=100)
    slope, level = np.polyfit(np.log(LOSS - 1.7), np.log(other - 1.2), 1)
    assert found.kappa == pytest.approx(slope, rel=1e-10)
    assert found.factor == pytest.approx(np.exp(level), rel=1e-10)
    prediction = found.predict([3.0, 4.0])
    np.testing.assert_allclose(prediction.value, found.factor * (np.array([3.0, 4.0]) - 1.7) ** found.kappa + 1.2)
    assert (prediction.low < prediction.value).all()
    assert (prediction.measured_low < prediction.low).all()
    assert found.fit.status == "certified"


def test_limits_that_are_not_given_are_fitted():
    for known in ((1.7, None), (None, 1.2), (None, None)):
        found = fit_loss_to_loss(LOSS, measured(), irreducible=known, num_bootstrap=0)
        assert [found.kappa, found.factor, found.E0, found.E1] == pytest.approx([1.1, 0.9, 1.7, 1.2], rel=1e-4)
        assert found.predict(3.0).value[0] == pytest.approx(0.9 * 1.3**1.1 + 1.2, rel=1e-7)
        again = LossToLoss(fit=FitResult.from_json(found.fit.to_json()), E0=found.E0, E1=found.E1)
        assert again.predict(3.0).value[0] == found.predict(3.0).value[0]


def test_a_fit_of_everything_says_that_it_is_weak():
    found = fit_loss_to_loss(LOSS, measured(noise=0.02), num_bootstrap=50)
    assert found.fit.status == "weak"
    assert LOSS.min() > found.E0


def test_impossible_losses_are_refused():
    with pytest.raises(UserError, match=r"loss_0 must be > its irreducible 3, got 2.4"):
        fit_loss_to_loss(LOSS, measured(), irreducible=(3.0, 1.0))
    with pytest.raises(UserError, match="loss_1 must be > its irreducible 9"):
        fit_loss_to_loss(LOSS, measured(), irreducible=(1.0, 9.0))
    found = fit_loss_to_loss(LOSS, measured(), irreducible=(1.7, 1.2), num_bootstrap=0)
    with pytest.raises(UserError, match=r"loss_0 must be > E0 1.7, got 1.5; no training gets there"):
        found.predict(1.5)


def test_runs_are_matched_by_all_their_keys():
    rows, others = match_runs({"N": [1, 1, 2], "D": [5, 6, 5]}, {"D": [5, 5, 7], "N": [2, 1, 1]})
    assert list(zip(rows, others, strict=True)) == [(0, 1), (2, 0)]
    with pytest.raises(UserError, match="keys must be the same in both tables"):
        match_runs({"N": [1]}, {"D": [1]})
    with pytest.raises(UserError, match=r"N must identify a run, got two with \(1,\)"):
        match_runs({"N": [1, 1]}, {"N": [1]})
    with pytest.raises(UserError, match="N must agree in some runs of both tables, got none"):
        match_runs({"N": [1e6]}, {"N": [1.0]})
