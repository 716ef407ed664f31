"""Tags and description of the sweep's run in MLflow."""

from __future__ import annotations

import dataclasses
import math
import tomllib

import pytest

from landscape_ray.config import parse
from landscape_ray.sweep.notes import description_of, tags_of
from landscape_ray.sweep.spec import SweepSpec

TRAIN = """
name = "schedules"
description = "Which schedule at which learning rate?"
[train]
num_steps = 300
batch_size = 16
data = { source = "stdlib", context_length = 128 }
model = { depth = 4, width = 64, num_heads = 4 }
eval = { every_steps = 25 }
[space]
"schedule.name" = { choices = ["constant", "linear", "cosine", "wsd"] }
"schedule.peak_lr" = { log_uniform = [0.001, 0.06] }
"""
POPULATION = TRAIN.replace('"schedule.name" = { choices = ["constant", "linear", "cosine", "wsd"] }', "")


@pytest.fixture(scope="module")
def spec():
    return parse(SweepSpec, tomllib.loads(TRAIN + "[search]\nnum_trials = 12\n"), "notes")


@pytest.fixture(scope="module")
def summaries(search_folder):
    return [trial.summary() for trial in search_folder.trials()]


@pytest.fixture(scope="module")
def best(summaries):
    return min((s for s in summaries if s.status == "finished"), key=lambda s: s.final_loss_nats)


def test_tags_name_searcher_strategy_task_and_size(spec, summaries):
    assert tags_of(spec, summaries) == {
        "searcher": "tpe",
        "strategy": "none",
        "task": "text stdlib",
        "size": "gpt 216k",
    }
    assert "size" not in tags_of(spec)
    table = "[population]\nnum_members = 4\ninterval_steps = 100\n"
    members = tags_of(parse(SweepSpec, tomllib.loads(POPULATION + table), "notes"))
    assert members["searcher"] == "none"
    assert members["strategy"] not in ("", "none")
    asha = '[search]\nnum_trials = 4\nstopping = { name = "asha", min_steps = 25 }\n'
    assert tags_of(parse(SweepSpec, tomllib.loads(TRAIN + asha), "notes"))["strategy"] == "asha"
    sizes = [summaries[0], dataclasses.replace(summaries[1], num_params=1_000_000)]
    assert tags_of(spec, sizes)["size"] == "gpt 216k to gpt 1M"


def test_the_result_comes_first_then_what_was_asked_then_the_best(spec, summaries, best):
    said = description_of(spec, "search", summaries, best)
    parts = said.split("\n\n")
    assert parts[0] == spec.description
    assert parts[1].startswith(f"**{best.final_loss_nats:.4f} nats/token**, by **{best.run_id}**")
    assert "12 trials by `tpe` over `schedule.name` (one of constant, linear, cosine, wsd)" in parts[2]
    assert "1 diverged, 11 finished." in parts[2]
    rows = parts[3].splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        f"| {s.run_id}"
        for s in sorted((s for s in summaries if s.status == "finished"), key=lambda s: s.final_loss_nats)[:5]
    ]
    assert len({row.count("|") for row in rows}) == 1
    assert "landscape-ray report search" in parts[4]


def test_without_a_result_it_says_so(spec, summaries):
    cut = [dataclasses.replace(summary, status="pending") for summary in summaries]
    said = description_of(spec, "search", cut, None)
    assert "**No result yet**: 12 pending." in said
    assert "| run |" not in said
    assert "no trial started" in description_of(spec, "search", [], None)


def test_a_value_cannot_end_a_cell(spec, summaries, best):
    odd = [dataclasses.replace(summary, varied={"schedule.name": "a|b\nc"}) for summary in summaries]
    row = next(
        line for line in description_of(spec, "s", odd, best).splitlines() if "a\\|b c" in line and line[0] == "|"
    )
    assert row.replace("\\|", "").count("|") == 5


def test_losses_that_are_not_finite_are_not_ranked(spec, summaries, best):
    broken = [dataclasses.replace(summaries[0], final_loss_nats=math.nan), *summaries[1:]]
    assert "nan" not in description_of(spec, "s", broken, best)
