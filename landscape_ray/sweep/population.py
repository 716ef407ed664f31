"""Population-based training through Ray's scheduler, with our explore step.

Ray multiplies values without clipping them and draws from Python's global generator; here its own mutation is switched
off and `populations.explore` is used in its place: inside the domains, from the sweep's seed.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
from ray.tune.schedulers import PopulationBasedTraining

from landscape_ray.domains import Value
from landscape_ray.errors import UserError
from landscape_ray.populations import explore, initial_members
from landscape_ray.records import RunSummary
from landscape_ray.sweep.run import trial_id_of
from landscape_ray.sweep.spec import SweepSpec

EXPLORE_STREAM = 1
"""Second entry of the seed of the explore step; 0 draws the initial members."""


def build_population_scheduler(spec: SweepSpec, attempt: int, reached_step: int) -> PopulationBasedTraining:
    """Return Ray's PBT scheduler for this sweep.

    Args:
        spec: the sweep; must have a [population] table.
        attempt: number of the driver; a resumed sweep draws on from another stream.
        reached_step: the furthest step of any member; 0 for a new sweep.
    """
    population = spec.population
    if population is None:
        raise UserError(f"sweep '{spec.name}' has no [population] table; add one")
    generator = np.random.default_rng([spec.seed, EXPLORE_STREAM, attempt])
    # Ray chooses among the donors with Python's global generator; it can only be seeded as a whole.
    random.seed(int(generator.integers(2**63)))
    exploits = itertools.count(1)

    def mutate(config: dict[str, Any]) -> dict[str, Any]:
        values = explore(
            config["trial"]["values"],
            spec.space,
            generator,
            factors=population.factors,
            resample_probability=population.resample_probability,
        )
        # The serial tells a new exploit from one that Ray repeats after a crash, even of the same checkpoint.
        return {**config, "trial": {"values": values, "exploit": f"{attempt}.{next(exploits)}"}}

    scheduler = PopulationBasedTraining(
        time_attr="step",
        perturbation_interval=population.interval_steps,
        quantile_fraction=population.quantile_fraction,
        hyperparam_mutations={},
        custom_explore_fn=mutate,
        synch=population.synchronous,
        log_config=False,
    )
    # A synchronous population waits for the first multiple of the interval, which lies behind a resumed one: once all
    # members have met beyond it, none is ever a candidate to go on. It has no public setting.
    interval = population.interval_steps
    scheduler._next_perturbation_sync = (reached_step // interval + 1) * interval
    return scheduler


def members(spec: SweepSpec, known: dict[str, RunSummary]) -> dict[str, dict[str, Value]]:
    """Return the values that each unfinished member starts or continues with, by trial identifier.

    Args:
        spec: the sweep; must have a [population] table.
        known: what is on disk; a member found there keeps its mutated values, a finished one is left out.
    """
    if spec.population is None:
        raise UserError(f"sweep '{spec.name}' has no [population] table; add one")
    start = initial_members(spec.space, spec.population.num_members, np.random.default_rng([spec.seed, 0]))
    values = {trial_id_of(index): point for index, point in enumerate(start)}
    for trial_id, summary in known.items():
        if summary.status in ("finished", "diverged"):
            values.pop(trial_id, None)
        elif trial_id in values and summary.config:  # without one it failed before it started
            values[trial_id] = summary.varied
    return values
