"""One page about one scaling law: what it says, how far it can be trusted, and the full record of how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from landscape_ray import text
from landscape_ray.analysis.scaling import PAGE_NAME, ScalingFit
from landscape_ray.files import write_atomic
from landscape_ray.laws import FitResult, Law
from landscape_ray.laws.trust.checklist import SECTIONS, from_plain
from landscape_ray.reports import fit_figures
from landscape_ray.reports.figures import Figure
from landscape_ray.reports.law_section import STATUS_SENTENCE
from landscape_ray.reports.markup import head, table, warnings
from landscape_ray.reports.page import block, page_of

ANCHORS = (
    ("law", "The law"),
    ("measured", "Against what was measured"),
    ("unseen", "On what it has not seen"),
    ("record", "How it was made and checked"),
)

VERDICTS = {"ok": "", "warning": "read", "refusal": "do not use", "unknown": "not known"}


def write_page(found: ScalingFit, folder: Path) -> Path:
    """Write the page into a folder and return its path."""
    path = folder / PAGE_NAME
    write_atomic(path, render(found))
    return path


def render(found: ScalingFit) -> str:
    """Return the page as HTML."""
    drawn = figures(found)
    by_key = {figure.key: figure for figure in drawn}
    bodies = {
        "law": block(by_key["law"]) + parameter_table(found.fit, found.law),
        "measured": "".join(block(figure) for figure in drawn if figure.key != "law"),
        "unseen": _beyond(found),
        "record": record_tables(found.fit) + excluded_runs(found.excluded),
    }
    facts = ["landscape_ray law", found.source, found.law.name]
    title = (found.law.title or found.law.name).capitalize()
    parts = [head(title, facts, ANCHORS), _summary(found)]
    parts += [f'<section><h2 id="{key}">{escape(name)}</h2>{bodies[key]}</section>' for key, name in ANCHORS]
    return page_of(f"{found.law.name}: {found.source}", parts, drawn)


def figures(found: ScalingFit) -> list[Figure]:
    """Return the figures of the page, in order."""
    return [fit_figures.law_figure(found), fit_figures.agreement_figure(found), *fit_figures.residual_figures(found)]


def _summary(found: ScalingFit) -> str:
    fit, law = found.fit, found.law
    objective = fit.objective
    delta = f" (threshold {objective['huber_delta']:g})" if objective["huber_delta"] else ""
    return (
        f'<p class="lead"><code>{escape(law.formula)}</code></p>'
        f"<p>{escape(law.reference)}. Fitted to {text.plural(fit.data['num_points'], 'point')} of "
        f"{text.plural(len(fit.data['runs']), 'run')} from {escape(found.source)}, by "
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
        f"<p>{counts.get('warning', 0)} warnings, {counts.get('unknown', 0)} unknowns and {counts.get('ok', 0)} items "
        "without objection in the record below.</p>"
        f"{warnings('Read before use', [*fit.reasons, *fit.warnings])}"
    )


def parameter_table(fit: FitResult, law: Law) -> str:
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


def _beyond(found: ScalingFit) -> str:
    items = "".join(f"<li>{escape(one)}</li>" for one in found.rollouts) or "<li>nothing could be held out</li>"
    misfit = (
        f"<p>Intervals of predictions hold a misfit of {text.percent(found.fit.misfit)} for it.</p>"
        if found.fit.misfit
        else ""
    )
    return f"<ul>{items}</ul>{misfit}"


def record_tables(fit: FitResult) -> str:
    """Return the record of a fit, a table a section."""
    parts = []
    for key, title in SECTIONS.items():
        items = [item for item in from_plain(fit.checklist) if item.section == key]
        rows = [[item.name, VERDICTS[item.verdict], item.value, item.remark] for item in items]
        if rows:
            parts.append(f"<h3>{key} {escape(title.capitalize())}</h3>")
            parts.append(table(["item", "", "recorded", "remark"], rows, texts=(0, 1, 2, 3), wrapped=(0, 2, 3)))
    return "".join(parts)


def excluded_runs(excluded: Mapping[str, str]) -> str:
    """Return the runs that are not in a fit with the reasons, folded up."""
    if not excluded:
        return ""
    items = "".join(f"<li>{escape(f'{run}: {why}')}</li>" for run, why in excluded.items())
    return f"<details><summary>Not in the fit ({len(excluded)})</summary><ul>{items}</ul></details>"
