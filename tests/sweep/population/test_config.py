"""The table [population]: strategies by name, their options, and errors that say what to write."""

from typing import Any

import pytest

from landscape_ray.config import parse, with_values
from landscape_ray.errors import UserError
from landscape_ray.populations import STRATEGIES
from landscape_ray.sweep.population.book import strategy_of
from landscape_ray.sweep.population.config import options_of
from landscape_ray.sweep.spec import SweepSpec

BASE: dict[str, Any] = {
    "name": "s",
    "train": {"num_steps": 100, "eval": {"every_steps": 10}},
    "space": {"schedule.peak_lr": {"log_uniform": [1e-3, 1e-2]}},
    "population": {"interval_steps": 20, "num_members": 8},
}
NOT_A_STRATEGY = "nothing"


def spec(**values: Any) -> SweepSpec:
    return parse(SweepSpec, with_values(BASE, {key.replace("__", "."): v for key, v in values.items()}), "file.toml")


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_is_there_by_its_name(name: str) -> None:
    strategy = strategy_of(spec(population__strategy=name), ())
    assert strategy.name == name
    assert (strategy.num_steps, strategy.interval_steps, len(strategy.members)) == (100, 20, 8)


def test_a_path_names_a_strategy_and_options_reach_it() -> None:
    found = spec(
        population__strategy="landscape_ray.populations.strategies:Significance",
        population__options={"significance": 0.2},
    )
    strategy = strategy_of(found, ())
    assert isinstance(strategy, STRATEGIES["significance"])
    assert strategy.significance == 0.2  # type: ignore[attr-defined]


def test_options_are_those_of_the_class_and_its_parents() -> None:
    assert {"patience", "growth", "window", "factors"} <= options_of(STRATEGIES["ipbt"])
    assert "patience" not in options_of(STRATEGIES["pb2"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategy": "truncate"}, r"population.strategy must be a known name .* got 'truncate'; did you mean 'trunc"),
        ({"strategy": f"{__name__}:NOT_A_STRATEGY"}, r"population.strategy must be a landscape_ray.populations.Strat"),
        (
            {"strategy": "significance", "options": {"significanse": 0.1}},
            r"population.options must be what strategy 'significance' takes, got 'significanse'; did you mean 'signif",
        ),
        ({"options": {"x": 1}}, r"what strategy 'truncation' takes, got 'x'; this strategy has none; remove it"),
        ({"options": {"factors": [2.0]}}, r"population.options must not hold 'factors', .* set population.factors"),
        ({"strategy": "forecast", "options": {"schedule": 1}}, r"strategy 'forecast' takes, got 'schedule'"),
        (
            {"strategy": "significance", "options": {"significance": 2.0}},
            r"population \(strategy 'significance'\): significance must be in \(0, 1\), got 2.0",
        ),
        (
            {"strategy": "significance", "options": {"significance": "x"}},
            r"population.options must have the types that strategy 'significance' takes, got \{'significance': 'x'\}",
        ),
        ({"strategy": "mf_pbt", "num_members": 4}, r"\(strategy 'mf_pbt'\): num_members must be a multiple of 2"),
        ({"initial": [{"schedule.peak_lr": 1.0}]}, r"initial\[0\] must hold schedule.peak_lr inside its domain, got 1"),
        ({"interval_steps": 200}, r"interval_steps must be in \[1, num_steps = 100\], got 200"),
        (
            {"initialiser": {"sampler": "tpee"}},
            r"population.initialiser.sampler must be a known name .*, got 'tpee'; did you mean 'tpe'",
        ),
        (
            {"initialiser": {"sampler": "tpe", "options": {"n": 3}}},
            r"population.initialiser.options must be what sampler 'tpe' takes",
        ),
        (
            {"explorer": {"sampler": "tpee"}},
            r"population.explorer.sampler must be a known name .*, got 'tpee'; did you mean 'tpe'",
        ),
        (
            {"strategy": "pb2", "explorer": {"sampler": "tpe"}},
            r"population.explorer has no meaning for strategy 'pb2', which proposes its own values or none; remove it",
        ),
        ({"strategi": "pb2"}, r"unknown key 'population.strategi'; did you mean 'strategy'"),
        (
            {"strategy": "ipbt", "options": {"growth": 1.3}},
            r"population.options.growth must keep intervals multiples of train.eval.every_steps = 10, got 1.3",
        ),
    ],
)
def test_mistakes_are_named_with_their_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec(**{f"population__{key}": value for key, value in values.items()})


def test_members_of_a_forecasting_population_share_their_schedule() -> None:
    space = {**BASE["space"], "schedule.name": {"choices": ["wsd", "linear"]}}
    data = BASE | {"space": space, "population": {"interval_steps": 20, "strategy": "forecast"}}
    with pytest.raises(UserError, match=r"space.schedule.name cannot change under strategy 'forecast'"):
        parse(SweepSpec, data, "file.toml")
