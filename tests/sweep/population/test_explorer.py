"""An Optuna sampler inside a population."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from landscape_ray.domains import Domain
from landscape_ray.populations.strategies import Truncation
from landscape_ray.sweep.population.explorer import WINDOW, OptunaExplorer
from tests.sweep.population.local import Local, make

SPACE = {"lr": Domain(log_uniform=[1e-4, 1e-1]), "kind": Domain(choices=["a", "b"])}


def explorer(sampler: str = "tpe") -> OptunaExplorer:
    return OptunaExplorer(SPACE, sampler, {}, seed=1)


@pytest.mark.acceptance
@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "nsgaii", "qmc"])
def test_any_sampler_proposes_inside_the_domains_and_goes_on_after_a_crash(sampler: str) -> None:
    first = explorer(sampler)
    for k in range(12):
        values = first.explore({"lr": 0.01, "kind": "a", "fixed": 1})
        assert all(SPACE[name].contains(values[name]) for name in SPACE)
        assert values["fixed"] == 1
        first.learn(values, math.nan if k == 3 else -abs(math.log10(float(values["lr"])) + 2))
    second = explorer(sampler)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for _ in range(3):
        assert first.explore({}) == second.explore({})


def test_it_goes_where_the_loss_falls_fast() -> None:
    """And forgets what was long ago."""
    known = explorer()
    for k in range(3 * WINDOW):
        lr = SPACE["lr"].at((k % 50) / 50)
        known.learn({"lr": lr, "kind": "b"}, -abs(math.log10(float(lr)) + 2))
    assert len(known.state_dict()["seen"]) == WINDOW
    proposed = [math.log10(float(known.explore({})["lr"])) for _ in range(20)]
    near = sum(abs(value + 2) < 0.6 for value in proposed)
    assert near >= 12, proposed  # 8 at random


def test_a_population_explores_with_it(text: Callable[..., str], tmp_path: Path) -> None:
    folder = make(tmp_path / "s", text(explorer={"sampler": "tpe"}, synchronous=True, quantile_fraction=0.5))
    run = Local(folder).run()
    assert isinstance(run.book.strategy, Truncation)
    assert isinstance(run.book.strategy.explorer, OptunaExplorer)
    state = run.book.strategy.state_dict()["explorer"]
    copies = [decision for decision in run.decisions if decision.action == "exploit"]
    assert state["asked"] == len(copies) == 6
    assert len(state["seen"]) == 12, "four members, from their second interval on"
