"""The figures of a report, as pure functions of sweeps; where there is nothing to draw, the reason why."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from landscape_ray import text
from landscape_ray.analysis.runs import Run
from landscape_ray.reports.figures import SYMBOLS, Axis, ColorBar, Figure, Panel, Series, sequential, series, thin
from landscape_ray.reports.views import (
    Sweep,
    best_overall,
    edge_of_search,
    empty_reason,
    label,
    loss_unit,
    no_best,
    spread,
)

BEST_COLORS = ("c0", "c1", "c2", "c3", "c4", "c5")
STEP = Axis(label="optimizer updates")


def loss_curves(sweeps: Sequence[Sweep]) -> Figure | str:
    """Return held-out loss against step: the best run of each sweep stands out, diverged runs end in a cross."""
    drawn = [(sweep, run) for sweep in sweeps for run in sweep.runs if len(run.evals["step"])]
    if not drawn:
        return f"No held-out loss has been recorded ({empty_reason(sweeps)}); curves appear with the first evaluation."
    limits = view_of_losses([run for _, run in drawn])
    muted: list[Series] = []
    main: list[Series] = []
    others = sum(run is not sweep.best and run.summary.status != "diverged" for sweep, run in drawn)
    for sweep, run in drawn:
        x, y = thin(run.evals["step"], run.evals["loss_nats"])
        name = label(sweeps, sweep, run.run_id)
        if run is sweep.best:
            color = BEST_COLORS[list(sweeps).index(sweep) % len(BEST_COLORS)]
            entry = f"best: {name}" if len(sweeps) == 1 else f"best of {sweep.name}: {run.run_id}"
            main.append(series("line", x, y, name=entry, color=color, weight="main", hover=name))
        elif run.summary.status == "diverged":
            muted.append(series("line", x, y, name="diverged", color="text", dash="dot", hover=f"{name} (diverged)"))
            kept = np.flatnonzero(np.isfinite(y))[-1:]
            # above a cut axis the cross stays at its edge
            level = np.minimum(y[kept], limits[1] - 0.02 * (limits[1] - limits[0])) if limits else y[kept]
            muted.append(series("points", x[kept], level, name="diverged", color="text", symbol="cross", size=10))
        else:
            entry = f"other runs ({others})"
            muted.append(series("line", x, y, name=entry, color="muted", weight="muted", hover=describe(run, name)))
    return Figure(
        key="loss-curves",
        title="Held-out loss during training",
        takeaway=_loss_takeaway(sweeps),
        x=STEP,
        panels=(Panel(y=Axis(label="held-out loss", unit=loss_unit(sweeps), limits=limits), series=(*muted, *main)),),
        note="The loss axis is cut above, where all runs start; double-click the figure to see everything."
        if limits
        else "",
    )


def generalisation(sweeps: Sequence[Sweep]) -> Figure | str:
    """Return training and held-out loss of the best run, and where targets are classes its held-out accuracy."""
    found = best_overall(sweeps)
    if found is None:
        return no_best(sweeps)
    sweep, run = found
    name = label(sweeps, sweep, run.run_id)
    steps, losses = thin(run.steps["step"], run.steps["loss_nats"])
    evals, held_out = run.evals["step"], run.evals["loss_nats"]
    if not len(steps):
        return f"{name} has recorded no update; its training loss would stand beside the held-out one here."
    known = np.concatenate([losses, held_out])
    known = known[np.isfinite(known)]
    wide = len(known) > 0 and known.min() > 0 and known.max() > 20 * known.min()
    axis = Axis(label="loss", unit=loss_unit(sweeps), scale="log" if wide else "linear")
    drawn = (
        series("line", steps, losses, name="training batches", color="muted", hover=f"{name}, training batch"),
        series("line", evals, held_out, name="held out", color="c0", weight="main", hover=f"{name}, held out"),
    )
    panels = [Panel(y=axis, series=drawn)]
    accuracy = np.asarray(run.evals["accuracy"], dtype=np.float64)
    if np.isfinite(accuracy).any():
        right = series("line", evals, accuracy, name="held out", color="c0", weight="main", hover="accuracy")
        panels.append(Panel(y=Axis(label="held-out accuracy", limits=(-0.02, 1.02)), series=(right,), share=0.6))
    gap = float(held_out[-1] - np.median(losses[-max(len(losses) // 20, 1) :]))
    last = (
        f", {text.percent(float(accuracy[-1]), 3)} predicted right"
        if np.isfinite(accuracy[-1:]).all() and len(accuracy)
        else ""
    )
    return Figure(
        key="generalisation",
        title="Training and held-out loss of the best run",
        takeaway=f"{name} ends with a held-out loss of {_measured(run.loss, sweeps)}, {text.loss(abs(gap))} "
        f"{'above' if gap >= 0 else 'below'} its last training batches{last}.",
        x=STEP,
        panels=tuple(panels),
    )


def schedules(sweeps: Sequence[Sweep]) -> Figure | str:
    """Return the learning rate applied in every update of independent runs, coloured by the final loss."""
    searches = [sweep for sweep in sweeps if not sweep.population]
    runs = [(sweep, run) for sweep in searches for run in sweep.runs if len(run.steps["step"])]
    if not runs:
        return "No independent run has recorded an update; a sweep with [search] fills this figure."
    finished = sorted((run.loss, run.run_id) for _, run in runs if run.has_result)
    best, worst = (finished[0][0], _clipped_worst([loss for loss, _ in finished])) if finished else (0.0, 0.0)
    drawn: list[Series] = []
    order = sorted(runs, key=lambda pair: (not math.isnan(pair[1].loss), -pair[1].loss, pair[1].run_id))
    for sweep, run in order:
        x, y = thin(run.steps["step"], run.steps["lr"])
        said = describe(run, label(sweeps, sweep, run.run_id))
        if not run.has_result:
            entry = "not finished or diverged"
            drawn.append(series("line", x, y, name=entry, color="muted", weight="muted", dash="dot", hover=said))
            continue
        top = (run.loss, run.run_id) == finished[0]
        style = {"weight": "main", "name": f"best: {run.run_id}"} if top else {"weight": "normal"}
        drawn.append(series("line", x, y, color=sequential(run.loss, best, worst), hover=said, **style))
    return Figure(
        key="schedules",
        title="Learning-rate schedules that were tried",
        takeaway=_schedule_takeaway(searches, [run for _, run in runs if run.has_result]),
        x=STEP,
        panels=(Panel(y=lr_axis([run for _, run in runs]), series=tuple(drawn)),),
        note="The learning rate is the one that the optimizer applied, not the one that was configured.",
        colorbar=ColorBar(label=_with_unit("final held-out loss", sweeps), best=best, worst=worst)
        if worst > best
        else None,
    )


def search_result(sweeps: Sequence[Sweep]) -> Figure | str:
    """Return final loss against the peak learning rate, one mark a run, shaped by its schedule."""
    pairs = [(sweep, run) for sweep in sweeps for run in sweep.runs if run.peak_lr > 0]
    finished = [(sweep, run) for sweep, run in pairs if run.has_result]
    if not finished:
        return f"No run has finished with a loss ({empty_reason(sweeps)}); each finished run becomes one mark."
    losses = np.array([run.loss for _, run in finished])
    ceiling = _clipped_worst(losses.tolist())
    pad = 0.06 * max(ceiling - losses.min(), 1e-3 * losses.min())
    top = ceiling + 2.4 * pad
    drawn: list[Series] = []
    for index, shape in enumerate(sorted({run.shape for _, run in finished})):
        inside = [(sweep, run) for sweep, run in finished if run.shape == shape]
        drawn.append(
            series(
                "points",
                [run.peak_lr for _, run in inside],
                [min(run.loss, top - pad) for _, run in inside],
                name=shape,
                color=BEST_COLORS[index % len(BEST_COLORS)],
                symbol=SYMBOLS[index % len(SYMBOLS)],
                size=11,
                hover=tuple(_point(run, label(sweeps, sweep, run.run_id), top - pad) for sweep, run in inside),
            )
        )
    gone = [(sweep, run) for sweep, run in pairs if run.summary.status == "diverged"]
    if gone:
        said = tuple(f"{label(sweeps, sweep, run.run_id)} diverged, drawn at the edge" for sweep, run in gone)
        edge = [top - pad] * len(gone)
        mark = {"color": "text", "symbol": "cross", "size": 11, "name": "diverged (at the upper edge)"}
        drawn.append(series("points", [run.peak_lr for _, run in gone], edge, hover=said, **mark))
    best = min((run for _, run in finished), key=lambda run: run.loss)
    drawn.append(series("hline", [0, 0], [best.loss], name="best loss", color="faint", dash="dot", weight="muted"))
    return Figure(
        key="search-result",
        title="Final loss against peak learning rate",
        takeaway=_search_takeaway([run for _, run in finished], best),
        x=Axis(label="peak learning rate applied", scale="log"),
        panels=(
            Panel(
                y=Axis(
                    label="final held-out loss", unit=loss_unit(sweeps), limits=(float(losses.min() - pad), float(top))
                ),
                series=tuple(drawn),
            ),
        ),
        note="Runs far above the others are drawn at the upper edge; pointing at them tells their loss."
        if losses.max() > ceiling
        else "",
    )


def describe(run: Run, name: str) -> str:
    """Return a run in one line, for hovering."""
    parts = [name, run.shape]
    if math.isfinite(run.peak_lr):
        parts.append(f"peak LR {text.lr(run.peak_lr)}")
    parts.append(f"final loss {text.loss(run.loss)}" if run.has_result else run.summary.status)
    return " · ".join(parts)


def _point(run: Run, name: str, edge: float) -> str:
    above = f" (above the axis: {text.loss(run.loss)})" if run.loss > edge else ""
    return describe(run, name) + above


def _measured(loss: float, sweeps: Sequence[Sweep]) -> str:
    return f"{text.loss(loss)} {loss_unit(sweeps)}".strip()


def _with_unit(label: str, sweeps: Sequence[Sweep]) -> str:
    unit = loss_unit(sweeps)
    return f"{label} ({unit})" if unit else label


def _clipped_worst(losses: list[float]) -> float:
    """Return the worst loss, or a loss beyond which runs are outliers that would flatten the rest."""
    best, upper = min(losses), float(np.quantile(losses, 0.75))
    return min(max(losses), best + 4 * (upper - best)) if len(losses) >= 4 and upper > best else max(losses)


def view_of_losses(runs: Sequence[Run]) -> tuple[float, float] | None:
    """Return the range in which the curves differ: from the best loss to where runs are after a tenth of them."""
    lowest, early, highest = [], [], []
    for run in runs:
        step, loss = run.evals["step"], run.evals["loss_nats"]
        kept = np.isfinite(loss)
        if run.summary.status == "diverged" or not kept.any():
            continue
        step, loss = step[kept], loss[kept]
        lowest.append(float(loss.min()))
        highest.append(float(loss.max()))
        early.append(float(loss[min(np.searchsorted(step, 0.1 * step[-1]), len(loss) - 1)]))
    if not lowest:
        return None
    low, high = min(lowest), float(np.quantile(early, 0.75))
    if max(highest) <= high + 0.3 * (high - low) or high <= low:
        return None
    pad = 0.05 * (high - low)
    return low - pad, high + pad


def lr_axis(runs: Sequence[Run]) -> Axis:
    """Return a linear axis where the peaks are of one size, a logarithmic one where they differ tenfold."""
    peaks = [run.peak_lr for run in runs if run.peak_lr > 0]
    if not peaks or max(peaks) < 12 * min(peaks):
        return Axis(label="learning rate")
    return Axis(label="learning rate", scale="log", limits=(min(peaks) / 20, max(peaks) * 1.3))


def _loss_takeaway(sweeps: Sequence[Sweep]) -> str:
    found = best_overall(sweeps)
    runs = [run for sweep in sweeps for run in sweep.runs]
    diverged = sum(run.summary.status == "diverged" for run in runs)
    tail = f" {text.plural(diverged, 'run')} diverged." if diverged else ""
    if found is None:
        return no_best(sweeps)
    sweep, best = found
    median, _ = spread([run for one in sweeps for run in one.finished])
    name = label(sweeps, sweep, best.run_id)
    gain = f", {median - best.loss:.4f} below the median run" if median > best.loss else ""
    return f"{name} ends lowest, at {_measured(best.loss, sweeps)}{gain}.{tail}"


def _schedule_takeaway(sweeps: Sequence[Sweep], finished: Sequence[Run]) -> str:
    if not finished:
        return "No run has finished yet."
    by_shape: dict[str, list[float]] = {}
    for run in finished:
        by_shape.setdefault(run.shape, []).append(run.loss)
    ranked = sorted(by_shape, key=lambda shape: min(by_shape[shape]))
    told = [f"{shape} {text.loss(min(by_shape[shape]))}" for shape in ranked]
    return f"Lowest final loss by schedule: {', '.join(told)} {loss_unit(sweeps)}".strip() + "."


def _search_takeaway(finished: Sequence[Run], best: Run) -> str:
    start = (
        f"The lowest loss, {text.loss(best.loss)}, was reached at peak LR {text.lr(best.peak_lr)} with {best.shape}."
    )
    return f"{start} {edge_of_search(finished)}".strip()
