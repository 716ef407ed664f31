from pathlib import Path
from typing import Any

import pytest

from landscape_ray.config import parse, with_values
from landscape_ray.errors import UserError
from landscape_ray.sweep.session import check_data
from landscape_ray.sweep.spec import SweepSpec, read_spec, spec_of
from landscape_ray.tracking.folder import SweepFolder

ROOT = Path(__file__).parents[2]

BASE: dict[str, Any] = {
    "name": "s",
    "train": {"num_steps": 100, "eval": {"every_steps": 10}},
    "space": {"schedule.peak_lr": {"log_uniform": [1e-3, 1e-2]}},
    "search": {"num_trials": 3},
}
POPULATION: dict[str, Any] = {**{k: v for k, v in BASE.items() if k != "search"}, "population": {"interval_steps": 20}}


def spec(data: dict[str, Any], **values: Any) -> SweepSpec:
    return parse(SweepSpec, with_values(data, {key.replace("__", "."): v for key, v in values.items()}), "file.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.toml")), ids=lambda p: p.stem)
def test_the_examples_are_valid(path: Path) -> None:
    found, text = read_spec(path)
    assert text == path.read_text()
    assert found.train_config(found.first_values(), 0).num_steps > 0


@pytest.mark.parametrize(
    ("data", "values", "message"),
    [
        (BASE, {"nam": "x"}, r"unknown key 'nam'; did you mean 'name'\?"),
        (BASE, {"train__num_stps": 3}, r"unknown key 'num_stps'; did you mean 'num_steps'\?"),
        (BASE, {"train__batch_size": "16"}, r"'batch_size' input should be a valid integer, got '16'"),
        (BASE, {"train__model": {"width": -1}}, r"'model.width' input should be greater than or equal to 8, got -1"),
        (BASE, {"name": "../evil"}, r"name must be letters, digits"),
        (BASE, {"train__seed": 3}, r"train.seed must not be given; set `seed` at the top"),
        (BASE, {"population": {"interval_steps": 20}}, r"one of \[search\] and \[population\], got both"),
        (
            BASE,
            {"search__sampler": "tpee"},
            r"search.sampler must be a known name or a path .*, got 'tpee'; did you mean 'tpe'",
        ),
        (BASE, {"search__num_trials": 0}, r"'search.num_trials' .* greater than or equal to 1, got 0"),
        (
            BASE,
            {"search__initial": [{"schedule.peak_lr": 1.0}]},
            r"initial\[0\].schedule.peak_lr must lie in its domain",
        ),
        (BASE, {"search__initial": [{"schedule.name": "wsd"}]}, r"initial\[0\] names 'schedule.name', which is not"),
        (BASE, {"search__initial": [{}]}, r"initial\[0\] lacks 'schedule.peak_lr'"),
        (BASE, {"search__initial": [{"schedule.peak_lr": 0.002}] * 4}, r"at most num_trials = 3 points, got 4"),
        (BASE, {"resources__cpus_per_trial": 0.0}, r"'resources.cpus_per_trial' .* greater than 0"),
        (BASE, {"space": {"seed": {"integers": [0, 9]}}}, r"space.seed cannot be searched; `vary_seed = true`"),
        (BASE, {"train__device": "cuda"}, r"train.device 'cuda' needs resources.gpus_per_trial > 0, got 0"),
        (POPULATION, {"population__interval_steps": 15}, r"multiple of train.eval.every_steps = 10, got 15"),
        (POPULATION, {"population__factors": [0.0]}, r"factors must be positive, got \[0.0\]"),
        (POPULATION, {"space": {}}, r"a population needs at least one entry in \[space\]"),
        (
            POPULATION,
            {"space": {"model.depth": {"integers": [1, 2]}}},
            r"space.model.depth cannot change during training",
        ),
        (POPULATION, {"space": {"num_steps": {"integers": [1, 2]}}}, r"space.num_steps cannot change during training"),
    ],
)
def test_mistakes_are_named_with_their_remedy(data: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec(data, **values)


def test_every_end_of_every_domain_is_checked() -> None:
    for name, domain, message in (
        (
            "schedule.peak_lrr",
            {"uniform": [0.1, 0.2]},
            r"\[train\] with values of \[space\]: unknown key 'schedule.peak_lrr'; did you mean 'peak_lr'",
        ),
        ("model.width", {"integers": [8, 99]}, r"space.model.width = 99: model: width must be a multiple of num_heads"),
        (
            "schedule.name",
            {"choices": ["wsd", "stairs"]},
            r"space.schedule.name = 'stairs': .*known name .* got 'stairs'",
        ),
        ("batch_size", {"uniform": [1.0, 8.5]}, r"'batch_size' input should be a valid integer"),
    ):
        with pytest.raises(UserError, match=message):
            parse(SweepSpec, {**BASE, "space": {name: domain}}, "file.toml")


def test_a_condition_in_a_population_is_refused() -> None:
    space = {
        "schedule.name": {"choices": ["wsd", "linear"]},
        "schedule.cooldown_fraction": {"uniform": [0.1, 0.9], "when": {"schedule.name": "wsd"}},
    }
    with pytest.raises(UserError, match=r"space.schedule.cooldown_fraction.when has no meaning in a population"):
        parse(SweepSpec, {**POPULATION, "space": space}, "file.toml")


def test_searches_share_a_seed_and_populations_vary_it() -> None:
    search, population = spec(BASE, seed=3), spec(POPULATION, seed=3)
    assert [search.train_config({}, index).seed for index in (0, 1)] == [3, 3]
    seeds = [population.train_config({}, index).seed for index in range(4)]
    assert len(set(seeds)) == 4
    assert seeds == [spec(POPULATION, seed=3).train_config({}, index).seed for index in range(4)]
    assert spec(BASE, vary_seed=True).train_config({}, 1).seed != spec(BASE, vary_seed=True).train_config({}, 0).seed


def test_a_spec_file_executes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("name = \"a\"\n[train]\nnum_steps = \"__import__('os').system('true')\"\n")
    with pytest.raises(UserError, match=r"'num_steps' input should be a valid integer"):
        read_spec(path)


def test_relative_paths_mean_what_they_meant_at_launch(tmp_path: Path) -> None:
    text = """
name = "s"
train = { num_steps = 10, data = { source = "base" } }
space = { "data.source" = { choices = ["a", "/b", "stdlib"] } }
search = { num_trials = 3, initial = [ { "data.source" = "a" } ] }
"""
    folder = SweepFolder.create(tmp_path / "s", spec_text=text, meta={"launched_in": "/there"})
    found = spec_of(folder)
    assert found.train["data"]["source"] == "/there/base"
    assert found.space["data.source"].choices == ["/there/a", "/b", "stdlib"]
    assert found.search is not None
    assert found.search.initial == [{"data.source": "/there/a"}]


def test_conditions_may_hang_on_names_of_a_union() -> None:
    """Where the model is another one, what only the first has is left out of the point."""
    space = {
        "model.name": {"choices": ["gpt", "mlp"]},
        "model.num_heads": {"choices": [2, 4], "when": {"model.name": "gpt"}},
        "optimizer.name": {"choices": ["adamw", "sgd"]},
        "optimizer.beta2": {"uniform": [0.9, 0.99], "when": {"optimizer.name": "adamw"}},
        "optimizer.momentum": {"uniform": [0.5, 0.9], "when": {"optimizer.name": "sgd"}},
    }
    train = {"num_steps": 10, "data": {"name": "modular", "modulus": 13}, "eval": {"num_batches": "all"}}
    found = spec({"name": "x", "train": train, "space": space, "search": {"num_trials": 2}})
    assert found.point_with("optimizer.momentum", 0.5) == {
        "model.name": "gpt",
        "model.num_heads": 2,
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.5,
    }
    assert found.point_with("model.name", "mlp")["model.name"] == "mlp"
    assert "model.num_heads" not in found.point_with("model.name", "mlp")
    assert check_data(found)


@pytest.mark.parametrize("name", ["optimizer.name", "averaging.name", "loss.z_loss", "eval.every_steps"])
def test_a_population_cannot_change_what_its_state_depends_on(name: str) -> None:
    domain = {"choices": ["adamw", "sgd"]} if name.endswith("name") else {"uniform": [0.0, 0.1]}
    domain = {"choices": ["ema", "swa"]} if name == "averaging.name" else domain
    domain = {"choices": [10, 25]} if name == "eval.every_steps" else domain
    data = {"name": "x", "train": {"num_steps": 100}, "space": {name: domain}}
    with pytest.raises(UserError, match=rf"space.{name} cannot change during training"):
        spec(data | {"population": {"interval_steps": 50}})


def test_a_population_may_change_the_decay_of_an_average() -> None:
    train = {"num_steps": 100, "averaging": {"name": "ema"}}
    data = {"name": "x", "train": train, "space": {"averaging.decay": {"uniform": [0.9, 0.99]}}}
    assert spec(data | {"population": {"interval_steps": 50}}).population is not None


def test_the_loss_is_not_searched() -> None:
    space = {"loss.name": {"choices": ["cross_entropy", "squared_error"]}}
    with pytest.raises(UserError, match=r"space.loss.name cannot be searched: different losses do not compare"):
        spec({"name": "x", "train": {"num_steps": 10}, "space": space, "search": {"num_trials": 2}})
