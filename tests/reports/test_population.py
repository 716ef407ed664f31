"""The family tree of a population, what its survivors saw, and the WSD baseline beside them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from landscape_ray.reports import population as page
from landscape_ray.reports.views import open_sweep
from landscape_ray.schedules import Schedule


def named(figure, name, panel=0):
    return [one for one in figure.panels[panel].series if one.name == name]


@pytest.fixture(scope="module")
def beside(population, fabricate, tmp_path_factory):
    """A search in the setting of the population's winner: one WSD run at its peak."""
    steps = population.best.summary.num_steps
    folder = fabricate.make_search(
        tmp_path_factory.mktemp("wsd") / "baseline",
        steps=steps,
        points=[("wsd", 0.004, 0.2), ("wsd", 0.0009, 0.2), ("constant", 0.004, 0.2)],
        sharp=False,
    )
    return open_sweep(folder)


def test_arrows_go_from_donor_to_member(population):
    figure = page.lineage([population], population)
    rows = [name.split()[0] for name in figure.panels[0].y.categories]
    assert rows == [run.run_id for run in population.finished]
    arrows = [one for one in figure.panels[0].series if one.role == "arrow"]
    found = {(rows[int(one.y[0])], rows[int(one.y[1])], one.x[1]) for one in arrows}
    assert found == {("t000", "t001", 100), ("t001", "t003", 200)}
    assert all(one.x[1] - one.x[0] == pytest.approx(page.LEAN * 300) for one in arrows)


def test_winner_is_followed_through_the_members_that_trained_its_weights(population):
    figure = page.lineage([population], population)
    rows = [name.split()[0] for name in figure.panels[0].y.categories]
    path = [(rows[int(one.y[0])], *one.x) for one in named(figure, "weights of the winner")]
    assert path == [("t000", 0, 100), ("t001", 100, 200), ("t003", 200, 300)]
    (seen,) = named(figure, "weights of the winner", panel=1)
    assert (seen.y[0], seen.y[-1]) == (0.004, 0.00155)
    assert "t000 → t001 → t003" in figure.takeaway
    assert "from 0.004 to 0.00155" in figure.takeaway


def test_every_survivor_shows_what_its_weights_saw(population):
    alive = {one.run.run_id: one for one in page.survivors(population)}
    assert {name: one.num_copies for name, one in alive.items()} == {"t000": 0, "t001": 1, "t002": 0, "t003": 2}
    for one in alive.values():
        np.testing.assert_array_equal(one.steps, np.arange(1, 301))
        assert one.eval_steps[0] == 0
        assert one.losses[-1] == one.run.loss
    # the first hundred updates of t003's own went with the weights that it gave up
    np.testing.assert_array_equal(alive["t003"].lr, np.repeat([0.004, 0.0031, 0.00155], 100))
    figure = page.lineage([population], population)
    assert len(named(figure, "alive at the end", panel=1)) == len(alive) - 1


def test_schedules_are_drawn_by_their_bends():
    """A warm-up is one line, not a staircase, and a copy changes the rate from one update to the next."""
    steps = np.arange(1, 1001.0)
    lr = np.minimum(steps / 100, 1.0) * np.where(steps <= 500, 0.004, 0.002)
    x, y = page._bent(steps, lr)
    assert x.tolist() == [1, 100, 500, 501, 1000]
    np.testing.assert_allclose(np.interp(steps, x, y), lr, rtol=1e-12)
    x, _ = page._bent(steps, np.cos(steps / 700))  # bent everywhere
    assert len(x) <= 500


def test_what_was_given_up_is_a_line_below_the_living(population):
    figure = page.lineage([population], population)
    dead = named(figure, "given up")
    assert len(dead) == 6  # four members, two of which began a second life
    order = [one.name for one in figure.panels[0].series]
    assert order[: len(dead)] == ["given up"] * len(dead)


def test_baseline_is_the_best_wsd_run_of_the_same_setting(population, beside):
    best = min((run for run in beside.finished if run.shape == "wsd"), key=lambda run: run.loss)
    sweeps = [beside, population]
    found = page.baseline(sweeps, population)
    assert found.run is best
    figure = page.lineage(sweeps, population)
    (rates,), (losses,) = (named(figure, found.name, panel) for panel in (1, 2))
    assert rates.y.max() == best.peak_lr
    np.testing.assert_array_equal(losses.y, best.evals["loss_nats"])
    word = "above" if population.best.loss > best.loss else "below"
    assert f"{word} the best run with a WSD schedule" in figure.takeaway
    assert f"{population.best.loss - best.loss:+.4f}".replace("-", "−") in page.survivors_table(sweeps, population)


def test_without_such_a_run_the_baseline_is_said_to_be_untrained(population, search):
    other = dataclasses.replace(search, runs=tuple(run for run in search.runs if run.shape != "wsd"))
    found = page.baseline([other, population], population)
    assert found.run is None
    steps = population.best.summary.num_steps
    plan = Schedule(name="wsd", peak=0.004, num_steps=steps, warmup_steps=0, cooldown_fraction=0.2)
    np.testing.assert_array_equal(found.lr, plan.values())
    figure = page.lineage([other, population], population)
    assert "was not trained" in figure.note
    assert "against WSD" not in page.survivors_table([other, population], population)


def test_winners_schedule_can_be_trained_from_scratch(population):
    import tomllib

    winner = page.survivors(population)[0]
    table = tomllib.loads(page.schedule_toml(winner))["train"]["schedule"]
    points = tuple(map(tuple, table["points"]))
    again = Schedule(name="table", peak=table["peak_lr"], num_steps=300, points=points).values()
    np.testing.assert_allclose(again, winner.lr, rtol=1e-4)


def test_population_without_updates_says_so(population):
    nothing = dataclasses.replace(population, runs=())
    assert "[population]" in page.lineage([nothing], nothing)
    assert page.survivors_table([nothing], nothing) == ""
    assert page.baseline([nothing], nothing) is None


def test_members_that_failed_are_spoken_of(population, monkeypatch):
    first, second = population.copies
    failed = dataclasses.replace(second, reason="failed: RuntimeError: x")
    copies = [dataclasses.replace(first, reason="quantile"), failed]
    monkeypatch.setattr(type(population), "copies", property(lambda sweep: copies))
    note = page.lineage([population], population).note
    assert note.endswith(" t003 failed and was replaced by a copy of t001 at step 200 (RuntimeError: x).")
    assert "t001 failed" not in note
    copies = [dataclasses.replace(failed, step=step) for step in range(page.MAX_REPLACED + 2)]
    said = page._replaced(population)
    assert (said[0], len(said)) == ("2 more failed and were replaced before", page.MAX_REPLACED + 1)
