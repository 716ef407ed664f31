"""One page about a law of loss curves: the law through its curves, schedules it had not seen, and its full record."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from landscape_ray import text
from landscape_ray.analysis.annealing import SweepFit
from landscape_ray.files import write_atomic
from landscape_ray.laws import Curve, Law, Prediction, predict_curve
from landscape_ray.reports import fit_section
from landscape_ray.reports.figures import Axis, Figure, Panel, Series, series, thin
from landscape_ray.reports.markup import head, table
from landscape_ray.reports.page import block, page_of

ANCHORS = (
    ("law", "The law"),
    ("unseen", "Schedules it had not seen"),
    ("residuals", "What is left over"),
    ("record", "How it was made and checked"),
)

COLORS = ("c0", "c1", "c2", "c3", "c4", "c5")
"""Of the curves drawn in colour; the others are muted."""

STEP = Axis(label="optimizer updates")


def write_curves_page(found: SweepFit, law: Law, curves: Sequence[Curve], source: str, path: Path) -> Path:
    """Write the page to a path, and return it.

    Args:
        found: the fit.
        law: that was fitted.
        curves: of the fit.
        source: where they come from.
        path: of the page.
    """
    write_atomic(path, render(found, law, curves, source))
    return path


def render(found: SweepFit, law: Law, curves: Sequence[Curve], source: str) -> str:
    """Return the page as HTML; see :func:`write_curves_page`."""
    fitted = [_fitted(found, law, curve) for curve in curves]
    drawn = [
        _law_figure(found, curves, fitted),
        _forecast_figure(found, curves),
        _finals_figure(found),
        _residual_figure(found, curves, fitted),
    ]
    bodies = {
        "law": block(drawn[0]) + fit_section.parameters(found.fit, law),
        "unseen": block(drawn[1]) + block(drawn[2]) + _forecast_table(found),
        "residuals": block(drawn[3]),
        "record": fit_section.record(found.fit) + fit_section.excluded(found.excluded),
    }
    title = (law.title or law.name).capitalize()
    lead = (
        f'<p class="lead"><code>{escape(law.formula)}</code></p>'
        f"<p>{escape(law.reference)}. Fitted to {text.plural(found.fit.data['num_points'], 'point')} of "
        f"{text.plural(len(found.run_ids), 'run')} from {escape(source)} at the peak learning rate "
        f"{text.lr(found.peak_lr)}.</p>"
    )
    parts = [head(title, ["landscape_ray law", source, law.name], ANCHORS), lead + fit_section.verdict(found.fit)]
    parts += [f'<section><h2 id="{key}">{escape(name)}</h2>{bodies[key]}</section>' for key, name in ANCHORS]
    return page_of(f"{law.name}: {source}", parts, drawn)


def _fitted(found: SweepFit, law: Law, curve: Curve) -> Prediction:
    """Return the law along a curve that it was fitted to, from the first loss that was."""
    kept = curve.step > max(curve.warmup_steps, int(found.fit.data["skip_steps"]))
    return predict_curve(
        found.fit,
        curve.lr,
        curve.step[kept],
        curve.warmup_steps,
        batch_size=curve.batch_size,
        num_params=curve.num_params,
        law=law,
        allow_extrapolation=True,
    )


def _colors(curves: Sequence[Curve]) -> dict[str, tuple[str, str]]:
    """Return colour and legend entry of every curve, for all figures; the lowest final losses have their own."""
    order = sorted(curves, key=lambda curve: float(curve.loss_nats[-1]))
    return {
        curve.run_id: (COLORS[rank], curve.run_id) if rank < len(COLORS) else ("muted", "other runs")
        for rank, curve in enumerate(order)
    }


def _law_figure(found: SweepFit, curves: Sequence[Curve], fitted: Sequence[Prediction]) -> Figure:
    losses: list[Series] = []
    rates: list[Series] = []
    colors = _colors(curves)
    for curve, line in zip(curves, fitted, strict=True):
        color, name = colors[curve.run_id]
        x, y = thin(line.step, curve.loss_nats[-len(line.step) :], 150)
        losses.append(series("points", x, y, name=name, color=color, size=4.0, hover=f"{curve.run_id}, measured"))
        x, y = thin(line.step, line.loss_nats, 300)
        losses.append(series("line", x, y, name=name, color=color, weight="main", hover=f"{curve.run_id}, the law"))
        x, y = thin(np.arange(1, len(curve.lr) + 1), curve.lr, 300)
        rates.append(series("line", x, y, name=name, color=color, hover=curve.run_id))
    rmse = text.number(found.fit.residuals["rmse"], 3)
    return Figure(
        key="law",
        title="The law through its curves",
        takeaway=f"One set of {len(found.fit.parameters)} numbers describes {text.plural(len(curves), 'curve')} within "
        f"{rmse} {found.loss_unit} (root mean square).",
        note="Points: measured. Lines: the law. Below: the learning rate that it is given.",
        x=STEP,
        panels=(
            Panel(y=Axis(label="held-out loss", unit=found.loss_unit), series=tuple(losses)),
            Panel(y=Axis(label="learning rate"), series=tuple(rates), share=0.4),
        ),
    )


def _forecast_figure(found: SweepFit, curves: Sequence[Curve]) -> Figure:
    one = found.headline_forecast
    curve = next(curve for curve in curves if curve.run_id == one.run_id)
    expected = one.prediction
    band = f"{expected.confidence:.0%} interval".replace("%", " %")
    measured = curve.loss_nats[-len(expected.step) :]
    x, y = thin(expected.step, measured, 200)
    upper = (
        series("band", expected.step, expected.loss_nats, low=expected.low, high=expected.high, name=band, color="c0"),
        series("line", expected.step, expected.loss_nats, name="forecast", color="c0", weight="main"),
        series("points", x, y, name=f"measured: {one.run_id}", color="c1", size=5.0, hover="measured"),
    )
    low, high = (100 * (end / expected.loss_nats - 1) for end in (expected.low, expected.high))
    x, y = thin(expected.step, 100 * (measured / expected.loss_nats - 1), 200)
    lower = (
        series("band", expected.step, np.zeros(len(expected.step)), low=low, high=high, name=band, color="c0"),
        series("hline", [0.0], [0.0], color="c0"),
        series("points", x, y, name=f"measured: {one.run_id}", color="c1", size=5.0, hover="measured"),
    )
    inside = "inside" if one.low <= one.observed_final <= one.high else "outside"
    return Figure(
        key="forecast",
        title="A schedule forecast before it was seen",
        takeaway=f"From the other schedules, {one.run_id} was expected to end at {text.loss(one.predicted_final)}; it "
        f"ended at {text.loss(one.observed_final)} ({text.signed(100 * one.relative_error, 2)} %), {inside} the "
        "interval.",
        note=f"The schedule left out was {found.rule}.",
        x=STEP,
        panels=(
            Panel(y=Axis(label="held-out loss", unit=found.loss_unit), series=upper),
            Panel(y=Axis(label="measured minus forecast", unit="%"), series=lower, share=0.5),
        ),
    )


def _finals_figure(found: SweepFit) -> Figure:
    forecasts = found.forecasts
    measured, expected, low, high = (
        np.array([getattr(one, name) for one in forecasts])
        for name in ("observed_final", "predicted_final", "low", "high")
    )
    inside = int(((low <= measured) & (measured <= high)).sum())
    ends = [float(min(measured.min(), low.min())), float(max(measured.max(), high.max()))]
    names = tuple(f"{one.run_id} ({found.shapes.get(one.run_id, 'schedule')})" for one in forecasts)
    level = f"{found.fit.confidence:.0%}".replace("%", " %")
    return Figure(
        key="finals",
        title="Every schedule forecast from the others",
        takeaway=f"{inside} of {len(forecasts)} final losses lie inside their {level} interval; the mean error is "
        f"{text.percent(float(np.mean(np.abs(expected / measured - 1))))}.",
        x=Axis(label="measured final loss", unit=found.loss_unit),
        panels=(
            Panel(
                y=Axis(label="forecast", unit=found.loss_unit),
                series=(
                    series("line", ends, ends, name="equal", color="muted", weight="muted", dash="dash"),
                    series("points", measured, expected, low=low, high=high, name="forecasts", color="c0", hover=names),
                ),
            ),
        ),
    )


def _residual_figure(found: SweepFit, curves: Sequence[Curve], fitted: Sequence[Prediction]) -> Figure:
    drawn: list[Series] = [series("hline", [0.0], [0.0], color="muted", weight="muted")]
    worst, where, colors = 0.0, "", _colors(curves)
    for curve, line in zip(curves, fitted, strict=True):
        off = 100 * (curve.loss_nats[-len(line.step) :] / line.loss_nats - 1)
        x, y = thin(line.step, off, 200)
        color, name = colors[curve.run_id]
        drawn.append(series("line", x, y, name=name, color=color, hover=curve.run_id))
        if np.abs(off).max() > worst:
            worst, where = float(np.abs(off).max()), curve.run_id
    return Figure(
        key="residuals",
        title="Residuals over training",
        takeaway=f"The law is at most {text.number(worst, 2)} % off, in {where}.",
        note="A law of the right form leaves noise; a bend that all runs share is what it misses.",
        x=STEP,
        panels=(Panel(y=Axis(label="measured minus fitted", unit="%"), series=tuple(drawn)),),
    )


def _forecast_table(found: SweepFit) -> str:
    rows = [
        [
            one.run_id + (" (headline)" if one.run_id == found.headline else ""),
            found.shapes.get(one.run_id, "–"),
            text.loss(one.observed_final),
            text.loss(one.predicted_final),
            f"{text.loss(one.low)} to {text.loss(one.high)}",
            text.signed(100 * one.relative_error, 2) + " %",
            text.number(one.curve_mae, 3),
            one.status,
        ]
        for one in found.forecasts
    ]
    level = f"{found.fit.confidence:.0%} interval".replace("%", " %")
    columns = ["left out", "schedule", "measured", "forecast", level, "error", "mean curve error", "fit"]
    return table(columns, rows, texts=(0, 1, 7))
