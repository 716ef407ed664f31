"""The section on the law: what was fitted, how far it can be trusted, and every forecast of a held-out schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from landscape_ray import text
from landscape_ray.reports.insight import forecast_sentence
from landscape_ray.reports.law_checks import checks
from landscape_ray.reports.markup import table, warnings
from landscape_ray.reports.views import Sweep

FORMULA = (
    "<p><i>L</i>(s) = <i>L</i><sub>0</sub> + <i>A</i> · S<sub>1</sub>(s)<sup>−<i>α</i></sup> "
    "− <i>C</i> · S<sub>2</sub>(s)</p>"
)

STATUS_SENTENCE = {
    "certified": "The fit is certified: the optimum was found and the data determine the parameters.",
    "weak": "The fit is weak: it describes these curves, but the data do not pin its parameters down.",
    "failed": "The fit failed: the search did not end at an optimum. Do not use it.",
}

PARAMETER_MEANING = {
    "L0": "loss that remains after unlimited training at this setting (nats/token)",
    "A": "size of the part of the loss that training removes",
    "C": "gain in loss per unit of annealing area S₂",
    "alpha": "exponent: how fast the loss falls with the summed learning rate S₁",
    "decay": "forgetting factor of the annealing momentum, chosen from a grid",
}


def law(sweep: Sweep, sweeps: Sequence[Sweep]) -> str:
    """Return the fitted law of one sweep in words and tables: parameters, status, warnings, all forecasts."""
    saved = sweep.fit
    assert saved is not None
    fit = saved.fit
    head = f"<h3>The law{escape(f' of {sweep.name}') if len(sweeps) > 1 else ''}</h3>"
    words = (
        f"Fitted on {text.plural(fit.data['num_points'], 'point')} of {text.plural(len(saved.run_ids), 'run')} at "
        f"peak LR {text.lr(saved.peak_lr)}. S₁ is the summed LR up to step s, S₂ the annealing area: how much the rate "
        "has been lowered, felt with a delay (Tissue et al. 2024, arXiv 2408.11029). Losses up to step "
        f"{fit.data['skip_steps']} are left out: the law describes what comes after the initial transient."
    )
    rows = []
    for name, value in fit.parameters.items():
        interval = fit.intervals.get(name)
        between = f"{text.number(interval[0], 5)} to {text.number(interval[1], 5)}" if interval else "–"
        rows.append([name, text.number(value, 5), between, PARAMETER_MEANING.get(name, "")])
    level = f"{fit.confidence:.0%} interval".replace("%", " %")
    parameters = table(["parameter", "value", level, "meaning"], rows, texts=(0, 3))
    certificate = fit.certificate
    how = (
        f"{text.percent(certificate['agree_share'])} of {certificate['num_starts']} starts agree on the optimum; "
        f"condition number {text.number(certificate['condition_number'], 3)}; root mean square residual "
        f"{text.number(fit.residuals['rmse'], 3)} nats; "
        f"{certificate['points_per_parameter']:.0f} points per parameter."
    )
    mark = "good" if fit.status == "certified" else "bad"
    status = (
        f'<p><span class="{mark}">{escape(fit.status)}</span> {escape(STATUS_SENTENCE[fit.status])} {escape(how)}</p>'
    )
    known = [f"{run_id}: {why}" for run_id, why in sorted(saved.excluded.items())]
    left = "".join(f"<li>{escape(one)}</li>" for one in known)
    dropped = (
        f"<details><summary>Runs that are not in the fit ({len(known)})</summary><ul>{left}</ul></details>"
        if known
        else ""
    )
    return (
        f"{head}{FORMULA}<p>{escape(words)}</p>{status}{parameters}"
        f"{warnings('Read before use', [*fit.reasons, *(_plain_warning(one) for one in fit.warnings)])}"
        f"<h3>How it was checked</h3>{checks(saved)}"
        f"<h3>Every schedule forecast from the others</h3><p>{escape(_forecast_summary(sweep))}</p>"
        f"{_forecast_table(sweep)}{dropped}"
    )


def _forecast_summary(sweep: Sweep) -> str:
    assert sweep.fit is not None
    forecasts = sweep.fit.forecasts
    inside = sum(one.low <= one.observed_final <= one.high for one in forecasts)
    mean = sum(abs(one.relative_error) for one in forecasts) / len(forecasts)
    level = sweep.fit.fit.confidence
    claim = (
        f" That is too few for intervals of {level:.0%}: on this sweep they understate the error."
        if coverage_chance(inside, len(forecasts), level) < 0.05
        else ""
    ).replace("%", " %")
    return (
        f"{forecast_sentence(sweep)} Over all {len(forecasts)} forecasts the mean error is {text.percent(mean)}; "
        f"{inside} of {len(forecasts)} measured losses lie inside their interval.{claim}"
    )


def coverage_chance(inside: int, total: int, level: float) -> float:
    """Return the probability that at most `inside` of `total` independent intervals of a level hold the truth.

    >>> round(coverage_chance(0, 2, 0.9), 10), coverage_chance(5, 5, 0.9)
    (0.01, 1.0)
    """
    if inside == total:
        return 1.0
    return sum(math.comb(total, k) * level**k * (1 - level) ** (total - k) for k in range(inside + 1))


def _forecast_table(sweep: Sweep) -> str:
    assert sweep.fit is not None
    rows = []
    for one in sweep.fit.forecasts:
        headline = " (headline)" if one.run_id == sweep.fit.headline else ""
        inside = "yes" if one.low <= one.observed_final <= one.high else "no"
        rows.append(
            [
                one.run_id + headline,
                sweep.fit.shapes.get(one.run_id, "–"),
                text.loss(one.observed_final),
                text.loss(one.predicted_final),
                f"{text.loss(one.low)} to {text.loss(one.high)}",
                inside,
                text.signed(100 * one.relative_error, 2) + " %",
                text.number(one.curve_mae, 3),
                one.status,
            ]
        )
    level = f"{sweep.fit.fit.confidence:.0%} interval".replace("%", " %")
    columns = [
        "held out",
        "schedule",
        "measured",
        "forecast",
        level,
        "inside",
        "error",
        "mean curve error",
        "fit",
    ]
    return table(columns, rows, texts=(0, 1, 5, 8))


def _plain_warning(warning: str) -> str:
    """Return a warning `name: sentence` as the sentence."""
    name, separator, sentence = warning.partition(": ")
    if not separator or " " in name:
        return warning
    # a sentence may begin with the name of a run, which is not ours to change
    first = sentence.split(" ", 1)[0]
    return sentence[:1].upper() + sentence[1:] if first.isalpha() else sentence
