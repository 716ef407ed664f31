"""A population is saved between two stretches and goes on to the bit, whoever decides and however it trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.populations import Strategy
from landscape_ray.training import TrainConfig
from landscape_ray.training import population as population_module
from landscape_ray.training.population import MANIFEST, SNAPSHOTS, CohortPopulation
from tests.training.test_population import TRAIN, population, strategy

AVERAGED = {"averaging": {"name": "ema", "decay": 0.8}}


def rule(name: str, synchronous: bool) -> Strategy:
    options: dict[str, Any] = {
        "truncation": {"quantile_fraction": 0.5},
        "forecast": {"schedule": parse(TrainConfig, TRAIN, "test").schedule.build(40)},
        "ipbt": {"patience": 1, "tolerance": 0.9},
    }[name]
    return strategy(name, synchronous=synchronous, interval_steps=5, **options)


def plain(content: Any) -> Any:
    """Return nested content with its tensors as lists, which compare exactly."""
    if isinstance(content, torch.Tensor):
        return content.tolist()
    if isinstance(content, dict):
        # learning rate and momentum of the groups are written before each update, and so not worth saving
        return {str(key): plain(value) for key, value in content.items() if key != "param_groups"}
    return [plain(value) for value in content] if isinstance(content, list | tuple) else content


def outcome(run: CohortPopulation) -> str:
    """Return all that came of a population, the weights and optimizers of its members included, as text."""
    parts = ("module", "optimizer", "averager")
    members = [plain({part: member.content()[part] for part in parts}) for member in run.cohort.members]
    return repr((run.strategy.state_dict(), run.decisions, run.num_updates, members))


def finished(run: CohortPopulation) -> CohortPopulation:
    for _ in run.run():
        pass
    return run


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("name", "route", "synchronous"),
    [
        ("truncation", "stacked", True),
        ("truncation", "single", False),
        ("forecast", "single", True),
        ("ipbt", "single", False),
    ],
)
def test_a_resumed_population_ends_as_the_one_that_was_not_interrupted(
    name: str, route: str, synchronous: bool, tmp_path: Path
) -> None:
    train = AVERAGED if name == "forecast" else {}
    whole = finished(population(rule(name, synchronous), train=train, route=route))
    run = population(rule(name, synchronous), train=train, route=route)
    num_stretches = 0
    while not run.finished:
        for _ in run.stretch():
            pass
        num_stretches += 1
        if num_stretches in (1, 4):
            run.save(tmp_path)
            run = CohortPopulation.load(tmp_path, rule(name, synchronous))
    assert num_stretches >= 4
    assert any(decision.donor is not None for decision in whole.decisions)
    assert outcome(run) == outcome(whole)


def test_a_population_can_be_saved_before_it_begins_and_after_it_ended(tmp_path: Path) -> None:
    run = population(strategy())
    run.save(tmp_path / "before")
    finished(run).save(tmp_path / "after")
    assert outcome(finished(CohortPopulation.load(tmp_path / "before", strategy()))) == outcome(run)
    ended = CohortPopulation.load(tmp_path / "after", strategy())
    assert ended.finished
    assert outcome(ended) == outcome(run)


def test_a_population_under_way_is_not_saved(tmp_path: Path) -> None:
    run = population(strategy())
    records = run.stretch()
    next(records)
    with pytest.raises(UserError, match=r"between two stretches.*take the records of stretch\(\) to their end"):
        run.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_old_checkpoint_is_there_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = population(strategy())
    for _ in run.stretch():
        pass
    run.save(tmp_path)
    saved = outcome(run)
    for _ in run.stretch():
        pass

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(population_module, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save(tmp_path)
    assert outcome(CohortPopulation.load(tmp_path, strategy())) == saved
    run.save(tmp_path)
    assert outcome(CohortPopulation.load(tmp_path, strategy())) == outcome(run)
    assert len(list(tmp_path.glob("part-*"))) == 1  # what was left behind is gone


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of a population in .*; give a folder that was saved to"):
        CohortPopulation.load(tmp_path, strategy())
    population(strategy()).save(tmp_path)
    with pytest.raises(UserError, match=r"state must be of strategy 'independent'.*got 'truncation'"):
        CohortPopulation.load(tmp_path, strategy("independent"))
    manifest = tmp_path / MANIFEST
    text = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(UserError, match="has version 99, this program reads 1; use the version"):
        CohortPopulation.load(tmp_path, strategy())
    manifest.write_text(text[:-9])
    with pytest.raises(UserError, match=r"population\.json cannot be read .*; delete it to start anew"):
        CohortPopulation.load(tmp_path, strategy())
    manifest.write_text("[]")
    with pytest.raises(UserError, match=r"population\.json is not of a population; give a folder"):
        CohortPopulation.load(tmp_path, strategy())
    manifest.write_text(text)
    (part,) = tmp_path.glob("part-*")
    (part / SNAPSHOTS).write_bytes(b"half")
    with pytest.raises(UserError, match=r"snapshots\.pt cannot be read .*; delete its folder to start anew"):
        CohortPopulation.load(tmp_path, strategy())
