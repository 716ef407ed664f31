"""The table [search] of a sweep file, validated. Needs neither Ray nor Optuna."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, Tag, field_validator, model_validator

from landscape_ray.config import Model, told_by_name
from landscape_ray.domains import Value
from landscape_ray.errors import UserError
from landscape_ray.search import Asha, ForecastStop, MedianStop, StoppingRule, rungs_of
from landscape_ray.sweep.searching.measures import check_measure

ONE_OBJECTIVE = ("cmaes",)
"""Samplers that cannot optimise several objectives."""
HUB = "optunahub:"
"""Prefix of samplers from OptunaHub."""
MLFLOW = "mlflow:"
"""Prefix of warm starts that are experiments of the tracking server."""


class AshaConfig(Model):
    """[search.stopping] name = "asha": a trial waits at every rung until it is among the best of it."""

    name: Literal["asha"] = "asha"
    min_steps: int = Field(ge=1)
    """Updates of the first rung; the others are its multiples by powers of reduction_factor."""
    reduction_factor: int = Field(default=3, ge=2)
    """One in so many trials goes on from a rung."""

    def milestones(self, num_steps: int) -> tuple[int, ...]:
        """Return the steps of the rungs."""
        return tuple(rungs_of(self.min_steps, num_steps, self.reduction_factor))

    def build(self, num_steps: int) -> StoppingRule:
        """Return the rule for trials of so many updates."""
        return Asha(self.milestones(num_steps), self.reduction_factor)


class MedianConfig(Model):
    """[search.stopping] name = "median": a trial stops when it is in the worse half of all that came as far."""

    name: Literal["median"] = "median"
    min_steps: int = Field(default=1, ge=1)
    """No trial is stopped before this many updates."""
    min_trials: int = Field(default=4, ge=1)
    """Nor before this many others have come as far."""

    def milestones(self, num_steps: int) -> tuple[int, ...]:
        """Return nothing: every evaluation will do."""
        return ()

    def build(self, num_steps: int) -> StoppingRule:
        """Return the rule."""
        return MedianStop(self.min_steps, self.min_trials)


class ForecastConfig(Model):
    """[search.stopping] name = "forecast": a trial stops when its forecast is unlikely to beat the best so far."""

    name: Literal["forecast"] = "forecast"
    min_steps: int = Field(default=1, ge=1)
    """No trial is stopped before this many updates."""
    min_finished: int = Field(default=3, ge=2)
    """Nor before this many trials have ended with a loss."""
    probability: float = Field(default=0.05, gt=0, le=0.5)
    """Of beating the best final loss, below which a trial is stopped."""

    def milestones(self, num_steps: int) -> tuple[int, ...]:
        """Return nothing: every evaluation will do."""
        return ()

    def build(self, num_steps: int) -> StoppingRule:
        """Return the rule."""
        return ForecastStop(self.min_steps, self.min_finished, self.probability)


StoppingConfig: TypeAlias = Annotated[
    Annotated[AshaConfig, Tag("asha")]
    | Annotated[MedianConfig, Tag("median")]
    | Annotated[ForecastConfig, Tag("forecast")],
    told_by_name(""),
]


class FidelityConfig(Model):
    """[search.fidelity]: every proposal is first tried at the cheapest value of one setting.

    The best go on to the next value as new runs, each with a whole schedule of its own, so that losses compare.
    """

    name: str
    """Dotted name below [train]: num_steps (more tokens), or a width or depth under muP, where learning rates
    transfer."""
    values: list[int] = Field(min_length=2)
    """Increasing; the last one is what is wanted."""
    reduction_factor: int = Field(default=3, ge=2)
    """One in so many trials goes on from a value to the next."""

    @field_validator("values")
    @classmethod
    def _increasing(cls, values: list[int]) -> list[int]:
        if values[0] < 1 or any(after <= before for before, after in pairwise(values)):
            raise ValueError(f"values must increase from at least 1, got {values}; the last one is what is wanted")
        return values

    def build(self) -> Asha:
        """Return the rule: successive halving whose rungs are the values before the last."""
        return Asha(self.values[:-1], self.reduction_factor)


class TrunkConfig(Model):
    """[search.trunk]: trials that are alike until their cooldown share the updates before it.

    The first one that gets so far leaves checkpoints of its stable phase behind; every other trial with the same peak,
    warm-up and everything else starts from the last of them before its own cooldown, and comes out the same to the bit.
    """

    every_steps: int = Field(ge=1)
    """Updates between two checkpoints of a trunk. A branch makes at most this many updates twice."""


class GuardConfig(Model):
    """[search.guard]: proposed peak learning rates are held below the measured limit of stability."""

    probe: str = "auto"
    """Probe that measures the curvature: sharpness for SGD, preconditioned_sharpness for Adam and its kin; auto
    chooses."""
    margin: float = Field(default=1.0, gt=0)
    """Largest learning rate over the limit. Above 1, warm-up is trusted to flatten the landscape on the way."""


class WarmStartConfig(Model):
    """[search.warm_start]: what earlier sweeps know about this space."""

    sources: list[str] = Field(min_length=1)
    """Sweep folders, or "mlflow:<experiment>" for an experiment on this sweep's tracking server."""
    use: Literal["results", "points"] = "results"
    """results: runs that differ from this sweep's in searched values only are told to the sampler as trials.
    points: the best values found there are tried first; model, data and length may be others."""
    num_points: int = Field(default=3, ge=1)
    """For use = "points": how many."""


class SearchConfig(Model):
    """The table [search]: independent trials proposed by an Optuna sampler."""

    sampler: str = "tpe"
    """tpe | random | gp | cmaes | nsgaii | nsgaiii | qmc, or the path package.module:Name of a sampler of yours, or
    optunahub:<package>:<Name>."""
    options: dict[str, Any] = {}
    """Keyword arguments of the sampler, such as n_startup_trials = 10."""
    num_trials: int = Field(ge=1)
    """Proposals; with [search.fidelity], each is one run or more."""
    initial: list[dict[str, Value]] = []
    """Points that are tried first, as values of searched names. At least three schedules at one peak learning rate let
    the annealing law be fitted and tested."""
    objectives: list[str] = ["loss_nats"]
    """What is optimised: loss_nats, best_loss_nats, accuracy (the only one that is maximised), probe/<name> at the end
    of the run, flops, num_tokens, num_params, elapsed_seconds, memory_bytes. Several make a Pareto front."""
    constraints: dict[str, float] = {}
    """Upper bounds of such measures; trials above one are infeasible, which samplers learn to avoid."""
    lag: int | None = Field(default=None, ge=1)
    """Proposal n is made from the results of all trials before n - lag and no others, so that one seed gives one
    sequence however many trials run at a time and in whatever order they end. A lag below their number leaves workers
    idle. Default: every result there is."""
    stopping: StoppingConfig | None = None
    fidelity: FidelityConfig | None = None
    trunk: TrunkConfig | None = None
    guard: GuardConfig | None = None
    warm_start: WarmStartConfig | None = None

    @field_validator("objectives")
    @classmethod
    def _known(cls, objectives: list[str]) -> list[str]:
        if not objectives or len(set(objectives)) < len(objectives):
            raise ValueError(f"objectives must be one or more different measures, got {objectives}; loss_nats is usual")
        for name in objectives:
            _measure(name, "objectives")
        return objectives

    @field_validator("constraints")
    @classmethod
    def _bounded(cls, constraints: dict[str, float]) -> dict[str, float]:
        for name in constraints:
            _measure(name, "constraints")
        return constraints

    @model_validator(mode="after")
    def _consistent(self) -> SearchConfig:
        if len(self.objectives) > 1 and self.sampler in ONE_OBJECTIVE:
            raise ValueError(
                f"search.sampler '{self.sampler}' optimises one objective, got {len(self.objectives)}; "
                "tpe, nsgaii and gp take several"
            )
        if self.stopping is not None and self.fidelity is not None:
            raise ValueError("search must have at most one of stopping and fidelity, got both; choose one")
        early = "stopping" if self.stopping is not None else "fidelity" if self.fidelity is not None else None
        if early is not None:
            if self.objectives != ["loss_nats"]:
                raise ValueError(
                    f"search.{early} needs objectives = ['loss_nats'], got {self.objectives}; it compares losses"
                )
            if self.lag is not None:
                raise ValueError(
                    f"search.lag has no meaning with {early}, which decides by who came first; remove one of them"
                )
        return self


def _measure(name: str, field: str) -> None:
    try:
        check_measure(name, f"search.{field}")
    except UserError as error:
        raise ValueError(str(error)) from None
