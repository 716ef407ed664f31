"""Kendall's tau and its intervals: against scipy and a slow twin, coverage of a known truth, Simpson's paradox."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from landscape_ray.errors import UserError
from landscape_ray.laws.ranking import Association, conditional, holm, kendall


def number(found: Association | str) -> Association:
    assert isinstance(found, Association), found
    return found


@given(st.integers(5, 30), st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_tau_b_with_ties_is_that_of_scipy(n: int, levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(levels, size=n), rng.standard_normal(n).round(1)
    found = kendall(x, y)
    if np.ptp(x) == 0:
        assert found == "all values are equal"
    else:
        assert number(found).tau == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)


def test_the_p_value_is_near_the_exact_one_of_few_runs() -> None:
    rng = np.random.default_rng(1)
    close = []
    for n in (8, 12, 20):
        for _ in range(20):
            x, y = rng.standard_normal((2, n))
            close.append(number(kendall(x, y)).p_value / stats.kendalltau(x, y, method="exact").pvalue)
    assert 0.8 < np.median(close) < 1.25


@given(st.permutations(range(9)))
def test_order_and_orientation(order: list[int]) -> None:
    x = np.random.default_rng(0).standard_normal(9)
    y = np.array(order, dtype=float)
    found, mirrored, bent = (number(kendall(*pair)) for pair in ((x, y), (x, -y), (np.exp(3 * x), y**3)))
    assert (mirrored.tau, mirrored.low, mirrored.high) == pytest.approx((-found.tau, -found.high, -found.low))
    assert bent == found
    assert -1 <= found.low <= found.tau <= found.high <= 1


@pytest.mark.acceptance
@pytest.mark.parametrize("n", [10, 30, 100])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_intervals_hold_the_known_tau_of_normal_variables_at_their_level(n: int, rho: float) -> None:
    rng, repeats = np.random.default_rng([n, round(10 * rho)]), 250
    truth = 2 / math.pi * math.asin(rho)
    hits = 0
    for _ in range(repeats):
        x, noise = rng.standard_normal((2, n))
        found = number(kendall(x, rho * x + math.sqrt(1 - rho**2) * noise))
        hits += found.low <= truth <= found.high
    # never fewer than 95 % within chance; few runs are allowed to be careful
    assert hits >= stats.binom.ppf(0.001, repeats, 0.95)
    if n == 100:
        assert hits <= stats.binom.ppf(0.999, repeats, 0.975)


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_seeds_of_one_configuration_are_no_further_evidence(share: float) -> None:
    rng, repeats, m, k = np.random.default_rng(5), 300, 12, 4
    wrong = {"clustered": 0, "as if different": 0}
    for _ in range(repeats):
        common, own = np.repeat(rng.standard_normal((2, m)), k, axis=1), rng.standard_normal((2, m * k))
        x, y = math.sqrt(share) * common + math.sqrt(1 - share) * own
        wrong["clustered"] += number(kendall(x, y, configurations=np.repeat(np.arange(m), k))).p_value < 0.05
        wrong["as if different"] += number(kendall(x, y)).p_value < 0.05
    assert wrong["clustered"] <= stats.binom.ppf(0.999, repeats, 0.05)
    if share > 0.9:
        assert wrong["as if different"] > 0.2 * repeats


def test_one_configuration_with_many_seeds_is_not_many_runs() -> None:
    x = np.arange(20.0)
    assert kendall(x, x, configurations=np.arange(20) % 4) == "too few runs: 4, needs 5"
    found = number(kendall(x, x, configurations=np.arange(20) % 5))
    assert (found.num_runs, found.num_configurations, found.num_pairs) == (20, 5, 190)


def grid(num_lr: int, num_wd: int) -> tuple[np.ndarray, np.ndarray, dict[str, list[float]]]:
    lr, wd = np.repeat(np.arange(num_lr), num_wd), np.tile(np.arange(num_wd), num_lr)
    return lr.astype(float), wd.astype(float), {"lr": (10.0**-lr).tolist(), "wd": wd.tolist()}


@pytest.mark.acceptance
def test_on_a_grid_the_conditional_tau_is_the_granulated_one() -> None:
    rng = np.random.default_rng(2)
    lr, wd, settings = grid(4, 5)
    x, y = lr + wd + rng.standard_normal(20), lr - wd + rng.standard_normal(20)
    for name, others in (("lr", wd), ("wd", lr)):
        of_groups = [stats.kendalltau(x[others == v], y[others == v]).statistic for v in np.unique(others)]
        other = "wd" if name == "lr" else "lr"
        found = number(conditional(x, y, settings, equal=[other], differing=name))
        assert found.tau == pytest.approx(np.mean(of_groups))
        assert found.adjusted_for == ()
        # the slow twin: every pair, by hand
        pairs = [(i, j) for i, j in itertools.combinations(range(20), 2) if others[i] == others[j]]
        signs = [np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in pairs]
        assert (found.num_pairs, found.tau) == (len(pairs), pytest.approx(np.mean(signs)))


@pytest.mark.acceptance
@pytest.mark.parametrize("design", ["grid", "random search"])
def test_what_only_the_learning_rate_causes_is_gone_at_equal_learning_rate(design: str) -> None:
    rng, repeats = np.random.default_rng(3), 200
    held = significant = 0
    marginal, at_equal = [], []
    for _ in range(repeats):
        if design == "grid":
            lr, _, settings = grid(5, 5)
            lr = lr / 5
        else:
            lr = rng.uniform(size=25)
            settings = {"lr": (10**lr).tolist(), "wd": rng.uniform(size=25).tolist()}
        x, y = np.exp(4 * lr + 0.4 * rng.standard_normal(25)), lr**2 + 0.1 * rng.standard_normal(25)
        whole = number(kendall(x, y))
        part = number(conditional(x, y, settings, equal=["lr"], differing="wd"))
        assert part.adjusted_for == (() if design == "grid" else ("lr",))
        marginal.append(whole.tau)
        at_equal.append(part.tau)
        held += part.low <= 0 <= part.high
        significant += whole.p_value < 0.05
        assert number(conditional(x, y, settings, equal=["wd"], differing="lr")).tau > 0.4
    assert significant >= 0.99 * repeats
    assert np.mean(marginal) > 0.6
    assert abs(np.mean(at_equal)) < 0.1
    assert held >= stats.binom.ppf(0.001, repeats, 0.95)


def test_simpson_may_turn_the_sign() -> None:
    lr, wd, settings = grid(4, 6)
    x, y = 10 * lr - wd, 10 * lr + wd
    assert number(kendall(x, y)).tau > 0.5
    assert number(conditional(x, y, settings, equal=["lr"], differing="wd")).tau == -1


def test_other_kinds_of_settings_have_to_be_equal() -> None:
    rng = np.random.default_rng(4)
    lr = rng.uniform(size=24)
    optimizer = ["adamw", "sgd"] * 12
    shift = np.tile([0.0, 100.0], 12)  # a confounder that no rank regression on lr would see
    x, y = lr + shift, -lr + shift
    settings = {"lr": lr.tolist(), "optimizer": optimizer, "wd": rng.uniform(size=24).tolist()}
    found = number(conditional(x, y, settings, equal=["optimizer", "wd"], differing="lr"))
    assert found.adjusted_for == ("wd",)
    assert found.num_pairs == 2 * 66
    assert found.tau < -0.8


def test_too_few_pairs_are_said_and_not_counted() -> None:
    x = np.arange(8.0)
    names = {"optimizer": list("aabbccdd"), "lr": x.tolist()}
    assert conditional(x, x, names, equal=["optimizer"], differing="lr") == "too few pairs: 4, needs 10"
    settings = {"a": x.tolist(), "b": (x**2 % 7).tolist(), "c": (x**3 % 5).tolist(), "d": (x**2 % 5).tolist()}
    found = conditional(x, -x, settings, equal=["b", "c", "d"], differing="a")
    assert found == "too few runs: 4 after 4 fitted coefficients, needs 5"
    assert conditional(x, x, {"lr": x.tolist()}, equal=["lr"]) == "all values are equal"
    assert kendall(x, np.ones(8)) == "all values are equal"


def test_holm() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(size=12) ** 3
    adjusted, order = holm(p), np.argsort(p)
    worst = 0.0
    for rank, k in enumerate(order):
        worst = max(worst, (12 - rank) * p[k])
        assert adjusted[k] == pytest.approx(min(worst, 1.0))
    assert holm([]).tolist() == []


def test_wrong_input_is_named() -> None:
    x = np.arange(6.0)
    with pytest.raises(UserError, match=r"two rows of equal length, got shapes \(6,\) and \(5,\)"):
        kendall(x, x[:5])
    with pytest.raises(UserError, match="must be finite, got nan or inf"):
        kendall(x, x * np.nan)
    with pytest.raises(UserError, match=r"confidence must be in \(0, 1\), got 1"):
        kendall(x, x, confidence=1.0)
    with pytest.raises(UserError, match="settings must hold 6 values of 'lr', got 0"):
        conditional(x, x, {}, equal=["lr"])
