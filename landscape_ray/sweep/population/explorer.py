"""Any Optuna sampler as the explorer of a population: it proposes the values of copies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from landscape_ray.domains import Domain, Value
from landscape_ray.populations.decisions import decode, encode
from landscape_ray.sweep.searching.proposer import Outcome, Proposer

WINDOW = 100
"""Improvements that a sampler is shown, the newest: what is best changes in the course of training."""

EXPLORE_STREAM = 3
"""Second entry of the seed of proposals."""


class OptunaExplorer:
    """Asks a sampler for values that bring the loss down fast.

    Every stretch of training between two decisions is a finished trial to the sampler, its value the rate at which the
    logarithm of the loss fell, and a diverged one a failed trial.

    Args:
        space: what members may change.
        sampler: see `searching.samplers.build_sampler`.
        options: keyword arguments of the sampler.
        seed: of all proposals.
    """

    def __init__(self, space: Mapping[str, Domain], sampler: str, options: Mapping[str, Any], seed: int) -> None:
        self._space, self._sampler, self._options, self._seed = dict(space), sampler, dict(options), seed
        self._seen: list[tuple[dict[str, Value], float]] = []
        self._asked = 0

    def explore(self, values: dict[str, Value]) -> dict[str, Value]:
        """Return the sampler's next proposal; what is not searched stays as it is."""
        entropy = np.random.SeedSequence([self._seed, EXPLORE_STREAM, self._asked])
        seed = int(entropy.generate_state(1)[0])
        self._asked += 1
        proposer = Proposer(
            self._space, sampler=self._sampler, options=self._options, seed=seed, directions=("maximize",)
        )
        for seen, rate in self._seen:
            sound = math.isfinite(rate)
            proposer.add(seen, Outcome(state="complete", values=(rate,)) if sound else Outcome(state="failed"))
        return values | proposer.ask().values

    def learn(self, values: dict[str, Value], rate: float) -> None:
        """Take note how fast the logarithm of the loss fell."""
        self._seen.append(({name: values[name] for name in self._space}, rate))
        del self._seen[:-WINDOW]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later proposals depend on."""
        return {"seen": [[values, encode(rate)] for values, rate in self._seen], "asked": self._asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._seen = [(dict(values), decode(rate)) for values, rate in state["seen"]]
        self._asked = state["asked"]
