"""Figures of the studies that are made before a sweep: coordinate check, learning-rate transfer, range test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray import text
from landscape_ray.reports.figures import SYMBOLS, Axis, Figure, Panel, Series, sequential, series

WIDTH = Axis(label="width", scale="log")
COLORS = ("c0", "c1", "c2", "c3", "c4", "c5")
NAMES = {"mup": "muP", "ntk": "NTK"}
"""Of parametrisations, as they are written."""
FLAT = 0.15
"""A slope below this, either way, counts as flat; standard parametrisations have slopes of 0.5 to 1.5."""


def coordinate_figure(
    widths: Sequence[int],
    change: Mapping[str, ArrayLike],
    slopes: Mapping[str, float],
    *,
    num_steps: int,
    parametrisation: str,
) -> Figure:
    """Return how far activations moved against the width, one line a layer, the slope in the legend."""
    drawn: list[Series] = []
    for index, (layer, values) in enumerate(change.items()):
        style = {"color": COLORS[index % len(COLORS)], "symbol": SYMBOLS[index % len(SYMBOLS)]}
        name = f"{layer}  {text.signed(slopes[layer])[:5]}"
        drawn.append(series("line", widths, values, name=name, **style))
        drawn.append(series("points", widths, values, name=name, size=7, hover=layer, **style))
    worst = max(slopes, key=lambda layer: abs(slopes[layer]))
    if abs(slopes[worst]) < FLAT:
        largest = f"{slopes[worst]:+.2f} ({worst})"
        said = f"Activations move alike at every width: slopes within ±{FLAT:g}, the largest {largest}."
    elif max(slopes.values()) < FLAT and slopes[worst] > -0.5:
        said = (
            f"Nothing grows with the width. {worst} falls with it to the power {slopes[worst]:+.2f}: logits do, as far "
            "as they come from weights drawn at random, which wide networks lose."
        )
    else:
        said = f"Not flat: {worst} changes with width to the power {slopes[worst]:+.2f}."
    return Figure(
        key=f"coordinate-check-{parametrisation}",
        title=f"Coordinate check, {NAMES.get(parametrisation, parametrisation)} parametrisation",
        takeaway=said,
        x=WIDTH,
        panels=(Panel(y=Axis(label=f"rms change after {num_steps} updates", scale="log"), series=tuple(drawn)),),
        note="Numbers in the legend are slopes of log change over log width.",
    )


def transfer_figure(
    panels: Mapping[str, tuple[Sequence[int], Sequence[float], NDArray[np.float64]]], *, loss_unit: str
) -> Figure:
    """Return final loss against peak learning rate, one line a width and one panel a parametrisation.

    Args:
        panels: parametrisation to (widths, learning rates, losses of shape (W, L), inf where diverged).
        loss_unit: of the losses.
    """
    out, told = [], []
    for name, (widths, rates, losses) in panels.items():
        drawn: list[Series] = []
        best = np.argmin(losses, axis=1)
        for i, width in enumerate(widths):
            kept = np.isfinite(losses[i])
            color = sequential(i, 0, max(len(widths) - 1, 1))
            label = f"width {width}"
            x = np.asarray(rates)[kept]
            drawn.append(series("line", x, losses[i][kept], name=label, color=color, hover=f"{name}, {label}"))
            if not kept.any():
                continue
            drawn.append(
                series("points", [rates[best[i]]], [losses[i][best[i]]], name=label, color=color, size=11, hover="best")
            )
        known = losses[np.isfinite(losses)]
        limits = None
        if known.size:
            low, typical = float(known.min()), float(np.quantile(known, 0.8))
            pad = 0.08 * max(typical - low, 1e-9)
            limits = (low - pad, typical + pad)
        axis = Axis(label=f"{NAMES.get(name, name)}: final loss", unit=loss_unit, limits=limits)
        out.append(Panel(y=axis, series=tuple(drawn)))
        if not np.isfinite(losses).any(axis=1).all():
            told.append(f"{NAMES.get(name, name)}: a width has no learning rate that trains")
            continue
        moved = int(best.max() - best.min())
        told.append(f"{NAMES.get(name, name)}: the best learning rate moves by {text.plural(moved, 'grid step')}")
    widths = next(iter(panels.values()))[0]
    return Figure(
        key="lr-transfer",
        title=f"Learning-rate transfer over widths {min(widths)} to {max(widths)}",
        takeaway="; ".join(told) + ".",
        x=Axis(label="peak learning rate", scale="log"),
        panels=tuple(out),
        note="Dots mark the best learning rate of each width.",
    )


def range_figure(
    lrs: ArrayLike, losses: ArrayLike, *, suggested_lr: float, steepest_lr: float, open_end: bool, loss_unit: str
) -> Figure:
    """Return the training loss while the learning rate grows, with the learning rates that it suggests."""
    x, y = np.asarray(lrs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    kept = np.isfinite(y)
    x, y = x[kept], y[kept]
    low, high = float(y.min()), float(np.quantile(y[: max(len(y) // 4, 1)], 0.9))
    pad = 0.1 * max(high - low, 1e-9)
    level = (low - pad, high + 4 * pad)
    marks = [
        series("line", [rate, rate], list(level), name=name, color=color, dash="dash")
        for rate, name, color in ((suggested_lr, "suggested peak", "c2"), (steepest_lr, "steepest descent", "c1"))
    ]
    more = " The loss still fell at the end: test a wider range." if open_end else ""
    return Figure(
        key="lr-range-test",
        title="Learning-rate range test",
        takeaway=f"A peak learning rate of {text.lr(suggested_lr)} is suggested.{more}",
        x=Axis(label="learning rate", scale="log"),
        panels=(
            Panel(
                y=Axis(label="training loss", unit=loss_unit, limits=level),
                series=(series("line", x, y, name="loss of each batch", color="c0"), *marks),
            ),
        ),
    )
