"""The checklist of a law of loss curves: what was checked, how it came out, and what was recorded."""

from __future__ import annotations

import math

from landscape_ray import text
from landscape_ray.analysis.annealing import SweepFit
from landscape_ray.reports.markup import table

ENOUGH_POINTS, WELL_CONDITIONED, AGREEING = 5.0, 1e6, 0.5
"""Points per parameter, condition number and share of starts from which on a check is passed without objection."""


def checks(saved: SweepFit) -> str:
    """Return the checklist as a table; what did not pass says `read`."""
    fit, certificate = saved.fit, saved.fit.certificate
    points, condition = float(certificate["points_per_parameter"]), float(certificate["condition_number"])
    bounds = [str(name) for name in certificate.get("bounds_hit", [])]
    wide = [reason for reason in fit.reasons if reason.startswith("intervals")]
    num, inside = len(saved.forecasts), sum(one.low <= one.observed_final <= one.high for one in saved.forecasts)
    errors = [abs(one.relative_error) for one in saved.forecasts]
    delta = f", threshold {text.number(fit.objective['huber_delta'])}" if fit.objective.get("huber_delta") else ""
    method = certificate.get("bootstrap", {}).get("method", "none")
    rows = [
        _row(
            "optimum",
            certificate["agree_share"] >= AGREEING and not bounds,
            f"{text.percent(certificate['agree_share'])} of {certificate['num_starts']} starts agree"
            + (f"; at a bound: {', '.join(bounds)}" if bounds else "; no parameter at a bound"),
        ),
        _row(
            "parameters determined",
            condition <= WELL_CONDITIONED and not wide,
            f"condition number {text.number(condition, 3)}" + "".join(f"; {reason}" for reason in wide),
        ),
        _row("enough data", points >= ENOUGH_POINTS, f"{text.number(points, 3)} points a parameter, {_counted(saved)}"),
        _row("residuals", None, _residuals(saved)),
        _row(
            "schedules not seen",
            num > 0 and inside >= math.floor(num * fit.confidence),
            f"{inside} of {num} inside their {text.percent(fit.confidence)} interval; errors "
            f"{text.percent(sum(errors) / num)} on average, {text.percent(max(errors))} at most"
            if num
            else "none was held out",
        ),
        _row("objective", None, f"{fit.objective['name']} of {fit.objective['of']}{delta}"),
        _row("intervals", None, f"{text.percent(fit.confidence)}, from {len(fit.samples)} samples by {method}"),
        _row("choices", None, _choices(saved)),
    ]
    return table(["check", "", "recorded"], rows, texts=(0, 1, 2), wrapped=(2,))


def _row(name: str, passed: bool | None, recorded: str) -> list[str]:
    """Return a row; of what is only recorded, `passed` is None."""
    return [name, "" if passed is None else "passed" if passed else "read", recorded]


def _counted(saved: SweepFit) -> str:
    data = saved.fit.data
    dropped = f", {text.plural(data['num_points_dropped'], 'point')} dropped" if data.get("num_points_dropped") else ""
    return f"{text.plural(data['num_points'], 'point')} of {text.plural(len(saved.run_ids), 'run')}{dropped}"


def _residuals(saved: SweepFit) -> str:
    found = saved.fit.residuals
    return (
        f"root mean square {text.number(found['rmse'], 3)}, largest {text.number(found['max_abs'], 3)}, "
        f"R² {found['r2']:.4f}"
    )


def _choices(saved: SweepFit) -> str:
    decays = (
        f"decay from {text.listing([text.number(decay) for decay in saved.decays])}" if saved.decays else "no decay"
    )
    return f"losses up to step {saved.fit.data['skip_steps']} left out; {decays}; held-out schedule {saved.rule}"
