import sys
from types import ModuleType
from typing import Any

import optuna
import pytest

from landscape_ray.config import parse
from landscape_ray.domains import Domain
from landscape_ray.errors import UserError
from landscape_ray.sweep.searching.config import SearchConfig
from landscape_ray.sweep.searching.proposer import Outcome, Proposer
from landscape_ray.sweep.searching.samplers import SEARCHERS, build_sampler, check_sampler

SPACE = {
    "a": Domain(uniform=[0.0, 1.0]),
    "kind": Domain(choices=["x", "y", "z"]),
    "b": Domain(log_uniform=[1e-3, 1.0], when={"kind": ["x", "y"]}),
    "n": Domain(integers=[1, 9], when={"kind": "x"}),
}


class Corner(optuna.samplers.RandomSampler):
    """A sampler of a user's: always the low end of ranges."""

    def __init__(self, seed: int | None = None, high: bool = False) -> None:
        super().__init__(seed)
        self.high = high

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        if isinstance(param_distribution, optuna.distributions.CategoricalDistribution):
            return param_distribution.choices[0]
        return param_distribution.high if self.high else param_distribution.low


def no_sampler(seed: int) -> str:
    return "nothing"


@pytest.mark.acceptance
@pytest.mark.parametrize("sampler", [*sorted(SEARCHERS), f"{__name__}:Corner"])
def test_every_sampler_proposes_inside_a_conditional_space(sampler: str) -> None:
    """Define by run: an entry is asked where its `when` holds, of one value or of several, and nowhere else."""
    proposer = Proposer(SPACE, sampler=sampler, seed=3)
    for _ in range(12):
        number, values = proposer.ask()
        assert all(SPACE[name].contains(value) for name, value in values.items())
        assert ("b" in values) == (values["kind"] in ("x", "y"))
        assert ("n" in values) == (values["kind"] == "x")
        proposer.tell(number, Outcome(state="complete", values=((values["a"] - 0.3) ** 2,)))


def test_a_sampler_of_yours_takes_its_options() -> None:
    proposer = Proposer(SPACE, sampler=f"{__name__}:Corner", options={"high": True})
    assert proposer.ask().values == {"a": 1.0, "kind": "x", "b": 1.0, "n": 9}


@pytest.mark.acceptance
def test_one_of_optunahub_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is not installed here; what stands in for it has its one function."""
    hub, package = ModuleType("optunahub"), ModuleType("package")
    package.Corner = Corner  # type: ignore[attr-defined]

    def load_module(name: str) -> ModuleType:
        if name != "samplers/corner":
            raise OSError("no such package")
        return package

    hub.load_module = load_module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optunahub", hub)
    proposer = Proposer(SPACE, sampler="optunahub:samplers/corner:Corner")
    assert proposer.ask().values["a"] == 0.0
    for name in ("optunahub:samplers/other:Corner", "optunahub:samplers/corner:Other"):
        with pytest.raises(UserError, match=f"OptunaHub has no '{name}'"):
            build_sampler(name, 0, 0)


def search(**fields: Any) -> SearchConfig:
    return parse(SearchConfig, {"num_trials": 3, **fields}, "file")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "tpee"}, "search.sampler must be a known name or a path .*, got 'tpee'; did you mean 'tpe'"),
        ({"sampler": "nowhere:Sampler"}, "search.sampler: cannot import 'nowhere:Sampler'"),
        (
            {"options": {"n_startup": 3}},
            r"search.options must be what sampler 'tpe' takes .* takes: .*n_startup_trials",
        ),
        ({"options": {"seed": 3}}, "search.options must not hold a seed"),
        ({"sampler": "optunahub:auto"}, "must be optunahub:<package>:<Name>, got 'optunahub:auto'"),
        ({"sampler": f"{__name__}:no_sampler"}, "must make an optuna.samplers.BaseSampler, got str"),
        ({"sampler": "cmaes", "options": {"size": 2}}, "search.options must be what sampler 'cmaes' takes"),
    ],
)
def test_samplers_that_cannot_be_made_are_refused(fields: dict[str, Any], message: str) -> None:
    found = search(**fields)
    with pytest.raises(UserError, match=message):
        check_sampler(found.sampler, found.options)


def test_optunahub_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optunahub", None)
    with pytest.raises(UserError, match="needs the package optunahub, which is not installed"):
        check_sampler("optunahub:samplers/auto_sampler:AutoSampler", {})
