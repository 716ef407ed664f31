"""Results as tables in a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from landscape_ray.analysis.annealing import SweepFit
from landscape_ray.errors import UserError
from landscape_ray.tables import TextTable
from landscape_ray.text import loss, lr, number

if TYPE_CHECKING:
    from landscape_ray.tracking.folder import SweepFolder

STATUS_STYLE = {"certified": "green", "weak": "yellow", "failed": "red"}


def fit_tables(name: str, result: SweepFit) -> RenderableType:
    """Return a law as two tables: its parameters, and its forecasts of schedules that it did not see."""
    fit = result.fit
    headline = Text.assemble(
        (f"{fit.law} law of {name}: ", "bold"),
        (fit.status, STATUS_STYLE[fit.status]),
        f", {fit.data['num_points']} points of {len(result.run_ids)} runs at peak LR {lr(result.peak_lr)}, "
        f"rmse {fit.residuals['rmse']:.4f} nats",
    )
    parameters = TextTable(("parameter", "value", f"{fit.confidence:.0%} interval"))
    for key, value in fit.parameters.items():
        between = fit.intervals.get(key)
        parameters.add_row(key, number(value), f"{number(between[0])} to {number(between[1])}" if between else "")
    forecasts = TextTable(("held out", "schedule", "observed", "forecast", f"{fit.confidence:.0%} interval", "error"))
    for one in result.forecasts:
        style = "bold" if one.run_id == result.headline else ""
        forecasts.add_row(
            one.run_id,
            result.shapes[one.run_id],
            loss(one.observed_final),
            loss(one.predicted_final),
            f"{loss(one.low)} to {loss(one.high)}",
            f"{one.relative_error:+.2%}",
            style=style,
        )
    notes = [Text(f"not certified: {reason}", style="yellow") for reason in fit.reasons]
    notes += [Text(f"warning: {warning}", style="yellow") for warning in fit.warnings]
    left_out = [Text(left_out_text(result.excluded), style="dim")] if result.excluded else []
    rule = Text(f"bold: {result.rule}", style="dim")
    return Group(headline, parameters, forecasts, rule, *notes, *left_out)


def left_out_text(excluded: Mapping[str, str]) -> str:
    """Return which runs a fit leaves out; with the reasons if there are few, which the report has in any case.

    >>> left_out_text({"t1": "it diverged"})
    'left out: t1 (it diverged)'
    >>> left_out_text({f"t{i}": "it diverged" for i in range(9)})
    'left out: t0, t1, t2, t3, t4, t5, t6, t7, t8; the report says why'
    """
    if len(excluded) <= 3:
        return "left out: " + "; ".join(f"{run_id} ({why})" for run_id, why in sorted(excluded.items()))
    return f"left out: {', '.join(sorted(excluded))}; the report says why"


def sweep_table(folders: Sequence[SweepFolder]) -> TextTable:
    """Return one row a sweep: when, how far, best loss; `damaged` where that cannot be read."""
    table = TextTable(("sweep", "started", "status", "trials ended", "best loss"), right=("trials ended", "best loss"))
    for folder in folders:
        try:
            cells = _progress(folder)
        except (UserError, OSError, ValueError, TypeError, OverflowError):  # or JSON with values of other types
            cells = ("–", "damaged", "–", "–")
        table.add_row(folder.path.name, *cells)
    return table


def _progress(folder: SweepFolder) -> tuple[str, str, str, str]:
    """Return when a sweep was started, its status, trials ended out of those planned, and its lowest final loss.

    Raises:
        UserError: sweep.json or a trial.json is damaged.
    """
    meta = folder.meta
    summaries = [summary for trial in folder.trials() if (summary := trial.summary()) is not None]
    ended = [s for s in summaries if s.status in ("finished", "diverged", "stopped")]
    losses = [s.final_loss_nats for s in ended if s.status == "finished" and math.isfinite(s.final_loss_nats)]
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(meta.get("created_unix", 0))))
    planned = int(meta.get("num_trials", len(summaries)))
    return started, str(meta.get("status")), f"{len(ended)}/{planned}", loss(min(losses, default=math.nan))
