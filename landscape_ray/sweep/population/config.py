"""The table [population] of a sweep file, and the strategy that it describes. Needs neither Ray nor Optuna."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from landscape_ray.config import Model
from landscape_ray.domains import Domain, Value
from landscape_ray.errors import UserError
from landscape_ray.populations import STRATEGIES, Explorer, Strategy
from landscape_ray.populations.strategies import Bandit, Independent
from landscape_ray.registry import resolve, suggest
from landscape_ray.schedules import Schedule

GIVEN = ("space", "num_steps", "seed", "schedule", "explorer")
"""Arguments of strategies that come from elsewhere in the sweep file."""


class SamplerConfig(Model):
    """[population.initialiser] and [population.explorer]: values from an Optuna sampler."""

    sampler: str
    """By a name as in [search]."""
    options: dict[str, Any] = {}
    """Keyword arguments of the sampler."""


class PopulationConfig(Model):
    """The table [population]: members that train together, copy the better ones and mutate (Jaderberg et al. 2017)."""

    strategy: str = "truncation"
    """truncation | significance | pb2 | fire | mf_pbt | ipbt | forecast | independent, or the path package.module:Name
    of a `landscape_ray.populations.Strategy` of yours."""
    options: dict[str, Any] = {}
    """What the strategy takes beside the fields of this table, such as significance = 0.01."""
    num_members: int = Field(default=4, ge=2)
    interval_steps: int = Field(ge=1)
    """Updates between two decisions of a member."""
    quantile_fraction: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the population that is replaced, and share that is copied."""
    resample_probability: float = Field(default=0.1, ge=0, le=1)
    """Of drawing a value anew instead of perturbing it."""
    factors: list[float] = Field(default=[0.8, 1.25], min_length=1)
    """What numbers are multiplied by."""
    synchronous: bool = False
    """Whether members wait for each other at every interval."""
    initial: list[dict[str, Value]] = []
    """Values of the first members."""
    initialiser: SamplerConfig | None = None
    """Where those of the others come from. Default: a Latin hypercube."""
    explorer: SamplerConfig | None = None
    """Where the values of copies come from, given how fast the losses fell under earlier ones. Default: a perturbation
    of the donor's."""

    @field_validator("factors")
    @classmethod
    def _positive(cls, factors: list[float]) -> list[float]:
        if min(factors) <= 0:
            raise ValueError(f"factors must be positive, got {factors}")
        return factors


def build_strategy(
    population: PopulationConfig,
    space: Mapping[str, Domain],
    *,
    num_steps: int,
    schedule: Schedule,
    seed: int,
    initial: Sequence[dict[str, Value]] = (),
    explorer: Explorer | None = None,
) -> Strategy:
    """Return a new strategy.

    Args:
        population: the table.
        space: what members may change.
        num_steps: of a member.
        schedule: of the learning rate, for strategies that forecast.
        seed: of every draw.
        initial: values of the first members.
        explorer: of the values of copies, where the table asks for one.

    Raises:
        UserError: no such strategy, an option that it does not take, or a value out of range.
    """
    kind = resolve(population.strategy, STRATEGIES, "population.strategy")
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        raise UserError(
            f"population.strategy must be a landscape_ray.populations.Strategy, got {kind!r} from "
            f"'{population.strategy}'; give the path of a class that derives from it"
        )
    takes = options_of(kind)
    known = sorted(takes - {*PopulationConfig.model_fields, *GIVEN})
    field = "population.options"
    for name in population.options:
        if name in PopulationConfig.model_fields:
            raise UserError(
                f"population.options must not hold '{name}', which every strategy has; set population.{name}"
            )
        if name not in known:
            what = suggest(name, known) if known else "this strategy has none; remove it"
            raise UserError(
                f"population.options must be what strategy '{population.strategy}' takes, got '{name}'; {what}"
            )
    if population.explorer is not None and issubclass(kind, (Bandit, Independent)):
        raise UserError(
            f"population.explorer has no meaning for strategy '{population.strategy}', which proposes its own values "
            "or none; remove it, or choose another strategy"
        )
    options = dict(population.options)
    if "schedule" in takes:
        lr_name = options.get("lr_name", "schedule.peak_lr")
        for name in space:
            if name.startswith("schedule.") and name != lr_name:
                raise UserError(
                    f"space.{name} cannot change under strategy '{population.strategy}', whose members share a "
                    "schedule; remove it, or choose another strategy"
                )
        options["schedule"] = schedule
    try:
        strategy = kind(
            dict(space),
            num_members=population.num_members,
            num_steps=num_steps,
            interval_steps=population.interval_steps,
            seed=seed,
            synchronous=population.synchronous,
            initial=initial,
            quantile_fraction=population.quantile_fraction,
            factors=population.factors,
            resample_probability=population.resample_probability,
            explorer=explorer,
            **options,
        )
    except UserError as error:
        raise UserError(f"population (strategy '{population.strategy}'): {error}") from None
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"{field} must have the types that strategy '{population.strategy}' takes, got "
            f"{population.options} ({error}); it takes: {', '.join(known) or 'nothing'}"
        ) from None
    return strategy


def options_of(kind: type[Strategy]) -> set[str]:
    """Return the names of all arguments that a strategy and the classes it derives from take.

    >>> sorted(options_of(STRATEGIES["significance"]) - options_of(STRATEGIES["truncation"]))
    ['num_points', 'significance']
    """
    names: set[str] = set()
    for each in kind.__mro__:
        if "__init__" in vars(each) and issubclass(each, Strategy):
            parameters = list(inspect.signature(each.__init__).parameters.values())[1:]
            names |= {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return names
