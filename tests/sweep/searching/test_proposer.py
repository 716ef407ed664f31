import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from landscape_ray.domains import Domain
from landscape_ray.errors import UserError
from landscape_ray.sweep.searching.proposer import Outcome, Proposer
from landscape_ray.sweep.searching.samplers import SEARCHERS

SPACE = {
    "lr": Domain(log_uniform=[1e-4, 1e-1]),
    "kind": Domain(choices=["x", "y"]),
    "n": Domain(integers=[1, 9], when={"kind": "x"}),
}


def loss(values: dict[str, Any]) -> float:
    return (np.log10(values["lr"]) + 2) ** 2 + 0.01 * values.get("n", 5)


def play(proposer: Proposer, number: int) -> list[dict[str, Any]]:
    made = []
    for _ in range(number):
        index, values = proposer.ask()
        made.append(values)
        proposer.tell(index, Outcome(state="complete", values=(loss(values),)))
    return made


@pytest.mark.acceptance
@pytest.mark.parametrize("sampler", sorted(SEARCHERS))
def test_a_restored_proposer_goes_on_as_if_nothing_had_been(sampler: str) -> None:
    """What a population needs: ask and tell on domains, a state of JSON values, one seed."""
    options = {"population_size": 4} if sampler.startswith("nsga") else {}

    def make(seed: int = 1) -> Proposer:
        return Proposer(SPACE, sampler=sampler, options=options, seed=seed)

    whole = play(make(), 14)
    first = make()
    begun = play(first, 8)
    second = make()
    second.restore(json.loads(json.dumps(first.state())))
    assert begun + play(second, 6) == whole
    assert play(make(2), 14) != whole


@pytest.mark.acceptance
def test_tpe_learns_from_points_that_were_added() -> None:
    proposer = Proposer(SPACE, seed=0)
    generator = np.random.default_rng(0)
    for _ in range(40):
        values = {"lr": float(10 ** generator.uniform(-4, -1)), "kind": "y"}
        proposer.add(values, Outcome(state="complete", values=(loss(values),)))
    near = []
    for _ in range(20):
        number, values = proposer.ask()
        near.append(abs(np.log10(values["lr"]) + 2))
        proposer.tell(number, Outcome(state="complete", values=(loss(values),)))
    assert np.median(near) < 0.4  # uniform: 0.75


@pytest.mark.acceptance
def test_a_paused_trial_is_told_again_when_more_is_known() -> None:
    proposer = Proposer(SPACE, seed=0)
    number, _ = proposer.ask()
    proposer.tell(number, Outcome(state="pruned", intermediate={10: 2.0}))
    assert proposer.frozen(number).value == 2.0
    proposer.tell(number, Outcome(state="pruned", intermediate={10: 2.0, 30: 1.5}))
    assert proposer.frozen(number).value == 1.5
    proposer.tell(number, Outcome(state="complete", values=(1.0,), constraints={"c": 0.5}))
    frozen = proposer.frozen(number)
    assert (frozen.state.name, frozen.value, frozen.constraints) == ("COMPLETE", 1.0, {"c": 0.5})
    assert frozen.intermediate_values == {10: 2.0, 30: 1.5}


def test_given_points_and_adjusted_ones_are_recorded_as_they_are_tried() -> None:
    proposer = Proposer(SPACE, seed=0)
    assert proposer.ask({"lr": 0.01, "kind": "y"}).values == {"lr": 0.01, "kind": "y"}
    number, values = proposer.ask({"kind": "x"}, lambda values: {**values, "lr": 2e-4, "n": 3})
    assert values == {"lr": 2e-4, "kind": "x", "n": 3} == proposer.frozen(number).params


def test_points_asked_together_differ() -> None:
    proposer = Proposer(SPACE, seed=0)
    play(proposer, 10)
    points = [json.dumps(proposer.ask().values) for _ in range(6)]
    assert max(Counter(points).values()) == 1


def test_what_cannot_be_told_is_refused() -> None:
    proposer = Proposer(SPACE, seed=0)
    with pytest.raises(UserError, match="number must be that of a proposal, 0 to -1, got 0"):
        proposer.tell(0, Outcome(state="failed"))
    number, _ = proposer.ask()
    with pytest.raises(UserError, match=r"outcome.values must be 1, one for each objective, got \(1.0, 2.0\)"):
        proposer.tell(number, Outcome(state="complete", values=(1.0, 2.0)))
    with pytest.raises(UserError, match=r"lr must lie in its domain \[0.0001, 0.1\], got 0.2"):
        proposer.add({"lr": 0.2, "kind": "y"}, Outcome(state="failed"))
    with pytest.raises(UserError, match=r"kind must lie in its domain .*, got none"):
        proposer.add({"lr": 0.02}, Outcome(state="failed"))
    with pytest.raises(UserError, match="loaded into an empty proposer, got one with 1"):
        proposer.load([], {})
