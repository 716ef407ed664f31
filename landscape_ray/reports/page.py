"""The report: one HTML file that opens without a network, and the same figures as PNG files."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from landscape_ray.errors import UserError
from landscape_ray.files import write_atomic
from landscape_ray.reports import (
    charts,
    fit_figures,
    fit_section,
    insight,
    law_section,
    population,
    probe_section,
    rank_section,
    recommendation,
    sections,
)
from landscape_ray.reports.figures import Figure, palette
from landscape_ray.reports.importance_figure import importance
from landscape_ray.reports.interactive import legend, plotly_js, specification
from landscape_ray.reports.markup import prose
from landscape_ray.reports.rank_figure import rank_figure
from landscape_ray.reports.ranking import RankStudy
from landscape_ray.reports.template import PAGE, POLICY, SCRIPT, STYLE
from landscape_ray.reports.views import Sweep, open_sweep

if TYPE_CHECKING:
    from landscape_ray.tracking.folder import SweepFolder

Folders: TypeAlias = "SweepFolder | Path | str | Sequence[SweepFolder | Path | str]"

ImageKind: TypeAlias = Literal["png", "svg"]

PIXELS_PER_PANEL = 400

NUM_LARGE_PANELS = 3
"""A figure with more panels than this has small ones."""

PIXELS_PER_SMALL_PANEL, PIXELS_BETWEEN, MAX_TICKS, MAX_NAME = 165, 26, 5, 18

MARKS = {
    "circle": '<circle cx="13" cy="7" r="4.5" fill="currentColor"/>',
    "square": '<rect x="9" y="3" width="8" height="8" fill="currentColor"/>',
    "diamond": '<path d="M13 1.5 18 7l-5 5.5L8 7z" fill="currentColor"/>',
    "triangle-up": '<path d="M13 2 18 11H8z" fill="currentColor"/>',
    "cross": '<path d="M9 3l8 8M17 3l-8 8" stroke="currentColor" stroke-width="3"/>',
    "triangle-down": '<path d="M13 12 18 3H8z" fill="currentColor"/>',
    "star": '<path d="M13 1l2 4 4 .4-3 3 1 4.600-4-2.400-4 2.400 1-4.600-3-3 4-.4z" fill="currentColor"/>',
    "band": '<rect x="2" y="2" width="22" height="10" rx="2" fill="currentColor" opacity=".35"/>',
    "bar": '<rect x="6" y="2" width="14" height="10" rx="2" fill="currentColor"/>',
    "arrow": '<path d="M2 7h17" stroke="currentColor" stroke-width="2"/><path d="M18 3l6 4-6 4z" fill="currentColor"/>',
}
"""Small drawings of the marks of a legend, in a box of 26 x 14."""


def write_report(folders: Folders, out: Path | None = None) -> Path:
    """Write one HTML page about one sweep or several and return its path.

    Args:
        folders: a sweep folder, or several that are shown together, such as a search and a population.
        out: the file to write; None for `report.html` in the first sweep's folder.

    Raises:
        UserError: no folder given, not a sweep folder, or the page cannot be written.
    """
    opened = _open(folders)
    path = Path(out) if out is not None else opened[0].report_path
    sweeps = [open_sweep(folder) for folder in opened]
    write_atomic(path, render_page(sweeps, rank_section.study(opened, sweeps)))
    return path


def export_figures(folders: Folders, out_dir: Path, kinds: Sequence[ImageKind] = ("png", "svg")) -> list[Path]:
    """Write every figure that has data as image files and return the paths.

    Args:
        folders: a sweep folder or several.
        out_dir: where to write; made when missing.
        kinds: png (1280 pixels wide), svg, or both.

    Raises:
        UserError: no folder given, not a sweep folder, or a file cannot be written.
    """
    from landscape_ray.reports.static import render  # matplotlib takes a second to import, the page does without

    paths = []
    opened = _open(folders)
    sweeps = [open_sweep(folder) for folder in opened]
    for figure in figures(sweeps, rank_section.study(opened, sweeps)):
        for kind in kinds:
            path = Path(out_dir) / f"{figure.key}.{kind}"
            write_atomic(path, render(figure, kind))
            paths.append(path)
    return paths


def figures(sweeps: Sequence[Sweep], study: RankStudy | str = rank_section.NOT_ASKED) -> list[Figure]:
    """Return the figures of a report that have data, in the order of the page."""
    return [item for drawn in _drawings(sweeps, study).values() for item in drawn if isinstance(item, Figure)]


def render_page(sweeps: Sequence[Sweep], study: RankStudy | str = rank_section.NOT_ASKED) -> str:
    """Return the whole page; equal sweeps give equal text.

    Args:
        sweeps: at least one.
        study: the rank study of their runs, or the sentence that says why there is none.
    """
    drawings = _drawings(sweeps, study)
    parts = [sections.heading(sweeps), sections.found(sweeps)]

    def chapter(key: str, title: str, before: str = "", after: str = "") -> None:
        drawn = "".join(block(item) for item in drawings.get(key, []))
        parts.append(f'<section><h2 id="{key}">{html.escape(title)}</h2>{before}{drawn}{after}</section>')

    chapter("use", "Recommendation", after=recommendation.recommendation(sweeps))
    chapter("curves", "Loss curves", after=sections.variants(sweeps))
    members = "".join(population.survivors_table(sweeps, sweep) for sweep in sweeps if sweep.population)
    chapter("schedules", "Schedules", after=members)
    chapter("search", "What mattered")
    chapter("sharpness", "Sharpness")
    chapter("probes", "Probes", after=probe_section.probe_tables(sweeps))
    ranked = rank_section.rank_table(study) if isinstance(study, RankStudy) else ""
    chapter("ranking", "What ranks generalisation", after=ranked)
    laws = "".join(law_section.law(sweep, sweeps) for sweep in sweeps if sweep.fit)
    laws += "".join(fit_section.section(found) for sweep in sweeps for found in sweep.scaling)
    chapter("law", "Law and forecast", after=laws)
    chapter("runs", "All runs", before=sections.runs_table(sweeps))
    chapter("cost", "Cost", after=sections.cost_text(sweeps))
    chapter("again", "How to run it again", before=sections.reproduce(sweeps))
    shown = [item for drawn in drawings.values() for item in drawn if isinstance(item, Figure)]
    return page_of(sections.title(sweeps), parts, shown)


def page_of(title: str, parts: Sequence[str], shown: Sequence[Figure]) -> str:
    """Return a page that needs no network.

    Args:
        title: of the browser's tab.
        parts: HTML of the body, with the places of the figures in it, see :func:`block`.
        shown: the figures that have a place.
    """
    data = {
        "themes": {"light": palette("light"), "dark": palette("dark")},
        "figures": {figure.key: _embedded(figure) for figure in shown},
    }
    return PAGE.format(
        title=html.escape(title),
        policy=html.escape(POLICY),
        style=STYLE,
        body="\n".join(parts),
        figures=safe_json(data),
        plotly=plotly_js(),
        script=SCRIPT,
    )


def safe_json(data: Any) -> str:
    r"""Return JSON that cannot end the script element it stands in, whatever the data says.

    >>> safe_json({"a": "</script><b>&"})
    '{"a":"\\u003c/script\\u003e\\u003cb\\u003e\\u0026"}'
    """
    dumped = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        dumped = dumped.replace(character, f"\\u{ord(character):04x}")
    return dumped


def _drawings(sweeps: Sequence[Sweep], study: RankStudy | str) -> dict[str, list[Figure | str]]:
    """Return the figures of every chapter, or in their place the sentence that says why there is none."""
    populations = [sweep for sweep in sweeps if sweep.population]
    schedules: list[Figure | str] = [charts.schedules(sweeps)] if len(populations) < len(sweeps) else []
    schedules += [population.lineage(sweeps, sweep) for sweep in populations]
    # a population has no fixed schedules, so nobody expects a law of it unless one was fitted
    lawful = [sweep for sweep in sweeps if sweep.fit or not sweep.population] or list(sweeps)
    keys = [f"forecast-{index}" if len(lawful) > 1 else "forecast" for index in range(len(lawful))]
    forecasts = [insight.forecast(sweep, key) for sweep, key in zip(lawful, keys, strict=True)]
    searches = [sweep for sweep in sweeps if not sweep.population]
    mattered = [
        importance(sweep, f"importance-{index}" if len(searches) > 1 else "importance")
        for index, sweep in enumerate(searches)
    ]
    return {
        "curves": [charts.loss_curves(sweeps), charts.generalisation(sweeps)],
        "schedules": schedules,
        "search": [charts.search_result(sweeps), *mattered],
        "sharpness": [insight.sharpness(sweeps)],
        "probes": [probe_section.probes(sweeps)],
        "ranking": [rank_figure(study) if isinstance(study, RankStudy) else study],
        "law": [*forecasts, *_scaling(sweeps)],
        "cost": [insight.time_spent(sweeps)],
    }


def _scaling(sweeps: Sequence[Sweep]) -> list[Figure]:
    """Return the figures of the scaling laws that were fitted to the sweeps, under keys of their own."""
    found = [fit for sweep in sweeps for fit in sweep.scaling]
    return [
        dataclasses.replace(figure, key=f"law-{index}-{figure.key}", title=f"{figure.title}: {fit.law.name}")
        for index, fit in enumerate(found)
        for figure in fit_figures.figures(fit)
    ]


def block(item: Figure | str) -> str:
    """Return a figure's place in the page, or the reason that there is none."""
    if isinstance(item, str):
        return f'<p class="empty">{prose(item)}</p>'
    note = f'<p class="note">{prose(item.note)}</p>' if item.note else ""
    save = "".join(
        f'<button type="button" class="save" data-figure="{item.key}" data-kind="{kind}" '
        f'title="Save this figure as {kind.upper()}">{kind.upper()}</button>'
        for kind in ("png", "svg")
    )
    caption = f'<h3>{html.escape(item.title)}{save}</h3><p class="takeaway">{prose(item.takeaway)}</p>'
    said = html.escape(f"{item.title}. {item.takeaway}")
    return (
        f'<figure id="figure-{item.key}"><figcaption>{caption}</figcaption>'
        f'<div class="legend" id="legend-{item.key}">{"".join(_legend_buttons(item))}</div>'
        f'<div class="plot" id="plot-{item.key}" role="img" aria-label="{said}"></div>{note}</figure>'
    )


def _legend_buttons(figure: Figure) -> Iterable[str]:
    for index, entry in enumerate(legend(figure)):
        yield (
            f'<button type="button" aria-pressed="true" data-figure="{figure.key}" data-index="{index}" '
            f'data-color="{entry["color"]}">{_swatch(entry)}{html.escape(entry["name"])}</button>'
        )


def _swatch(entry: dict[str, str]) -> str:
    """Return a small drawing of a series as it looks in the figure."""
    if entry["mark"] in MARKS:
        shape = MARKS[entry["mark"]]
    else:
        dash = {"dash": ' stroke-dasharray="6 4"', "dot": ' stroke-dasharray="2 3"'}.get(entry["mark"], "")
        width = {"main": 3.5, "normal": 2.2, "muted": 1.6}[entry["weight"]]
        shape = f'<path d="M2 7h22" stroke="currentColor" stroke-width="{width}"{dash}/>'
    return f'<svg width="26" height="14" viewBox="0 0 26 14" aria-hidden="true">{shape}</svg>'


def _embedded(figure: Figure) -> dict[str, Any]:
    """Return what the page's script needs of a figure."""
    rows = max(len(panel.y.categories) for panel in figure.panels)
    bars = any(series.role == "bar" for panel in figure.panels for series in panel.series)
    num_panels = len(figure.panels)
    height = 90 + 44 * rows if bars else PIXELS_PER_PANEL + 260 * (num_panels - 1)
    names = [html.escape(entry["name"]) for entry in legend(figure)]
    traces = specification(figure)
    if num_panels > NUM_LARGE_PANELS:
        height = 60 + PIXELS_PER_SMALL_PANEL * num_panels
        _shrink(traces["layout"], num_panels, PIXELS_BETWEEN / height)
    for trace in traces["data"]:
        if "legendgroup" in trace:
            trace["legendgroup"] = html.escape(trace["legendgroup"])
    return {**traces, "height": height, "legend": names}


def _shrink(layout: dict[str, Any], num_panels: int, gap: float) -> None:
    """Stack panels of one height with a gap, a share of the whole, between them; few ticks, and long names broken."""
    size = (1 - gap * (num_panels - 1)) / num_panels
    for index in range(num_panels):
        axis, bottom = layout[f"yaxis{index + 1}" if index else "yaxis"], (num_panels - 1 - index) * (size + gap)
        axis["title"]["text"] = _broken(axis["title"]["text"])
        axis["domain"] = [round(bottom, 6), round(min(bottom + size, 1.0), 6)]
        if "tickvals" in axis:
            every = math.ceil(len(axis["tickvals"]) / MAX_TICKS)
            axis |= {"tickvals": axis["tickvals"][::every], "ticktext": axis["ticktext"][::every]}
        else:
            axis["nticks"] = MAX_TICKS


def _broken(name: str) -> str:
    """Return the name of a probe, as HTML, in two lines where it is long.

    >>> _broken("trace"), _broken("average_case_sharpness")
    ('trace', 'average_case_<br>sharpness')
    """
    places = [k + 1 for k, character in enumerate(name) if character == "_"]
    if len(name) <= MAX_NAME or not places:
        return name
    middle = min(places, key=lambda place: abs(place - len(name) / 2))
    return f"{name[:middle]}<br>{name[middle:]}"


def _open(folders: Folders) -> list[SweepFolder]:
    from landscape_ray.tracking.folder import SweepFolder  # pyarrow is needed here only

    one = isinstance(folders, (SweepFolder, str, os.PathLike))
    given: list[Any] = [folders] if one else list(folders)  # type: ignore[arg-type]
    if not given:
        raise UserError("folders must name at least one sweep, got none; give the path of a sweep folder")
    return [item if isinstance(item, SweepFolder) else SweepFolder.open(Path(item)) for item in given]
