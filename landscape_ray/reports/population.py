"""A population: the family tree of its weights, and the schedule that each survivor saw beside the WSD baseline."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from landscape_ray import text
from landscape_ray.analysis.runs import Run, setting
from landscape_ray.reports.charts import STEP, describe, lr_axis, view_of_losses
from landscape_ray.reports.figures import Axis, Figure, Floats, Panel, Series, series, thin
from landscape_ray.reports.lineage import Exploit, Segment, ancestry, ancestry_evals, ancestry_lr
from landscape_ray.reports.markup import table
from landscape_ray.reports.views import Sweep, label, loss_unit
from landscape_ray.schedules import Points, Schedule

WINNER, SURVIVOR, GIVEN_UP, BASELINE = "c1", "c0", "muted", "c2"

COOLDOWN_FRACTION = 0.2
"""Of a WSD baseline that nobody trained."""

MAX_REPLACED = 4
"""Members replaced after a failure that are spoken of one by one."""

LEAN = 0.012
"""Share of the updates by which an arrow leans: those of one moment then part at their donors."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Survivor:
    """A member at the end, with the history of its weights."""

    run: Run
    path: tuple[Segment, ...]
    steps: Floats
    lr: Floats
    """Learning rates that its weights went through, whoever trained them, in the updates `steps`."""
    eval_steps: Floats
    losses: Floats

    @property
    def chain(self) -> str:
        """Whose hands the weights went through."""
        return " → ".join(segment.run_id for segment in self.path)

    @property
    def num_copies(self) -> int:
        """How often the weights were copied on the way."""
        return len(self.path) - 1


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Baseline:
    """Warm-up, stable phase, decay: what a population has to be better than."""

    name: str
    steps: Floats
    lr: Floats
    run: Run | None
    """The run that trained it; None where none of the sweeps shown has one under the same setting."""


def survivors(sweep: Sweep) -> list[Survivor]:
    """Return the members of a population with what their weights went through, the lowest final loss first."""
    runs = {run.run_id: run for run in sweep.runs if len(run.all_steps["step"])}
    found = []
    for run in sorted(runs.values(), key=lambda run: (math.isnan(run.loss), run.loss, run.run_id)):
        path = ancestry(sweep.copies, run.run_id, run.summary.step)
        (steps, rates), (at, losses) = ancestry_lr(runs, path), ancestry_evals(runs, path)
        found.append(Survivor(run=run, path=tuple(path), steps=steps, lr=rates, eval_steps=at, losses=losses))
    return found


def baseline(sweeps: Sequence[Sweep], sweep: Sweep) -> Baseline | None:
    """Return the best run with a WSD schedule in the winner's setting, else that schedule at the winner's peak."""
    winner = sweep.best or next(iter(sweep.runs), None)
    if winner is None:
        return None
    alike = [
        (one, run)
        for one in sweeps
        for run in one.finished
        if run.shape == "wsd" and run.summary.num_steps == winner.summary.num_steps and setting(run) == setting(winner)
    ]
    if alike:
        owner, run = min(alike, key=lambda pair: pair[1].loss)
        name = f"best WSD: {label(sweeps, owner, run.run_id)}"
        return Baseline(name=name, steps=run.steps["step"], lr=run.steps["lr"], run=run)
    num_steps = winner.summary.num_steps
    if num_steps <= winner.warmup_steps or not winner.peak_lr > 0:
        return None
    shape = {"warmup_steps": winner.warmup_steps, "cooldown_fraction": COOLDOWN_FRACTION}
    values = Schedule(name="wsd", peak=winner.peak_lr, num_steps=num_steps, **shape).values()  # type: ignore[arg-type]
    steps = np.arange(1, num_steps + 1, dtype=np.float64)
    return Baseline(name="WSD at the winner's peak (not trained)", steps=steps, lr=values, run=None)


def lineage(sweeps: Sequence[Sweep], sweep: Sweep) -> Figure | str:
    """Return a population's family tree over the schedules that its survivors saw, and their losses."""
    alive = survivors(sweep)
    if not alive:
        return f"No member of {sweep.name} has recorded an update; a sweep with [population] fills this figure."
    beside = baseline(sweeps, sweep)
    winner = alive[0] if sweep.best is not None else None
    unit = loss_unit([sweep])
    rates, losses = _curves(alive, winner, beside)
    names = tuple(f"{one.run.run_id}  {text.loss(one.run.loss)}" for one in alive)
    compared = [one.run for one in alive] + ([beside.run] if beside is not None and beside.run is not None else [])
    axis = Axis(label="held-out loss", unit=unit, limits=view_of_losses(compared))
    measured = beside is not None and beside.run is not None
    note = (
        "Each row is a member, each arrow a copy: the member at the tip takes over the weights of the one at the foot "
        "at that step and changes its values. Below, every curve follows weights, not members: what those that are "
        "alive at the end saw since they were drawn."
    )
    if beside is not None and not measured:
        note += (
            f" No run with a WSD schedule stands beside this population: the dashed one, with a cooldown over the last "
            f"{text.percent(COOLDOWN_FRACTION)}, was not trained. `landscape-ray report {sweep.name} SEARCH` shows the "
            "best one of a search."
        )
    note += "".join(f" {said}." for said in _replaced(sweep))
    return Figure(
        key=f"lineage-{list(sweeps).index(sweep)}" if len(sweeps) > 1 else "lineage",
        title="Lineage of the population and the schedule that it found",
        takeaway=_takeaway(sweep, winner, beside),
        x=STEP,
        panels=(
            Panel(y=Axis(label="member, final loss", categories=names), series=tuple(_tree(sweep, alive, winner))),
            Panel(y=lr_axis(compared), series=tuple(rates), share=0.9),
            Panel(y=axis, series=tuple(losses), share=0.9),
        ),
        note=note,
    )


def _replaced(sweep: Sweep) -> list[str]:
    """Return which members took over weights because they had failed, the latest ones, each in a few words."""
    failed = [copy for copy in sweep.copies if copy.reason.startswith("failed: ")]
    said = [
        f"{copy.run_id} failed and was replaced by a copy of {copy.donor} at step {copy.step:,} "
        f"({copy.reason.removeprefix('failed: ')})"
        for copy in failed[-MAX_REPLACED:]
    ]
    if (earlier := len(failed) - MAX_REPLACED) > 0:
        said.insert(0, f"{earlier:,} more failed and were replaced before")
    return said


def _tree(sweep: Sweep, alive: Sequence[Survivor], winner: Survivor | None) -> list[Series]:
    """Return the rows of the members, what of them is alive at the end, and the copies between them."""
    rows = {one.run.run_id: float(row) for row, one in enumerate(alive)}
    drawn: list[Series] = []
    for one in alive:
        step, lives = one.run.all_steps["step"], one.run.lives
        said = describe(one.run, one.run.run_id)
        for life in np.unique(lives):
            inside = step[lives == life]
            ends = [float(inside.min()) - 1, float(inside.max())]
            style = {"color": GIVEN_UP, "weight": "muted", "dash": "dot", "name": "given up", "hover": said}
            drawn.append(series("line", ends, [rows[one.run.run_id]] * 2, **style))
    for one in sorted(alive, key=lambda one: one is winner):  # the winner last, on top
        style = {"name": "alive at the end", "color": SURVIVOR}
        if one is winner:
            style = {"name": "weights of the winner", "color": WINNER, "weight": "main"}
        drawn += [
            series("line", [segment.start, segment.stop], [rows[segment.run_id]] * 2, **style)
            for segment in one.path
            if segment.run_id in rows
        ]
    inherited = {(s.run_id, s.start) for one in alive for s in one.path if s.life}
    won = {(s.run_id, s.start) for s in winner.path if s.life} if winner is not None else set()
    lean = LEAN * max(one.run.summary.num_steps for one in alive)
    by_color: dict[str, list[Exploit]] = {GIVEN_UP: [], SURVIVOR: [], WINNER: []}
    for copy in sweep.copies:
        if copy.run_id in rows and copy.donor in rows:
            key = (copy.run_id, copy.step)
            by_color[WINNER if key in won else SURVIVOR if key in inherited else GIVEN_UP].append(copy)
    for color, copies in by_color.items():
        for copy in copies:
            ends = [rows[copy.donor], rows[copy.run_id]]
            at = [max(copy.step - lean, 0.0), float(copy.step)]
            drawn.append(series("arrow", at, ends, name="copy", color=color, size=10))
        if copies:
            steps, levels = [copy.step for copy in copies], [rows[copy.run_id] for copy in copies]
            told = tuple(_told(copy) for copy in copies)
            drawn.append(series("points", steps, levels, name="copy", color=color, size=7, hover=told))
    return drawn


def _told(copy: Exploit) -> str:
    """Return a copy of weights in one line."""
    values = ", ".join(f"{name.rpartition('.')[2]} {text.value(item)}" for name, item in copy.values.items())
    why = f" ({copy.reason})" if copy.reason else ""
    return f"{copy.run_id} copies {copy.donor} at step {copy.step:,}{why}" + (f" → {values}" if values else "")


def _curves(
    alive: Sequence[Survivor], winner: Survivor | None, beside: Baseline | None
) -> tuple[list[Series], list[Series]]:
    """Return learning rates and losses along the weights of every survivor, the winner's on top, and the baseline's."""
    rates: list[Series] = []
    losses: list[Series] = []
    for one in sorted(alive, key=lambda one: one is winner):
        name = one.run.run_id
        said = f"{name}: weights by way of {one.chain}" if one.num_copies else f"{name}: its own weights throughout"
        style = {"color": SURVIVOR, "weight": "muted", "name": "alive at the end", "hover": said}
        if one is winner:
            style |= {"color": WINNER, "weight": "main", "name": "weights of the winner"}
        rates.append(series("line", *_bent(one.steps, one.lr), **style))
        losses.append(series("line", *thin(one.eval_steps, one.losses), **style))
    if beside is not None:
        style = {"color": BASELINE, "dash": "dash", "name": beside.name, "hover": beside.name}
        rates.append(series("line", *_bent(beside.steps, beside.lr), **style))
        if beside.run is not None:
            losses.append(series("line", beside.run.evals["step"], beside.run.evals["loss_nats"], **style))
    return rates, losses


def _bent(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Return the points of a curve between which it is straight, or where that are many a selection of its points.

    A warm-up is drawn as the line that it is, and a change from one update to the next as upright.
    """
    kept = _bends(values)
    return thin(steps[kept], values[kept])


def _bends(values: Floats, tolerance: float = 1e-6) -> NDArray[np.intp]:
    """Return the indices of a curve's ends, and of the updates where it bends by more than a share of its peak."""
    if len(values) < 3:
        return np.arange(len(values))
    inner = np.flatnonzero(np.abs(np.diff(values, n=2)) > tolerance * float(values.max())) + 1
    return np.concatenate([[0], inner, [len(values) - 1]])


def _takeaway(sweep: Sweep, winner: Survivor | None, beside: Baseline | None) -> str:
    copies = text.plural(len(sweep.copies), "copy")
    if winner is None:
        return f"{copies} of weights so far; no member has finished."
    seen = ""
    if len(winner.lr):
        after = winner.lr[min(winner.run.warmup_steps, len(winner.lr) - 1)]
        seen = f"; after the warm-up its learning rate went from {text.lr(after)} to {text.lr(winner.lr[-1])}"
        if math.isclose(after, winner.lr[-1], rel_tol=1e-3):
            seen = f"; after the warm-up its learning rate began and ended at {text.lr(after)}"
    name = winner.run.run_id
    if winner.num_copies:
        told = f"After {copies} of weights the winner's came by way of {winner.chain}{seen}."
    else:
        told = f"{copies.capitalize()} of weights, but the winner {name} never copied another member{seen}."
    if beside is None or beside.run is None:
        return told
    gap = winner.run.loss - beside.run.loss
    far = f"{text.loss(abs(gap))} {loss_unit([sweep])}".strip()
    return f"{told} It ends {far} {'above' if gap > 0 else 'below'} the best run with a WSD schedule."


def survivors_table(sweeps: Sequence[Sweep], sweep: Sweep) -> str:
    """Return what every member's final weights went through, as a table, and the winner's schedule as TOML."""
    alive = survivors(sweep)
    if not alive:
        return ""
    beside = baseline(sweeps, sweep)
    measured = beside.run if beside is not None else None
    unit = f" ({loss_unit([sweep])})" if loss_unit([sweep]) else ""
    columns = ["member", f"final loss{unit}", "weights by way of", "copies", "LR at first", "highest", "at the end"]
    columns += ["against WSD"] if measured is not None else []
    rows = []
    for one in alive:
        first = float(one.lr[min(one.run.warmup_steps, len(one.lr) - 1)]) if len(one.lr) else math.nan
        ends = [first, float(one.lr.max()), float(one.lr[-1])] if len(one.lr) else [math.nan] * 3
        cells = [one.run.run_id, text.loss(one.run.loss), one.chain, str(one.num_copies), *map(text.lr, ends)]
        rows.append(cells + ([text.signed(one.run.loss - measured.loss)] if measured is not None else []))
    name = f" of {sweep.name}" if len(sweeps) > 1 else ""
    head = f"<h3>{escape(f'What the survivors{name} went through')}</h3>"
    shown = head + table(columns, rows, texts=(0, 2), wrapped=(2,))
    toml = schedule_toml(alive[0]) if sweep.best is not None else ""
    if not toml:
        return shown
    summary = "<summary>The winner's schedule for a run from scratch, as TOML</summary>"
    return f'{shown}<details>{summary}<pre class="wrap">{escape(toml)}</pre></details>'


def schedule_toml(one: Survivor) -> str:
    """Return the schedule of a survivor's weights as a table that one run from scratch can follow; empty without it.

    To six digits; `populations.Lineage.replay` exports it to the bit.
    """
    if len(one.lr) != one.run.summary.num_steps or not (one.lr > 0).any():
        return ""
    corners = ", ".join(f"[{progress:.6g}, {height:.6g}]" for progress, height in corners_of(one.lr))
    return f'[train.schedule]\nname = "table"\npeak_lr = {one.lr.max():.6g}\nwarmup_steps = 0\npoints = [{corners}]'


def corners_of(values: Floats, tolerance: float = 1e-6) -> Points:
    """Return the corners of a piecewise linear curve through the value of every update, as a `table` schedule has them.

    >>> corners_of(np.array([1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 1.0, 1.0]))
    ((0.0, 0.25), (0.375, 1.0), (0.625, 1.0), (0.75, 0.25), (1.0, 0.25))

    Args:
        values: positive somewhere, one an update.
        tolerance: bends below this share of the peak count as straight.
    """
    peak, count = float(values.max()), len(values)
    corners = [(float(k) / count, float(values[k]) / peak) for k in _bends(values, tolerance)]
    if len(corners) > 1 and corners[-1][1] == corners[-2][1]:
        del corners[-1]  # level since the corner before: the end below says the same
    return (*corners, (1.0, corners[-1][1]))
