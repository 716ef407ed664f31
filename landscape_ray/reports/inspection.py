"""What probes said about one checkpoint: a table for a terminal, and a figure of the spectrum."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from landscape_ray import text
from landscape_ray.reports.figures import Axis, Figure, Panel, series
from landscape_ray.tables import TextTable


def probe_table(title: str, rows: Mapping[str, tuple[float, float, bool, float, float, int]]) -> TextTable:
    """Return the estimates as a table; `rough` are those that did not reach the accuracy that was asked for.

    Args:
        title: what was measured.
        rows: name to (value, standard error or bound, converged, price in gradients, seconds, examples; 0 of parts).
    """
    numbers = ("value", "± error", "gradients", "seconds", "examples")
    table = TextTable(("probe", *numbers, ""), right=numbers, title=title)
    for name, (value, error, converged, price, seconds, num_examples) in rows.items():
        known = math.isfinite(value)
        table.add_row(
            name,
            text.number(value) if known else "unknown",
            text.number(error) if known else "",
            f"{price:.1f}" if price else "",
            f"{seconds:.2f}" if seconds else "",
            f"{num_examples:,}" if num_examples else "",
            "" if converged or not known else "rough",
            style="dim" if "/" in name else "",
        )
    return table


def density_figure(
    run: str,
    grid: ArrayLike,
    density: ArrayLike,
    error: ArrayLike | None,
    *,
    outliers: ArrayLike,
    bulk: tuple[float, float],
    trace: float,
    num_params: int,
) -> Figure:
    """Return the spectral density of the Hessian on a logarithmic scale, with the outliers marked.

    Args:
        run: whose.
        grid: eigenvalues.
        density: per unit of eigenvalue.
        error: standard error of the density, or None.
        outliers: eigenvalues outside the bulk.
        bulk: its lower and upper edge.
        trace: of the Hessian.
        num_params: size of the Hessian.
    """
    x, y, apart = (np.asarray(a, dtype=np.float64) for a in (grid, density, outliers))
    floor = 1e-3 / num_params / max(float(np.ptp(x)), 1e-12)
    shown = np.maximum(y, floor)
    drawn = []
    if error is not None:
        spread = 2 * np.asarray(error, dtype=np.float64)
        low, high = np.maximum(y - spread, floor), np.maximum(y + spread, floor)
        drawn.append(series("band", x, y, low=low, high=high, color="c0", name="± 2 standard errors"))
    drawn.append(series("line", x, shown, name="density", color="c0", hover="density"))
    if len(apart):
        level = np.full(len(apart), floor * 3)
        drawn.append(series("points", apart, level, name="outliers", color="c1", symbol="diamond", hover="outlier"))
    top = float(apart.max()) if len(apart) else bulk[1]
    return Figure(
        key=f"spectrum-{run}",
        title=f"Spectrum of the Hessian: {run}",
        takeaway=(
            f"Bulk from {text.number(bulk[0])} to {text.number(bulk[1])}, {text.plural(len(apart), 'outlier')}, "
            f"the largest eigenvalue {text.number(top)}; trace {text.number(trace)}."
        ),
        x=Axis(label="eigenvalue of the Hessian"),
        panels=(Panel(y=Axis(label="density", scale="log", limits=(floor, 2 * float(y.max()))), series=tuple(drawn)),),
        note="By stochastic Lanczos quadrature; each eigenvalue is drawn as a Gaussian.",
    )
