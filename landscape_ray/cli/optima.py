"""What the verbs of the laws do for the step law: the best learning rate and batch of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from landscape_ray.cli.shared import new_console, warn
from landscape_ray.errors import UserError

if TYPE_CHECKING:
    from landscape_ray.analysis.scaling import ScalingFit


def refuse_options(objective: str, delta: float, compare: list[str] | None) -> None:
    """Refuse what has no meaning for the step law.

    Raises:
        UserError: says which, and why.
    """
    if objective != "huber" or delta != 1e-3:
        raise UserError(
            f"--objective and --delta must be left out for law step_law, got {objective} {delta:g}: it takes least "
            "squares over the runs near the optimum, and shows what others give"
        )
    if compare:
        raise UserError(
            f"--compare must be left out for law step_law, got {compare[0]}: it is compared with --fix r=0 by itself"
        )


def predict_step(found: ScalingFit, values: Mapping[str, float], extrapolate: bool) -> None:
    """Print the best learning rate and batch, and what those that are given cost."""
    from landscape_ray.analysis.optima import cost, plan
    from landscape_ray.reports.step_tables import prediction_text

    console = new_console()
    asked = "lr" in values
    at = {name: value for name, value in values.items() if not (asked and name in ("lr", "batch"))}
    best = plan(found, at, allow_extrapolation=extrapolate)
    excess = cost(found, values, allow_extrapolation=extrapolate) if asked else None
    console.print(prediction_text(best, excess, dict(values)), highlight=False, soft_wrap=True)
    warn(console, best.warnings)


def recommend_step(found: ScalingFit, values: Mapping[str, float], extrapolate: bool) -> None:
    """Print the learning rate and batch to train with, as a piece of a sweep file.

    Raises:
        UserError: a learning rate is given.
    """
    from landscape_ray.analysis.optima import plan
    from landscape_ray.reports.step_tables import plan_text

    if "lr" in values:
        raise UserError(
            f"--set lr is what is recommended, got {values['lr']:g}; what it costs is said by `landscape-ray predict`"
        )
    best = plan(found, values, allow_extrapolation=extrapolate)
    console = new_console()
    console.print(plan_text(best), highlight=False, markup=False, soft_wrap=True)
    warn(console, best.warnings)


def load_step(path: Path) -> ScalingFit:
    """Return the fit of a step law at a path.

    Raises:
        UserError: there is none, or it is of another law.
    """
    from landscape_ray.analysis.scaling import load
    from landscape_ray.laws.optima.surface import NAME as STEP_LAW

    found = load(path)
    if found.law_path != STEP_LAW:
        raise UserError(f"--with must be a fit of law {STEP_LAW}, got one of '{found.law_path}' at {path}")
    return found
