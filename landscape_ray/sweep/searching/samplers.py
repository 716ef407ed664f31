"""Optuna's samplers by name, the user's own by dotted path, and those of OptunaHub where that package is installed."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna

from landscape_ray.errors import UserError
from landscape_ray.registry import resolve
from landscape_ray.sweep.searching.config import HUB

START_UP_TRIALS = 5
"""Finished trials before a model-based sampler trusts its model."""

_QUIET = {"warn_independent_sampling": False}
"""Conditional entries are sampled at random by some samplers; a warning at every proposal says it too often."""

_MODEL = {"n_startup_trials": START_UP_TRIALS} | _QUIET

SEARCHERS: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
    "tpe": lambda **options: optuna.samplers.TPESampler(**{"n_startup_trials": START_UP_TRIALS} | options),
    "random": optuna.samplers.RandomSampler,
    "gp": lambda **options: optuna.samplers.GPSampler(**_MODEL | options),
    "cmaes": lambda **options: optuna.samplers.CmaEsSampler(**_MODEL | options),
    "nsgaii": optuna.samplers.NSGAIISampler,
    "nsgaiii": optuna.samplers.NSGAIIISampler,
    "qmc": lambda **options: optuna.samplers.QMCSampler(**{"scramble": True} | _QUIET | options),
}
"""Samplers by name: functions of a seed and of their own options."""

WHOLE_STUDY = ("qmc",)
"""Samplers that are one sequence for the whole study, counted by Optuna under one seed."""


def seed_of_trial(seed: int, number: int) -> int:
    """Return the seed of one trial's sampler: a proposal depends on (seed, number, history), not on the process."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def build_sampler(
    name: str,
    seed: int,
    number: int,
    options: Mapping[str, Any] | None = None,
    fields: tuple[str, str] = ("search.sampler", "search.options"),
) -> optuna.samplers.BaseSampler:
    """Return the sampler for one proposal.

    Args:
        name: a key of SEARCHERS; a path package.module:Name; or optunahub:<package>:<Name>.
        seed: of the sweep.
        number: of the proposal.
        options: keyword arguments beside the seed.
        fields: where name and options stand in the sweep file, for error messages.

    Raises:
        UserError: no such sampler, or it does not take these options.
    """
    field, options_field = fields
    make = _from_hub(name) if name.startswith(HUB) else resolve(name, SEARCHERS, field)
    options = dict(options or {})
    if "seed" in options:
        raise UserError(
            f"{options_field} must not hold a seed, got one; `seed` at the top of the file seeds everything"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = make(seed=seed_of_trial(seed, 0 if name in WHOLE_STUDY else number), **options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{options_field} must be what sampler '{name}' takes beside a seed, got {options} ({error}); "
            f"it takes: {_takes(make)}"
        ) from None
    if not isinstance(sampler, optuna.samplers.BaseSampler):
        raise UserError(
            f"{field} must make an optuna.samplers.BaseSampler, got {type(sampler).__name__} from '{name}'; "
            "give the path of a class or a function that does"
        )
    return sampler


def check_sampler(
    name: str, options: Mapping[str, Any], fields: tuple[str, str] = ("search.sampler", "search.options")
) -> None:
    """Check that a sampler can be made; one of OptunaHub only so far that its package is there.

    Raises:
        UserError: see `build_sampler`.
    """
    if name.startswith(HUB):
        _hub(name)
    else:
        build_sampler(name, 0, 0, options, fields)


def _takes(make: Callable[..., Any]) -> str:
    """Return what options a sampler takes, as far as its signature says."""
    classes = {
        "tpe": optuna.samplers.TPESampler,
        "gp": optuna.samplers.GPSampler,
        "cmaes": optuna.samplers.CmaEsSampler,
        "qmc": optuna.samplers.QMCSampler,
    }
    known = next((classes[name] for name, known in SEARCHERS.items() if known is make and name in classes), make)
    try:
        names = [name for name in inspect.signature(known).parameters if name not in ("seed", "self")]
    except (TypeError, ValueError):
        names = []
    return ", ".join(names) or "nothing"


def _from_hub(name: str) -> Callable[..., optuna.samplers.BaseSampler]:
    """Return a sampler of OptunaHub, which downloads its code: only ever because the sweep file names it.

    Raises:
        UserError: see `_hub`; or there is no such sampler, or no network.
    """
    hub, package, attribute = _hub(name)
    try:
        found: Callable[..., optuna.samplers.BaseSampler] = getattr(hub.load_module(package), attribute)
    except Exception as error:  # a download that failed raises what the network raises
        raise UserError(
            f"search.sampler: OptunaHub has no '{name}' ({error}); check the name and the network"
        ) from None
    return found


def _hub(name: str) -> tuple[Any, str, str]:
    """Return the package optunahub, and which package and name of it are meant.

    Raises:
        UserError: not of the form optunahub:<package>:<Name>, or optunahub is not installed.
    """
    package, _, attribute = name.removeprefix(HUB).partition(":")
    if not package or not attribute:
        raise UserError(
            f"search.sampler from OptunaHub must be optunahub:<package>:<Name>, got '{name}'; "
            "for example optunahub:samplers/auto_sampler:AutoSampler"
        )
    try:
        return importlib.import_module("optunahub"), package, attribute
    except ImportError:
        raise UserError(
            f"search.sampler '{name}' needs the package optunahub, which is not installed; pip install optunahub"
        ) from None
