"""The text of a law's fit, for its own page and for a report: what it says, how far to trust it, the full record."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from landscape_ray import text
from landscape_ray.analysis.scaling import ScalingFit
from landscape_ray.laws import FitResult, Law
from landscape_ray.laws.optima.surface import NAME as STEP_LAW
from landscape_ray.laws.trust.checklist import SECTIONS, from_plain
from landscape_ray.reports import step_tables
from landscape_ray.reports.law_section import STATUS_SENTENCE
from landscape_ray.reports.markup import table, warnings

VERDICTS = {"ok": "", "warning": "read", "refusal": "do not use", "unknown": "not known"}


def summary(found: ScalingFit) -> str:
    """Return the law, its status and what to read before use."""
    fit, law = found.fit, found.law
    objective = fit.objective
    delta = f" (threshold {objective['huber_delta']:g})" if objective["huber_delta"] else ""
    return (
        f'<p class="lead"><code>{escape(law.formula)}</code></p>'
        f"<p>{escape(law.reference)}. Fitted to {text.plural(fit.data['num_points'], 'point')} of "
        f"{text.plural(len(set(found.run_ids)), 'run')} from {escape(found.source)}, by "
        f"{escape(objective['name'].replace('_', ' '))}{delta} of {escape(objective['of'])}.</p>"
        f"{verdict(fit)}"
    )


def verdict(fit: FitResult) -> str:
    """Return the status of a fit, how its optimum was found, and what to read before use."""
    mark = "good" if fit.status == "certified" else "bad"
    certificate = fit.certificate
    how = (
        f"{text.percent(certificate['agree_share'])} of {certificate['num_starts']} starts agree on the optimum; "
        f"condition number {text.number(certificate['condition_number'], 3)}; "
        f"{certificate['points_per_parameter']:.0f} points per parameter."
    )
    counts = fit.checklist.get("counts", {})
    return (
        f'<p><span class="{mark}">{escape(fit.status)}</span> {escape(STATUS_SENTENCE[fit.status])} {escape(how)}</p>'
        f"<p>{text.plural(counts.get('warning', 0), 'warning')}, {text.plural(counts.get('unknown', 0), 'unknown')} "
        f"and {text.plural(counts.get('ok', 0), 'item')} without objection in the record below.</p>"
        f"{warnings('Read before use', [*fit.reasons, *fit.warnings])}"
    )


def numbers(found: ScalingFit) -> str:
    """Return what a law says in numbers: its parameters; of the step law the power products first."""
    own = parameters(found.fit, found.law)
    if found.law_path != STEP_LAW:
        return own
    head, rows = step_tables.products(found)
    return (
        f"{table(head, rows, texts=(0, 3))}"
        f"<details><summary>Parameters of the surface, with the floor of every group</summary>{own}</details>"
    )


def parameters(fit: FitResult, law: Law) -> str:
    """Return the parameters with their intervals and meanings, and the size of the residuals."""
    rows = []
    for name, value in fit.parameters.items():
        interval = fit.intervals.get(name)
        between = f"{text.number(interval[0], 5)} to {text.number(interval[1], 5)}" if interval else "–"
        rows.append(
            [name, text.number(value, 6), "given" if name in fit.fixed else between, law.parameter(name).meaning]
        )
    level = f"{fit.confidence:.0%} interval".replace("%", " %")
    residuals = (
        f"<p>Root mean square residual {text.number(fit.residuals['rmse'], 3)} {escape(law.response.unit)}, largest "
        f"{text.number(fit.residuals['max_abs'], 3)}; R² {fit.residuals['r2']:.5f}.</p>"
    )
    return table(["parameter", "value", level, "meaning"], rows, texts=(0, 3)) + residuals


def beyond(found: ScalingFit) -> str:
    """Return its forecasts beyond what it was fitted to."""
    items = "".join(f"<li>{escape(one)}</li>" for one in found.rollouts) or "<li>nothing could be held out</li>"
    misfit = (
        f"<p>Intervals of predictions hold a misfit of {text.percent(found.fit.misfit)} for it.</p>"
        if found.fit.misfit
        else ""
    )
    return f"<ul>{items}</ul>{misfit}"


def record(fit: FitResult) -> str:
    """Return the record of a fit, a table a section."""
    parts = []
    for key, title in SECTIONS.items():
        items = [item for item in from_plain(fit.checklist) if item.section == key]
        rows = [[item.name, VERDICTS[item.verdict], item.value, item.remark] for item in items]
        if rows:
            parts.append(f"<h3>{key} {escape(title.capitalize())}</h3>")
            parts.append(table(["item", "", "recorded", "remark"], rows, texts=(0, 1, 2, 3), wrapped=(0, 2, 3)))
    return "".join(parts)


def excluded(runs: Mapping[str, str]) -> str:
    """Return the runs that are not in a fit with the reasons, folded up."""
    if not runs:
        return ""
    items = "".join(f"<li>{escape(f'{run}: {why}')}</li>" for run, why in runs.items())
    return f"<details><summary>Not in the fit ({len(runs)})</summary><ul>{items}</ul></details>"


def section(found: ScalingFit) -> str:
    """Return the text of a law as a part of a report; its record unfolds."""
    title = (found.law.title or found.law.name).capitalize()
    return (
        f"<h3>{escape(title)}</h3>{summary(found)}{numbers(found)}"
        f"<p>Forecast from the other runs:</p>{beyond(found)}"
        f"<details><summary>How it was made and checked</summary>{record(found.fit)}</details>"
        f"{excluded(found.excluded)}"
    )
