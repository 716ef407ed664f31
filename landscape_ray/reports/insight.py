"""The figures that interpret a sweep: sharpness against the stability limit, the law's forecast, and the cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from landscape_ray import text
from landscape_ray.analysis.runs import Run
from landscape_ray.reports.charts import BEST_COLORS, STEP, describe
from landscape_ray.reports.figures import Axis, Figure, Floats, Panel, Series, series, thin
from landscape_ray.reports.stability import CURVATURES, Limit, limit_of_stability, shares_of_noise
from landscape_ray.reports.views import Sweep, cost, label, loss_unit

SHARPNESS_NOTE = (
    "Sharpness λ is the largest eigenvalue of the Hessian of the loss on a fixed batch; bars are the probe's residual "
    "bound."
)

PRECONDITIONED_NOTE = " Preconditioned sharpness is that of P⁻¹H, where the optimizer divides the gradient by P."

LIMIT_NOTE = (
    " Dashed: the curvature above which the optimizer is unstable on a quadratic, with the learning rate and momentum "
    "of each update (Cohen et al. 2021, arXiv 2103.00065; 2022, arXiv 2207.14484). That is derived for full batches: "
    "the noise of small ones often keeps the curvature lower."
)

NOISE_NOTE = (
    " Dotted: what must stay below 2/LR for the noise of small batches not to grow, tr(H)/B + (1 − 1/B) |H|²/tr(H) at "
    "batch size B, where the training loss comes to zero (Ma and Ying 2021, arXiv 2105.13462)."
)

BATCH_NOTE = (
    " SGD settles where the sharpness of its own batches is 2/LR (Andreyev and Beneventano 2024, arXiv 2412.20553)."
)

AXES = {"sharpness": "sharpness λ", "preconditioned_sharpness": "preconditioned sharpness"}


def sharpness(sweeps: Sequence[Sweep]) -> Figure | str:
    """Return the top curvature against step with the limit of stability of the run's optimizer, and their ratio."""
    probed = sharpness_runs(sweeps)
    if not probed:
        return "No run measured its sharpness; add [train.probes.sharpness] to the sweep file to see it here."
    chosen = highlighted([run for _, run in probed])
    panels: dict[str, list[Series]] = {probe: [] for probe in CURVATURES}
    dashed: dict[str, list[Series]] = {probe: [] for probe in CURVATURES}
    lower: list[Series] = []
    found: list[tuple[float, str, Limit]] = []
    limits: list[Limit] = []
    noisy: list[str] = []
    for sweep, run in sorted(probed, key=lambda pair: pair[1] in chosen):
        curvatures = {probe: rows for probe in CURVATURES if len((rows := measured(run, probe, positive=True)).step)}
        limit = limit_of_stability(run, curvatures)
        limits.append(limit)
        rows = curvatures[limit.probe]
        ratio = rows.value / limit.at(rows.step)
        name = label(sweeps, sweep, run.run_id)
        if run not in chosen:
            style = {"color": "muted", "weight": "muted", "name": "other runs"}
            for probe, one in curvatures.items():
                panels[probe].append(series("line", one.step, one.value, hover=describe(run, name), **style))
            lower.append(series("line", rows.step, ratio, **style))
            continue
        color = BEST_COLORS[chosen.index(run) % len(BEST_COLORS)]
        style = {"color": color, "name": legend_entry(run, name)}
        for probe, one in curvatures.items():
            ends = {"low": np.maximum(one.value - one.error, 0.02 * one.value), "high": one.value + one.error}
            said = f"{name}, {probe.replace('_', ' ')}"
            panels[probe].append(series("line", one.step, one.value, weight="normal", hover=said, **ends, **style))
        step, _ = thin(run.steps["step"], run.steps["lr"])
        drawn = limit.at(step)
        known = np.isfinite(drawn)
        entry = f"limit {limit.formula} of the same run" if limit.holds else f"{limit.formula} of the same run"
        dash = {"color": color, "dash": "dash", "weight": "muted", "name": entry}
        dashed[limit.probe].append(series("line", step[known], drawn[known], **dash))
        lower.append(series("line", rows.step, ratio, hover=f"{name}, share of the limit", **style))
        for what, (at, share) in shares_of_noise(run).items():
            noisy.append(what)
            dotted = {"color": color, "dash": "dot", "name": f"{what} of the same run"}
            lower.append(series("line", at, share, hover=f"{name}, {what}, share of 2/LR", **dotted))
        if np.isfinite(ratio).any():
            found.append((float(np.nanmax(ratio)), name, limit))
    # in a warm-up and at the end of a decay the ratio goes to zero, which says nothing: keep the middle in view
    seen = np.concatenate([item.y for item in lower])
    seen = seen[np.isfinite(seen) & (seen > 0)]
    floor = max(float(np.quantile(seen, 0.05)) / 2, 1e-4) if seen.size else 0.01
    ceiling = max([2.0, *(1.5 * highest for highest, _, _ in found)])
    lower.insert(0, series("hline", [0, 0], [1.0], color="text", dash="dash", weight="normal"))
    ratio_axis = Axis(label="curvature / limit", scale="log", limits=(floor, ceiling))
    return Figure(
        key="sharpness",
        title="Sharpness against the limit of stability",
        takeaway=_sharpness_takeaway(found),
        x=STEP,
        panels=(
            *(
                Panel(y=_curvature_axis(AXES[probe], drawn, dashed[probe]), series=(*drawn, *dashed[probe]))
                for probe, drawn in panels.items()
                if drawn
            ),
            Panel(y=ratio_axis, series=tuple(lower), share=0.6),
        ),
        note=_sharpness_note(limits, bool(panels["preconditioned_sharpness"]))
        + (NOISE_NOTE if "SGD's trace condition" in noisy else "")
        + (BATCH_NOTE if "batch sharpness" in noisy else ""),
    )


def forecast(sweep: Sweep, key: str = "forecast") -> Figure | str:
    """Return the held-out schedule as forecast by the law, its measurement, and the difference of the two."""
    if sweep.fit is None:
        return (
            f"No law has been fitted to {sweep.name}; `landscape-ray fit` does it where three or more finished runs "
            "share one peak LR (put such points in [[search.initial]])."
        )
    fit, runs = sweep.fit, {run.run_id: run for run in sweep.runs}
    one = fit.headline_forecast
    if one.run_id not in runs:
        return f"The saved fit holds out {one.run_id}, which is not among the runs; run `landscape-ray fit` again."
    held = runs[one.run_id]
    upper: list[Series] = []
    for run_id in one.fitted_on:
        if run_id in runs:
            x, y = _after_warmup(runs[run_id])
            entry = {"name": f"fitted on ({len(one.fitted_on)} runs)"}
            upper.append(series("line", x, y, color="muted", weight="muted", **entry))
    curve = one.prediction
    band = f"{one.prediction.confidence:.0%} interval".replace("%", " %")
    upper.append(series("band", curve.step, curve.loss_nats, low=curve.low, high=curve.high, name=band, color="c0"))
    upper.append(
        series("line", curve.step, curve.loss_nats, name="forecast", color="c0", weight="main", hover="forecast")
    )
    x, y = _after_warmup(held)
    x, y = x[x >= curve.step[0]], y[x >= curve.step[0]]
    seen = f"measured: {one.run_id} ({fit.shapes.get(one.run_id, held.shape)})"
    upper.append(series("points", x, y, name=seen, color="c1", size=6, hover="measured"))
    predicted = np.interp(x, curve.step, curve.loss_nats)
    edges = {"low": curve.low - curve.loss_nats, "high": curve.high - curve.loss_nats}
    lower = (
        series("band", curve.step, np.zeros(len(curve.step)), name=band, color="c0", **edges),
        series("hline", [0, 0], [0.0], color="c0"),
        series("points", x, y - predicted, name=seen, color="c1", size=6, hover="residual"),
    )
    finals = [run.loss for run in runs.values() if run.run_id in fit.run_ids]
    start = float(np.interp(0.1 * curve.step[-1], curve.step, curve.loss_nats))
    low = min([*finals, float(np.min(curve.low))])
    pad = 0.06 * (start - low)
    return Figure(
        key=key,
        title="A schedule forecast before it was seen",
        takeaway=forecast_sentence(sweep),
        x=STEP,
        panels=(
            Panel(
                y=Axis(
                    label="held-out loss",
                    unit=loss_unit([sweep]),
                    limits=(low - pad, start + pad) if start > low else None,
                ),
                series=tuple(upper),
            ),
            Panel(y=Axis(label="residual", unit=loss_unit([sweep])), series=lower, share=0.5),
        ),
        note=f"The held-out schedule was {fit.rule}.",
    )


def forecast_sentence(sweep: Sweep) -> str:
    """Return the headline forecast in one sentence: predicted, measured, error, interval."""
    assert sweep.fit is not None
    one = sweep.fit.headline_forecast
    shape = sweep.fit.shapes.get(one.run_id, "held-out")
    inside = "inside" if one.low <= one.observed_final <= one.high else "outside"
    return (
        f"From {text.plural(len(one.fitted_on), 'other run')} the law forecasts "
        f"{text.loss(one.predicted_final)} {loss_unit([sweep])} for the {shape} schedule of {one.run_id}; "
        f"measured: {text.loss(one.observed_final)}, an error of {text.percent(abs(one.relative_error))}, "
        f"{inside} the interval {text.loss(one.low)} to {text.loss(one.high)}."
    )


def time_spent(sweeps: Sequence[Sweep]) -> Figure | str:
    """Return how the running time divides into training, evaluation and probes, one bar a sweep."""
    costs = [cost([sweep]) for sweep in sweeps]
    total = sum(one.total_seconds for one in costs)
    if total <= 0:
        return "No running time has been recorded; it comes with the first committed records."
    longest = max(one.total_seconds for one in costs)
    scale, unit = next(((s, u) for s, u in ((3600.0, "h"), (60.0, "min")) if longest >= 2 * s), (1.0, "s"))
    rows = np.arange(len(sweeps), dtype=np.float64)
    parts = (
        ("training", "c0", [one.training_seconds for one in costs]),
        ("evaluation", "c5", [one.eval_seconds for one in costs]),
        ("probes", "c1", [one.probe_seconds for one in costs]),
    )
    bars = tuple(
        series("bar", np.array(seconds) / scale, rows, name=name, color=color, hover=name)
        for name, color, seconds in parts
    )
    all_of = cost(sweeps)
    shares = [
        f"{name} {text.percent(part / total)}"
        for name, part in (
            ("training", all_of.training_seconds),
            ("evaluation", all_of.eval_seconds),
            ("probes", all_of.probe_seconds),
        )
    ]
    return Figure(
        key="time-spent",
        title="Where the time went",
        takeaway=f"{text.duration(total)} of run time: {', '.join(shares)}.",
        x=Axis(label="run time of all runs, added up", unit=unit, limits=(0.0, 1.04 * longest / scale)),
        panels=(Panel(y=Axis(label="", categories=tuple(sweep.name for sweep in sweeps)), series=bars),),
    )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """The finite values of one probe in a run, in the order of their steps."""

    step: Floats
    value: Floats
    error: Floats
    """Standard error or bound; 0 where there is none."""


def measured(run: Run, probe: str, *, positive: bool = False) -> Measured:
    """Return what a probe measured in a run; of several values at one step (weights that were copied) the last."""
    rows = run.probe(probe)
    step, value, error = (np.asarray(rows[key], dtype=np.float64) for key in ("step", "value", "standard_error"))
    _, last = np.unique(step[::-1], return_index=True)
    kept = len(step) - 1 - last
    kept = kept[np.isfinite(value[kept]) & ((value[kept] > 0) | (not positive))]
    return Measured(step=step[kept], value=value[kept], error=np.nan_to_num(error[kept], posinf=0.0))


def highlighted(runs: Sequence[Run]) -> list[Run]:
    """Return up to three runs to compare: the best, and those with the highest and the lowest peak learning rate."""
    usable = [run for run in runs if run.peak_lr > 0] or list(runs)
    best = min(usable, key=lambda run: (math.isnan(run.loss), run.loss, run.run_id))
    high = max(usable, key=lambda run: (run.peak_lr, run.run_id))
    low = min(usable, key=lambda run: (run.peak_lr, run.run_id))
    picked: list[Run] = []
    for run in (best, high, low):
        if all(run is not one and not math.isclose(run.peak_lr, one.peak_lr, rel_tol=1e-6) for one in picked):
            picked.append(run)
    return picked


def sharpness_runs(sweeps: Sequence[Sweep]) -> list[tuple[Sweep, Run]]:
    """Return the runs that measured a curvature, each with its sweep."""
    return [
        (sweep, run)
        for sweep in sweeps
        for run in sweep.runs
        if any(len(measured(run, probe, positive=True).step) for probe in CURVATURES)
    ]


def legend_entry(run: Run, name: str) -> str:
    """Return the name of a highlighted run in a legend."""
    return f"{name} (peak LR {text.lr(run.peak_lr)})"


def _curvature_axis(label: str, drawn: Sequence[Series], dashed: Sequence[Series]) -> Axis:
    """Return an axis that shows all values, and the limits where they are lowest: at the peak of the learning rate.

    Of other runs what lies tenfold above all that is highlighted is cut off.
    """
    values = np.concatenate([item.y for item in drawn])
    main = [float(item.y.max()) for item in drawn if item.weight != "muted"]
    main += [float(item.y.min()) for item in dashed if len(item.y)]
    highest = float(values.max())
    reach = max([*main, min(highest, 10 * max(main))]) if main else highest
    return Axis(label=label, scale="log", limits=(0.6 * float(values.min()), 2.5 * reach))


def _after_warmup(run: Run) -> tuple[np.ndarray, np.ndarray]:
    x, y = run.evals["step"], run.evals["loss_nats"]
    kept = (x > run.warmup_steps) & np.isfinite(y)
    return np.asarray(x[kept], dtype=np.float64), np.asarray(y[kept], dtype=np.float64)


def _sharpness_takeaway(found: Sequence[tuple[float, str, Limit]]) -> str:
    if not found:
        return "Sharpness was measured, but no learning rate was recorded beside it."
    highest, name, limit = max(found, key=lambda one: (one[0], one[1]))
    known = limit.optimizer or "this optimizer"
    what = f"the limit {limit.formula}" if limit.holds else f"{limit.formula} (for {known} only a yardstick)"
    times = f"{text.number(highest, 3)} times that"
    if highest >= 0.9:
        return f"{name} {'goes beyond' if highest > 1.1 else 'comes to'} {what}: its curvature reaches {times}."
    return f"The runs shown stay below {what}: their curvature reaches {times} at most ({name})."


def _sharpness_note(limits: Sequence[Limit], preconditioned: bool) -> str:
    """Return how to read the figure, as far as it applies to what is drawn."""
    out = SHARPNESS_NOTE + (PRECONDITIONED_NOTE if preconditioned else "")
    out += LIMIT_NOTE if any(limit.holds for limit in limits) else ""
    names = list(dict.fromkeys(limit.optimizer or "other optimizers" for limit in limits if not limit.holds))
    if names:
        out += f" For {text.listing(names)} 2/LR, the limit of plain gradient descent, is only a yardstick."
    if any(name in ("AdamW", "schedule-free AdamW") for name in names):
        out += " [train.probes.preconditioned_sharpness] measures what their own limit is one of."
    return out
