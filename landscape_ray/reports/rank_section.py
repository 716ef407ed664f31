"""The chapter on the rank study: which probe tells how the runs of a page generalise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from landscape_ray import text
from landscape_ray.errors import UserError
from landscape_ray.laws.ranking import Association
from landscape_ray.reports.markup import prose, table
from landscape_ray.reports.ranking import SIGNIFICANT, Found, RankStudy, Row, rank_study
from landscape_ray.reports.views import Sweep, varied_names

if TYPE_CHECKING:
    from landscape_ray.tracking.folder import SweepFolder

NOT_ASKED = "No rank study was made of these runs; `landscape-ray rank` does it."

MAX_WORK = 1.2e7
"""Rows of both tables times runs squared: some four seconds."""


def study(folders: Sequence[SweepFolder], sweeps: Sequence[Sweep]) -> RankStudy | str:
    """Return the rank study of the runs of a page, or in one sentence why there is none.

    Args:
        folders: the sweeps.
        sweeps: the same, opened.
    """
    runs = [run for sweep in sweeps for run in sweep.runs if run.has_result]
    measures = {name for run in runs for name in run.probes["probe"].astype(str).tolist()}
    rows = len(measures) * (1 + 2 * len(varied_names(sweeps)))
    if rows * len(runs) ** 2 > MAX_WORK:
        return (
            f"A rank study of {text.plural(len(measures), 'measure')} over {text.plural(len(runs), 'run')} takes a "
            "while; `landscape-ray rank` does it."
        )
    try:
        return rank_study(folders)
    except UserError as error:
        said = str(error)
        return f"{said[0].upper()}{said[1:]}."


def rank_table(study: RankStudy) -> str:
    """Return the table of all runs as HTML; the parts of measurements, where they are many, under a fold."""
    marked = study.significant(study.overall)
    num_found = sum(isinstance(cell, Association) for row in study.overall for cell in row.cells.values())
    reasons = text.listing(sorted(set(study.excluded.values())))
    left_out = f" ({text.plural(len(study.excluded), 'run')} left out: {reasons})" if study.excluded else ""
    head = (
        f"Kendall's τ of each measure with each target over {text.plural(len(study.runs), 'run')} of "
        f"{text.plural(study.num_configurations, 'configuration')}{left_out}, with its 95 % interval. "
        f"*: p < {SIGNIFICANT:g} after Holm's correction for all {text.plural(num_found, 'comparison')}. "
        "What follows the learning rate correlates with whatever else does: `landscape-ray rank` prints the "
        "correlations at equal settings as well."
    )
    rows = {k: row for k, row in enumerate(study.overall) if "/" not in row.measure} or dict(enumerate(study.overall))
    rest = {k: row for k, row in enumerate(study.overall) if k not in rows}
    out = f'<p class="note">{prose(head)}</p>{_table(study, rows, marked)}'
    if rest:
        name = text.plural(len(rest), "part")
        out += f"<details><summary>{name} of these measures</summary>{_table(study, rest, marked)}</details>"
    return out


def _table(study: RankStudy, rows: dict[int, Row], marked: set[tuple[int, str]]) -> str:
    columns = ["measure", "runs", *study.targets]
    body = []
    for k, row in rows.items():
        counts = [cell.num_runs for cell in row.cells.values() if isinstance(cell, Association)]
        cells = [_cell(row.cells[name], (k, name) in marked) for name in study.targets]
        body.append([row.measure, str(max(counts)) if counts else "–", *cells])
    return table(columns, body, texts=(0,))


def _cell(found: Found, marked: bool) -> str:
    if isinstance(found, str):
        return found
    mark = "*" if marked else ""
    return f"{text.signed(found.tau, 2)}{mark} [{text.signed(found.low, 2)}, {text.signed(found.high, 2)}]"
