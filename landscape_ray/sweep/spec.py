"""One file, one sweep: the TOML file as a validated `SweepSpec`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from landscape_ray.config import Model, flatten, parse, read_toml, with_values
from landscape_ray.domains import Domain, Value, allowed, applies, in_order
from landscape_ray.errors import UserError
from landscape_ray.populations.strategies import Iterated
from landscape_ray.sweep.population.config import PopulationConfig, build_strategy
from landscape_ray.sweep.resources import ResourcesConfig
from landscape_ray.sweep.searching.config import MLFLOW, AshaConfig, FidelityConfig, SearchConfig
from landscape_ray.sweep.searching.knots import expand, is_knots
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.training import TrainConfig
from landscape_ray.training.cohort import check_shared
from landscape_ray.training.parallel import check_parts

SOURCES = ("data.source", "data.base.source")
"""Searchable fields that hold paths."""
BUILT_IN = ("stdlib", "digits")
"""Sources that are no paths."""

FIXED_IN_TRAINING = ("num_steps", "optimizer.name", "averaging.name")
"""What members of a population cannot change, beside model, data, loss and evaluation."""

CHANGES = "changes"
"""Entry of sweep.json: what was changed when the sweep was extended, by dotted name."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class CohortConfig(Model):
    """The table [cohort]: trials of a search that one process trains together, as one vectorised program."""

    num_members: int = Field(default=8, ge=2)
    """Trials in a cohort. The sampler proposes them together, before any of them has a result."""
    route: Literal["auto", "recorded", "abreast", "stacked", "vmap", "single", "alone"] = "auto"
    """How gradients of several members are computed; auto measures what is fastest when a cohort starts. Results of
    different routes differ in the last bits: name one for runs that repeat to the bit."""


class SweepSpec(Model):
    """A sweep file."""

    name: str
    description: str = ""
    experiment: str = Field(default="landscape_ray", min_length=1)
    """MLflow experiment that the sweep goes to."""
    seed: int = Field(default=0, ge=0)
    vary_seed: bool | None = None
    """Whether trials differ in initial weights and order of data. Default: populations yes, searches no, so that
    schedules are compared on the same draws."""
    commit_steps: int = Field(default=50, ge=1)
    """Updates between two checkpoints of a trial; at most this much work is lost when a machine dies."""
    system_seconds: float = Field(default=10.0, ge=0)
    """Least time between two samples of what a trial's process and its machine are doing (processors, memory, device),
    which MLflow shows among its system metrics; 0 for none."""
    train: dict[str, Any]
    """The fixed values of every run, as a TrainConfig without `seed`."""
    space: dict[str, Domain] = {}
    """Searched names (dotted, below [train]) and their domains."""
    search: SearchConfig | None = None
    population: PopulationConfig | None = None
    cohort: CohortConfig | None = None
    resources: ResourcesConfig = ResourcesConfig()

    @field_validator("space", mode="before")
    @classmethod
    def _knots_taken_apart(cls, space: Any) -> Any:
        """Replace an entry of knots by one entry for each of their coordinates."""
        if not isinstance(space, Mapping):
            return space
        found: dict[str, Any] = {}
        for name, entry in space.items():
            found |= expand(name, entry) if is_knots(entry) else {name: entry}
        return found

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(f"name must be letters, digits, '.', '_' or '-', got '{name}'")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> SweepSpec:
        if self.search is not None and self.population is not None:
            raise ValueError("a sweep must have one of [search] and [population], got both; split it into two files")
        if "seed" in self.train:
            raise ValueError("train.seed must not be given; set `seed` at the top of the file, it seeds every run")
        if "loss.name" in self.space:
            raise ValueError("space.loss.name cannot be searched: different losses do not compare; choose one")
        if "seed" in self.space:
            raise ValueError("space.seed cannot be searched; `vary_seed = true` gives every trial a seed of its own")
        order = list(in_order(self.space))
        train = self._check_train(order)
        if self.search is not None:
            self._check_initial(self.search, order)
            self._check_search(self.search, train)
        if self.population is not None:
            self._check_population(self.population, train)
        if self.cohort is not None:
            self._check_cohort(train)
        _check_with_optuna(self)
        if train.device == "cuda" and self.resources.gpus_per_trial == 0 and (self.search or self.population):
            raise ValueError(
                "train.device 'cuda' needs resources.gpus_per_trial > 0, got 0; a share such as 0.25 will do"
            )
        return self

    def _check_train(self, order: list[tuple[str, Domain]]) -> TrainConfig:
        """Validate [train] under the extremes of every domain; return it under the first ones."""
        first = self.first_values()
        config = self._train_config(first, "[train]" if not self.space else "[train] with values of [space]")
        for name, domain in order:
            for value in domain.extremes:
                self._train_config(self.point_with(name, value), f"space.{name} = {value!r}")
        return config

    def _train_config(self, values: dict[str, Value], source: str) -> TrainConfig:
        try:
            config = parse(TrainConfig, with_values(self.train, values), source)
            check_parts(config, self.resources.workers)
            return config
        except UserError as error:
            raise ValueError(str(error)) from None

    def _check_initial(self, search: SearchConfig, order: list[tuple[str, Domain]]) -> None:
        if len(search.initial) > search.num_trials:
            raise ValueError(
                f"search.initial must have at most num_trials = {search.num_trials} points, got {len(search.initial)}"
            )
        for number, point in enumerate(search.initial):
            for name, value in point.items():
                if name not in self.space:
                    raise ValueError(
                        f"search.initial[{number}] names '{name}', which is not searched; "
                        f"searched: {', '.join(self.space)}"
                    )
                if not self.space[name].contains(value):
                    raise ValueError(
                        f"search.initial[{number}].{name} must lie in its domain {self.space[name].extremes}, "
                        f"got {value!r}"
                    )
            chosen = {name: value for name, value in point.items() if applies(self.space[name], point)}
            missing = [name for name, domain in order if applies(domain, chosen) and name not in chosen]
            if missing:
                raise ValueError(
                    f"search.initial[{number}] lacks '{missing[0]}'; give every searched value that applies"
                )

    def _check_search(self, search: SearchConfig, train: TrainConfig) -> None:
        """Check what the tables below [search] ask of the runs."""
        measured = [name for name in (*search.objectives, *search.constraints) if name.startswith("probe/")]
        for name in measured:
            if (probe := name.split("/")[1]) not in train.probes.tables:
                known = ", ".join(train.probes.tables) or "none"
                raise ValueError(f"search: '{name}' needs [train.probes.{probe}], configured: {known}; add that table")
        if search.stopping is not None:
            for name in ("num_steps", "eval.every_steps"):
                if name in self.space:
                    raise ValueError(
                        f"space.{name} cannot be searched with search.stopping, which compares equal steps"
                    )
            for step in search.stopping.milestones(train.num_steps):
                if step % train.eval.every_steps:
                    raise ValueError(
                        f"search.stopping.min_steps must be a multiple of train.eval.every_steps = "
                        f"{train.eval.every_steps}, got {step}; rungs are decided on a fresh evaluation"
                    )
            if isinstance(search.stopping, AshaConfig) and search.stopping.min_steps >= train.num_steps:
                raise ValueError(
                    f"search.stopping.min_steps must be below train.num_steps = {train.num_steps}, "
                    f"got {search.stopping.min_steps}; lower it, or remove search.stopping"
                )
        if search.fidelity is not None:
            self._check_fidelity(search.fidelity, train)
        if search.trunk is not None and "wsd" not in self._schedules(train):
            raise ValueError(
                f"search.trunk needs schedules with a stable phase, got {self._schedules(train)}; search or set 'wsd'"
            )
        if self.cohort is not None:
            for field in ("stopping", "fidelity", "trunk", "guard"):
                if getattr(search, field) is not None:
                    raise ValueError(f"search.{field} cannot be used with [cohort], which trains trials side by side")

    def _schedules(self, train: TrainConfig) -> list[Value]:
        domain = self.space.get("schedule.name")
        return [train.schedule.name] if domain is None else domain.extremes

    def _check_fidelity(self, fidelity: FidelityConfig, train: TrainConfig) -> None:
        if fidelity.name in self.space:
            raise ValueError(
                f"search.fidelity.name '{fidelity.name}' must not be searched as well; remove it from [space]"
            )
        if fidelity.name == "eval.every_steps":
            raise ValueError(
                "search.fidelity.name 'eval.every_steps' is no fidelity; num_steps or a size of the model is"
            )
        if fidelity.name.startswith("model.") and getattr(train.model, "parametrisation", "mup") != "mup":
            raise ValueError(
                f"search.fidelity over {fidelity.name} needs train.model.parametrisation = 'mup', got "
                f"'{getattr(train.model, 'parametrisation', None)}'; else the best learning rate moves with it"
            )
        if fidelity.name == "model.depth" and getattr(train.model, "base_depth", 1) is None:
            raise ValueError("search.fidelity over model.depth needs train.model.base_depth; set it to the first depth")
        for value in fidelity.values:
            self._train_config({**self.first_values(), fidelity.name: value}, f"search.fidelity.values {value}")

    def _check_population(self, population: PopulationConfig, train: TrainConfig) -> None:
        if not self.space:
            raise ValueError("a population needs at least one entry in [space]; name what the members may change")
        for name, domain in self.space.items():
            if name in FIXED_IN_TRAINING or name.split(".")[0] in ("model", "data", "loss", "eval"):
                raise ValueError(f"space.{name} cannot change during training; search it with [search] instead")
            if domain.when:
                raise ValueError(f"space.{name}.when has no meaning in a population; remove it")
        if population.interval_steps % train.eval.every_steps:
            raise ValueError(
                f"population.interval_steps must be a multiple of train.eval.every_steps = {train.eval.every_steps}, "
                f"got {population.interval_steps}; decisions are made on a fresh evaluation"
            )
        try:
            strategy = build_strategy(
                population,
                self.space,
                num_steps=train.num_steps,
                schedule=train.schedule.build(train.num_steps),
                seed=self.seed,
                initial=population.initial,
            )
        except UserError as error:
            raise ValueError(str(error)) from None
        interval = population.interval_steps
        while isinstance(strategy, Iterated) and (interval := round(strategy.growth * interval)) < train.num_steps:
            if interval % train.eval.every_steps:
                raise ValueError(
                    f"population.options.growth must keep intervals multiples of train.eval.every_steps = "
                    f"{train.eval.every_steps}, got {strategy.growth:g}; whole numbers do"
                )
            if strategy.growth == 1:
                break

    def _check_cohort(self, train: TrainConfig) -> None:
        """Check that all trials of a search can be members of one cohort."""
        if self.search is None:
            raise ValueError("a sweep with [cohort] must have a [search] table; the cohort is made of its trials")
        if (workers := self.resources.workers) > 1:
            raise ValueError(
                f"resources.workers must be 1 with [cohort], which trains many models in one process, got {workers}; "
                "remove one of them"
            )
        for name, domain in self.space.items():
            for value in domain.extremes:
                other = self._train_config(self.point_with(name, value), f"space.{name}")
                try:
                    check_shared(train, other, 1)
                except UserError as error:
                    raise ValueError(f"space.{name} cannot be searched with [cohort]: {error}") from None

    def first_values(self) -> dict[str, Value]:
        """Return the first extreme of every domain that applies."""
        first: dict[str, Value] = {}
        for name, domain in in_order(self.space):
            if applies(domain, first):
                first[name] = domain.extremes[0]
        return first

    def point_with(self, name: str, value: Value) -> dict[str, Value]:
        """Return a point of the space in which one domain has this value: conditions met, else the first extremes."""
        wanted, pending = {name: value}, [name]
        while pending:
            for other, needed in self.space[pending.pop()].when.items():
                if other not in wanted:
                    wanted[other] = allowed(needed)[0]
                    pending.append(other)
        point: dict[str, Value] = {}
        for other, domain in in_order(self.space):
            if applies(domain, point):
                point[other] = wanted.get(other, domain.extremes[0])
        return point

    def train_config(self, values: dict[str, Value], index: int) -> TrainConfig:
        """Return the configuration of trial number `index` under the searched `values`."""
        vary = self.vary_seed if self.vary_seed is not None else self.population is not None
        seed = int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0]) if vary else self.seed
        data = with_values(self.train, {**values, "seed": seed})
        return parse(TrainConfig, data, f"trial {index} of sweep '{self.name}'")

    @property
    def num_steps(self) -> int:
        """Updates of a trial, where that is not searched."""
        return int(self.train["num_steps"])

    @property
    def milestones(self) -> tuple[int, ...]:
        """Steps at which every trial reports and waits for a verdict."""
        stopping = self.search.stopping if self.search is not None else None
        return () if stopping is None else stopping.milestones(self.num_steps)

    @property
    def num_trials(self) -> int:
        """How many runs the sweep has."""
        if self.search is not None:
            return self.search.num_trials
        return self.population.num_members if self.population is not None else 1

    def params(self) -> dict[str, Any]:
        """Return the whole file under dotted names."""
        return flatten(self.model_dump(mode="json", exclude_none=True))


def _check_with_optuna(spec: SweepSpec) -> None:
    """Check what can only be checked by making it: samplers and guard. Where Optuna is missing, no sweep can run."""
    search, population = spec.search, spec.population
    wanted: dict[str, Any] = {} if search is None else {"search": search}
    if population is not None:
        both = {"population.initialiser": population.initialiser, "population.explorer": population.explorer}
        wanted |= {field: table for field, table in both.items() if table is not None}
    if not wanted or importlib.util.find_spec("optuna") is None:
        return
    from landscape_ray.sweep.searching.samplers import check_sampler  # here: importing Optuna takes a while

    try:
        for field, table in wanted.items():
            check_sampler(table.sampler, table.options, (f"{field}.sampler", f"{field}.options"))
        if search is not None and search.guard is not None:
            from landscape_ray.sweep.searching.guard import check_guard

            check_guard(spec)
    except UserError as error:
        raise ValueError(str(error)) from None


def read_spec(path: Path) -> tuple[SweepSpec, str]:
    """Return the sweep described by a TOML file, and the file's text.

    Raises:
        UserError: no such file, not TOML, or values that don't fit.
    """
    data = read_toml(path)
    return parse(SweepSpec, data, str(path)), path.read_text(encoding="utf-8")


def spec_of(folder: SweepFolder) -> SweepSpec:
    """Return the sweep that a folder was made for, as it was extended since.

    A relative path of data means what it meant where the sweep was launched: trials run in other working directories,
    and a resume may.
    """
    meta = folder.meta
    spec = parse(SweepSpec, with_values(read_toml(folder.spec_path), meta.get(CHANGES, {})), str(folder.spec_path))
    launched_in = Path(meta.get("launched_in", folder.path))

    def absolute(source: Any) -> Any:
        return source if source in BUILT_IN else str(launched_in / Path(source).expanduser())

    def anchored(data: dict[str, Any]) -> dict[str, Any]:
        """Return a table [train.data] with absolute paths, also in the data that it is based on."""
        known = {
            "source": absolute,
            "shifts": lambda shifts: {name: absolute(source) for name, source in shifts.items()},
            "base": anchored,
        }
        return {key: known[key](value) if key in known else value for key, value in data.items()}

    train, space, search = dict(spec.train), dict(spec.space), spec.search
    if "data" in train:
        train["data"] = anchored(train["data"])
    if search is not None and search.warm_start is not None:
        sources = [each if each.startswith(MLFLOW) else absolute(each) for each in search.warm_start.sources]
        search = search.model_copy(update={"warm_start": search.warm_start.model_copy(update={"sources": sources})})
    for name in SOURCES:
        if (domain := space.get(name)) is not None and domain.choices is not None:
            space[name] = domain.model_copy(update={"choices": [absolute(choice) for choice in domain.choices]})
            if search is not None:
                initial = [{**p, name: absolute(p[name])} if name in p else p for p in search.initial]
                search = search.model_copy(update={"initial": initial})
    return spec.model_copy(update={"train": train, "space": space, "search": search})
