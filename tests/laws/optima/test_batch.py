"""Critical batch, stable rates, sensitivity."""

import numpy as np
import pytest

from landscape_ray.errors import UserError
from landscape_ray.laws import fit_critical_batch, fit_largest_stable_lr, lr_sensitivity, stable_edge, steps_to_loss

BATCH = 2.0 ** np.arange(10, 20)


def test_the_trade_off_holds_at_the_fit():
    """(S/S_min - 1) (E/E_min - 1) = 1 at every batch, and B_crit costs twice the least of both."""
    steps = 700 * (1 + 5e4 / BATCH)
    found = fit_critical_batch(BATCH, steps, num_bootstrap=50)
    fewest, cheapest = found.fit.parameters["S_min"], found.fit.parameters["E_min"]
    np.testing.assert_allclose((steps / fewest - 1) * (steps * BATCH / cheapest - 1), 1, rtol=1e-6)
    assert found.value == pytest.approx(5e4, rel=1e-8)
    assert found.interval[0] <= 5e4 * (1 + 1e-6)
    assert found.interval[1] >= 5e4 * (1 - 1e-6)
    assert found.warnings == ()


def test_one_sided_batches():
    small = BATCH[:6]
    assert "one_sided" in fit_critical_batch(small, 700 * (1 + 5e4 / small), num_bootstrap=0).warnings[-1]
    with pytest.raises(UserError, match=r"steps must show both limits, got S_min 0: .* add larger ones"):
        fit_critical_batch(BATCH, 1e8 / BATCH, num_bootstrap=0)
    with pytest.raises(UserError, match=r"steps must show both limits, got E_min 0: .* add smaller ones"):
        fit_critical_batch(BATCH, np.full(10, 500.0) + np.arange(10), num_bootstrap=0)
    with pytest.raises(UserError, match="batch must have at least 3 different values, got 1"):
        fit_critical_batch([8.0] * 4, [1.0, 2, 3, 4])


def test_steps_to_a_loss():
    assert steps_to_loss([0, 10], [3.0, 2.0], 3.5) == 0
    assert steps_to_loss([0, 10, 20], [3.0, 2.0, 2.5], 2.2) == pytest.approx(8)
    assert np.isnan(steps_to_loss([0, 10], [3.0, 2.0], 1.0))
    with pytest.raises(UserError, match="step must rise"):
        steps_to_loss([10, 0], [3.0, 2.0], 2.5)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_the_largest_stable_rate(exponent):
    lr, batch = (a.ravel() for a in np.meshgrid(np.geomspace(1e-5, 1e3, 41), BATCH))
    loss = np.where(lr < 1e-4 * batch**exponent, 2.0, np.nan)
    edge = stable_edge(lr, batch, loss, limit=5.0)
    ratio = np.geomspace(1e-5, 1e3, 41)[1] / 1e-5
    np.testing.assert_allclose(edge.unstable / edge.stable, ratio)
    found = fit_largest_stable_lr(edge)
    low, high = found.intervals["a"]
    assert low < exponent < high
    assert found.parameters["a"] == pytest.approx(exponent, abs=0.05)


def test_batches_without_an_edge():
    lr, batch = (a.ravel() for a in np.meshgrid([0.1, 0.2, 0.4, 0.8, 1.6, 3.2], [1.0, 2, 4, 8]))
    edge = stable_edge(lr, batch, np.where(lr < 0.5 * batch, 2.0, 9.0), limit=5.0)
    assert edge.unstable.tolist() == [0.8, 1.6, 3.2, np.inf]
    assert "unbounded: nothing was unstable at batch 8" in fit_largest_stable_lr(edge, num_bootstrap=0).warnings
    with pytest.raises(UserError, match="edge must be bounded at three batches at least, got 1"):
        fit_largest_stable_lr(stable_edge(lr, batch, np.where(lr < 2 * batch, 2.0, 9.0), limit=5.0))
    with pytest.raises(UserError, match="lr must be stable somewhere at batch 1"):
        stable_edge(lr, batch, np.full(24, 9.0), limit=5.0)
    with pytest.raises(UserError, match="must have one shape"):
        stable_edge(lr, batch[:3], lr, limit=5.0)
    with pytest.raises(UserError, match="lr and batch must be > 0"):
        stable_edge(-lr, batch, lr, limit=5.0)


def test_sensitivity_caps_what_diverged():
    found = lr_sensitivity([1e-3, 1e-2, 1e-1, 1.0], [2.5, 2.0, np.inf, 80.0], 5.0)
    assert found.value == pytest.approx((0.5 + 0 + 3 + 3) / 4)
    assert (found.best_lr, found.best_loss, found.share_diverged) == (1e-2, 2.0, 0.5)
    assert found.warnings == ()


def test_sensitivity_is_zero_without_dependence_and_names_uneven_grids():
    assert lr_sensitivity([1, 2, 4], [2.0, 2.0, 2.0], 5.0).value == 0
    warnings = lr_sensitivity([1, 2, 400], [2.0, 2.1, 2.2], 5.0).warnings
    assert [warning.split(":")[0] for warning in warnings] == ["edge", "uneven"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [2.0], 5.0), "lr must have two different values at least, got 1"),
        (([1.0, 2.0], [2.0], 5.0), "lr and loss must have one shape"),
        (([-1.0, 2.0], [2.0, 2.0], 5.0), "lr must be finite and > 0"),
        (([1.0, 2.0], [2.0, 2.0], np.inf), "loss_init must be finite and > 0"),
        (([1.0, 2.0], [6.0, np.nan], 5.0), "loss must be below loss_init 5 at some learning rate"),
    ],
)
def test_bad_sensitivities(arguments, message):
    with pytest.raises(UserError, match=message):
        lr_sensitivity(*arguments)
