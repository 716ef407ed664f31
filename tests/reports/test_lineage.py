from __future__ import annotations

import numpy as np

from landscape_ray.reports.lineage import Exploit, ancestry, ancestry_lr, exploits


def copy(run_id, donor, step, time):
    return Exploit(run_id=run_id, donor=donor, step=step, time=time, values={})


def path(copies, winner, end):
    return [(one.run_id, one.life, one.start, one.stop) for one in ancestry(copies, winner, end)]


def test_without_copies_the_winner_is_its_own_ancestor():
    assert path([], "a", 50) == [("a", 0, 0, 50)]


def test_what_the_donor_copied_later_is_not_inherited():
    copies = [copy("b", "a", 100, 1.0), copy("a", "c", 200, 2.0)]
    assert path(copies, "b", 300) == [("a", 0, 0, 100), ("b", 1, 100, 300)]


def test_what_the_donor_copied_before_is_inherited():
    copies = [copy("a", "c", 50, 1.0), copy("b", "a", 100, 2.0)]
    assert path(copies, "b", 300) == [("c", 0, 0, 50), ("a", 1, 50, 100), ("b", 1, 100, 300)]


def test_two_members_that_copy_each_other():
    copies = [copy("b", "a", 100, 1.0), copy("a", "b", 200, 2.0), copy("b", "a", 300, 3.0)]
    assert path(copies, "b", 400) == [("a", 0, 0, 100), ("b", 1, 100, 200), ("a", 1, 200, 300), ("b", 2, 300, 400)]


def test_a_member_that_goes_back_in_steps_starts_a_new_life():
    # b was at step 150 when it took over a's weights of step 100
    copies = [copy("b", "a", 100, 1.0)]
    assert path(copies, "b", 400) == [("a", 0, 0, 100), ("b", 1, 100, 400)]


def test_segments_cover_every_update_once(population):
    segments = population.ancestry
    covered = [step for one in segments for step in range(one.start + 1, one.stop + 1)]
    assert covered == list(range(1, 301))


def test_fabricated_population(population):
    assert [(one.run_id, one.donor, one.step) for one in exploits(population.runs)] == [
        ("t001", "t000", 100),
        ("t003", "t001", 200),
    ]
    assert population.copies[0].values == {"schedule.peak_lr": 0.0031}
    assert [one.run_id for one in population.ancestry] == ["t000", "t001", "t003"]


def test_rates_along_the_ancestry(population):
    steps, rates = ancestry_lr({run.run_id: run for run in population.runs}, population.ancestry)
    np.testing.assert_array_equal(steps, np.arange(1, 301))
    np.testing.assert_array_equal(rates, np.repeat([0.004, 0.0031, 0.00155], 100))


def test_peak_of_a_copying_member_is_that_of_its_weights(population):
    peaks = {run.run_id: run.peak_lr for run in population.runs}
    assert peaks == {"t000": 0.004, "t001": 0.004, "t002": 0.0022, "t003": 0.004}


def test_values_and_reason_of_a_copy_are_told_apart(population):
    import dataclasses
    import json

    run = next(run for run in population.runs if run.run_id == "t001")
    for detail in ({"values": {"lr": 0.1}, "reason": "quantile"}, {"lr": 0.1, "reason": "quantile"}):
        events = {**run.events, "detail": np.array([json.dumps(detail)], dtype=object)}
        (copy,) = exploits([dataclasses.replace(run, events=events)])
        assert (copy.values, copy.reason) == ({"lr": 0.1}, "quantile")
