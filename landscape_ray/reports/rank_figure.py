"""The figure of a rank study: the measures that rank the gap best, against it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from landscape_ray import text
from landscape_ray.laws.ranking import Association
from landscape_ray.reports.charts import describe
from landscape_ray.reports.figures import Axis, ColorBar, Figure, Panel, sequential, series
from landscape_ray.reports.ranking import RankStudy, Row, definitions, main_setting, spoken
from landscape_ray.reports.views import loss_unit

MAX_PANELS = 3


def rank_figure(study: RankStudy) -> Figure:
    """Return the measures that rank the gap best against it, one mark a run, coloured by its peak learning rate."""
    ranked = _ranked(study)
    peaks = [run.peak_lr for run in study.runs.values()]
    coloured = min(peaks) > 0 and max(peaks) > 1.0001 * min(peaks)
    low, high = (math.log10(min(peaks)), math.log10(max(peaks))) if coloured else (0.0, 0.0)
    panels = []
    for row in _shown(study, ranked) or ranked[:1]:
        marks, shown = [], []
        for (name, run), measured, target in zip(
            study.runs.items(), study.measures[row.measure], study.targets[study.headline], strict=True
        ):
            if math.isfinite(measured) and math.isfinite(target):
                color = sequential(math.log10(run.peak_lr), low, high) if coloured else "c0"
                hover = f"{describe(run, name)} · {row.measure}"
                marks.append(series("points", [target], [measured], color=color, size=10, hover=hover))
                shown.append(measured)
        wide = min(shown, default=0.0) > 0 and max(shown) > 8 * min(shown)
        found = row.cells[study.headline]
        tau = "–" if isinstance(found, str) else text.signed(found.tau, 2)
        axis = Axis(label=f"{row.measure} (τ {tau})", scale="log" if wide else "linear")
        panels.append(Panel(y=axis, series=tuple(marks)))
    return Figure(
        key="rank",
        title=f"How measures rank the {spoken(study)}",
        takeaway=_takeaway(study, ranked),
        x=Axis(label=spoken(study), unit=loss_unit(study.sweeps)),
        panels=tuple(panels),
        note=definitions(study),
        colorbar=ColorBar(label="log₁₀ of the peak learning rate", best=low, worst=high) if coloured else None,
    )


def _shown(study: RankStudy, ranked: Sequence[Row]) -> list[Row]:
    """Return the rows that the figure has a panel for: of a measure and its parts, which mostly go together, one."""
    best: dict[str, Row] = {}
    for row in ranked:
        if isinstance(row.cells[study.headline], Association):
            best.setdefault(row.measure.partition("/")[0], row)
    return list(best.values())[:MAX_PANELS]


def _ranked(study: RankStudy) -> list[Row]:
    """Return the rows of all runs, those with the strongest correlations with the headline target first."""

    def strength(row: Row) -> float:
        found = row.cells[study.headline]
        return -1.0 if isinstance(found, str) else abs(found.tau)

    return sorted(study.overall, key=strength, reverse=True)


def _takeaway(study: RankStudy, ranked: Sequence[Row]) -> str:
    best, target = ranked[0], study.headline
    found = best.cells[target]
    if isinstance(found, str):
        return f"No measure can be ranked with the {target}: {found}."
    marked = (study.overall.index(best), target) in study.significant(study.overall)
    certain = "" if marked else "; that may be chance"
    said = f"{best.measure} ranks the {target} {'best' if len(ranked) > 1 else 'as follows'}: τ {_tau(found)}{certain}."
    name = main_setting(study)
    wanted = (best.measure, f"{name} is equal")
    at_equal = next((row.cells[target] for row in study.conditional if (row.measure, row.compared) == wanted), "")
    return f"{said} At equal {name}: τ {_tau(at_equal)}." if isinstance(at_equal, Association) else said


def _tau(found: Association) -> str:
    return f"{text.signed(found.tau, 2)} ({text.signed(found.low, 2)} to {text.signed(found.high, 2)})"
