"""How a sweep is doing, read from its folder alone: for another terminal, another machine, or after the fact."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.text import Text

from landscape_ray.config import read_toml, with_values
from landscape_ray.errors import UserError
from landscape_ray.records import RunSummary
from landscape_ray.sweep.disk import usage_of, usage_text
from landscape_ray.sweep.display import Row, duration, headline, to_do_seconds, trial_table
from landscape_ray.sweep.population.book import failure_text, failures_of
from landscape_ray.sweep.run import trial_id_of
from landscape_ray.tracking.driver_mirror import storage_line
from landscape_ray.tracking.folder import SweepFolder, TrialFolder
from landscape_ray.tracking.parts import read_part

MAX_FAILURES = 8
"""Failures of members of a population that are shown, the latest."""

QUIET_SECONDS = 600.0
"""A running sweep that has committed nothing for this long may have lost its driver."""


def status_of(folder: SweepFolder) -> tuple[str, RenderableType]:
    """Return the sweep's status, and what to print about it: a line on the whole, its trials, and what to do next."""
    meta = folder.meta
    status = str(meta.get("status", "unknown"))
    rows, unreadable, unit = {}, [], "nats/token"
    for trial in folder.trials():
        try:
            summary = trial.summary()
        except UserError as error:
            unreadable.append(str(error))
            continue
        if summary is not None:
            rows[trial.trial_id] = _row(trial, summary)
            unit = summary.loss_unit
    planned = int(meta.get("num_trials", len(rows)))
    commits = [trial.commit_path for trial in folder.trials()]
    latest = max((path.stat().st_mtime for path in commits if path.exists()), default=0.0)
    started = float(meta.get("created_unix", math.nan))
    ended = float(meta.get("ended_unix", math.nan))
    running = status in ("running", "pending")
    spent = (time.time() if running or not math.isfinite(ended) else ended) - started
    # a sweep that was resumed has rested for a while, so the clock says nothing about its speed
    left, done = math.nan, sum(row.step for row in rows.values())
    if running and done and int(meta.get("attempts", 1)) <= 1:
        steps = max(row.num_steps for row in rows.values())
        left = to_do_seconds(rows.values(), planned, steps, done, spent)
    said = [Text(headline(folder.path.name, rows.values(), planned, unit, spent, left), style="bold")]
    quiet = time.time() - latest if latest else math.nan
    news = f", last commit {duration(quiet)} ago" if running and math.isfinite(quiet) else ""
    said.append(Text(f"{status}{news}", style="dim"))
    said.append(Text(f"{usage_text(usage_of(folder.path))}{_limit(folder)}", style="dim"))
    if stored := storage_line(folder):
        said.append(Text(stored, style="dim"))
    if running and quiet > QUIET_SECONDS:
        hint = f"if its driver was killed: landscape-ray resume {folder.path.name}"
        said.append(Text(hint, style="yellow"))
    elif status in ("interrupted", "incomplete"):
        said.append(Text(f"to go on: landscape-ray resume {folder.path.name}", style="yellow"))
    problems = [Text(problem, style="yellow") for problem in unreadable]
    problems += [Text(failure, style="yellow") for failure in _failures(folder, rows)]
    return status, Group(*said, trial_table(rows.values()), *problems)


def watch(folder: SweepFolder, console: Console, every_seconds: float) -> None:
    """Show the status until the sweep has ended, anew every few seconds."""
    from rich.live import Live

    status, shown = status_of(folder)
    with Live(shown, console=console, auto_refresh=False) as live:
        while status in ("running", "pending"):
            time.sleep(every_seconds)
            status, shown = status_of(folder)
            live.update(shown, refresh=True)


def _failures(folder: SweepFolder, rows: Mapping[str, Row]) -> list[str]:
    """Return what members of a population failed of: those that were replaced, and those that are left out still."""
    left_out = {trial_id for trial_id, row in rows.items() if row.status == "failed"}
    found = {  # the last time of one that was left out, tried again and left out again
        (one.member, one.step, one.donor): failure_text(one)
        for one in failures_of(folder)
        if one.donor is not None or trial_id_of(one.member) in left_out
    }
    return list(found.values())[-MAX_FAILURES:]


def _limit(folder: SweepFolder) -> str:
    """Return the bound on what the sweep may take of the disk, as it was extended since; empty for none."""
    with contextlib.suppress(UserError, AttributeError):
        resources = with_values(read_toml(folder.spec_path), folder.meta.get("changes", {})).get("resources", {})
        if (bound := resources.get("max_disk_gib")) is not None:
            return f", of at most {bound:g} GiB"
    return ""


def _row(trial: TrialFolder, summary: RunSummary) -> Row:
    row = Row(summary.run_id, summary.num_steps, summary.varied, summary.status, summary.step)
    row.loss_nats = summary.final_loss_nats
    if summary.status == "running":
        with contextlib.suppress(UserError, OSError):  # it is being written
            row.lr = _last_lr(trial)
    return row


def _last_lr(trial: TrialFolder) -> float:
    """Return the learning rate of the last update that is committed, nan without one in the last part."""
    if not (count := trial.num_parts()):
        return math.nan
    rates = np.asarray(read_part(trial.part_path(count - 1))["lr"].to_numpy(), dtype=np.float64)
    rates = rates[np.isfinite(rates)]
    return float(rates[-1]) if len(rates) else math.nan
