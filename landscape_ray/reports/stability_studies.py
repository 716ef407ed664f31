"""Figures of the studies of stability: the edge, SGD's bound on the trace, sharpness over widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray import text
from landscape_ray.reports.figures import Axis, Figure, Panel, sequential, series
from landscape_ray.reports.studies import NAMES

STEP = Axis(label="step", unit="updates")

CURVATURE_LABELS = {"sharpness": "sharpness λ", "preconditioned_sharpness": "preconditioned sharpness λ(P⁻¹H)"}

TRANSFERS = 0.15
"""A slope of log sharpness over log width below this, either way, counts as none."""


MAX_MARKS = 60
"""Measurements of which each has a mark of its own."""


def edge_figure(
    name: str,
    *,
    probe: str,
    formula: str,
    steps: ArrayLike,
    curvature: ArrayLike,
    thresholds: ArrayLike,
    losses: ArrayLike,
    ratio: float,
    state: str,
) -> Figure:
    """Return curvature against the threshold of its optimizer along a run, with the training loss below.

    Args:
        name: of the run.
        probe: what was measured.
        formula: of the threshold, as it is written.
        steps: of the measurements.
        curvature: at these steps.
        thresholds: at these steps.
        losses: training loss of every update.
        ratio: curvature over threshold, median of the second half.
        state: below, at the edge, or above.
    """
    x, y, limit, loss = (np.asarray(a, dtype=np.float64) for a in (steps, curvature, thresholds, losses))
    label = CURVATURE_LABELS.get(probe, probe)
    does = "hovers" if state == "at the edge" else "stays"
    constant = float(np.ptp(limit)) <= 1e-9 * float(limit.max())
    entry = f"{formula} = {text.number(float(limit[-1]))}" if constant else f"{formula} of the same step"
    late = loss[len(loss) // 2 :]
    rises = float(np.mean(np.diff(late) > 0)) if len(late) > 1 else 0.0
    top = max(float(y.max()), float(np.median(limit)))
    low = min(float(y.min()), float(np.median(limit)))
    positive = loss > 0
    drawn = [series("line", x, y, name=label, color="c0", hover=label)]
    if len(x) <= MAX_MARKS:
        drawn.append(series("points", x, y, name=label, color="c0", size=5, hover=label))
    return Figure(
        key=f"edge-{name}",
        title="Edge of stability: " + name.replace("-", " "),
        takeaway=(
            f"In the second half of the run the {label} {does} at {text.percent(ratio, 3)} of the limit {entry}; "
            f"the loss rises in {text.percent(rises)} of these updates."
        ),
        x=dataclasses.replace(STEP, limits=(0.0, 1.02 * len(loss))),
        panels=(
            Panel(
                y=Axis(label=label, limits=(0.0 if low < 0.4 * top else 0.9 * low, 1.12 * top)),
                series=(*drawn, series("line", x, limit, name=entry, color="text", dash="dash")),
                share=2.0,
            ),
            Panel(
                y=Axis(label="training loss", scale="log"),
                series=(
                    series(
                        "line", np.arange(1, len(loss) + 1)[positive], loss[positive], name="training loss", color="c1"
                    ),
                ),
            ),
        ),
        note=(
            "Dashed: the curvature above which the optimizer diverges on a quadratic (Cohen et al. 2021, arXiv "
            "2103.00065; 2022, arXiv 2207.14484)."
        ),
    )


def sgd_figure(
    lrs: ArrayLike,
    growth: ArrayLike,
    standard_error: ArrayLike,
    expected: ArrayLike,
    *,
    trace: float,
    sharpness: float,
    measured_threshold: float,
    num_steps: int,
) -> Figure:
    """Return how far SGD on single examples grows or shrinks against learning rate times trace, with the theory."""
    x, y, error, theory = (np.asarray(a, dtype=np.float64) for a in (lrs, growth, standard_error, expected))
    x = x * trace
    return Figure(
        key="sgd-stability",
        title="Stability of SGD with one example in each update",
        takeaway=(
            f"Weights grow above LR · tr(H) = {measured_threshold * trace:.2f}: the bound is 2. "
            f"Gradient descent would be stable up to {2 / sharpness * trace:.0f}."
        ),
        x=Axis(label="learning rate times trace of the Hessian"),
        panels=(
            Panel(
                y=Axis(label=f"mean |w|² after {num_steps} updates (1 before)", scale="log"),
                series=(
                    series("line", x, theory, name="theory", color="muted"),
                    series(
                        "points",
                        x,
                        y,
                        low=np.maximum(y - 2 * error, 0.01 * y),
                        high=y + 2 * error,
                        name="measured, ± 2 standard errors",
                        color="c0",
                    ),
                    series("line", [2, 2], [float(y.min()), float(y.max())], name="bound 2", color="text", dash="dash"),
                ),
            ),
        ),
    )


def width_figure(panels: Mapping[str, tuple[Sequence[int], ArrayLike, NDArray[np.float64], float]]) -> Figure:
    """Return sharpness along runs, one line a width and one panel a parametrisation.

    Args:
        panels: parametrisation to (widths, steps, sharpness of shape (W, M), slope over the width).
    """
    out, told = [], []
    known = np.concatenate([values[np.isfinite(values) & (values > 0)] for _, _, values, _ in panels.values()])
    limits = (0.7 * float(known.min()), 1.4 * float(known.max()))
    for name, (widths, steps, values, slope) in panels.items():
        drawn = []
        for index, width in enumerate(widths):
            color = sequential(index, 0, max(len(widths) - 1, 1))
            style = {"name": f"width {width}", "color": color, "hover": f"{NAMES.get(name, name)}, width {width}"}
            drawn.append(series("line", steps, values[index], **style))
        label = NAMES.get(name, name)
        out.append(Panel(y=Axis(label=f"{label}: sharpness λ", scale="log", limits=limits), series=tuple(drawn)))
        same = "coincides over widths" if abs(slope) < TRANSFERS else "changes with width"
        told.append(f"{label}: sharpness {same} (width to the power {text.signed(slope, 2)})")
    widths = next(iter(panels.values()))[0]
    said = "; ".join(told) + "."
    return Figure(
        key="sharpness-widths",
        title=f"Sharpness along training at widths {min(widths)} to {max(widths)}",
        takeaway=said[0].upper() + said[1:],
        x=STEP,
        panels=tuple(out),
        note=(
            "Of the Hessian in the coordinates in which all weights have one learning rate. Powers are means over the "
            "second half of the measurements."
        ),
    )
