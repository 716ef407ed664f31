"""The tables of a rank study in a terminal: all runs, and comparable runs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from landscape_ray import text
from landscape_ray.errors import UserError
from landscape_ray.laws.ranking import Association
from landscape_ray.reports.ranking import SIGNIFICANT, Found, RankStudy, Row, correlations, definitions, left_out
from landscape_ray.tables import TextTable


def rank_tables(study: RankStudy, given: str | None = None) -> RenderableType:
    """Return the study as two tables: all runs, and comparable runs.

    Args:
        study: what to show.
        given: hyperparameter whose comparisons are shown; None for all.

    Raises:
        UserError: the runs do not differ in it.
    """
    if given is not None and given not in study.settings:
        raise UserError(
            f"--given must be a setting that the runs differ in ({text.listing(list(study.settings))}), got '{given}'"
        )
    chosen = [row for row in study.conditional if given is None or given in row.compared.split()]
    names = ", ".join(sweep.name for sweep in study.sweeps)
    head = Text.assemble(
        (f"rank study of {names}: ", "bold"),
        f"{text.plural(len(study.runs), 'run')} of {text.plural(study.num_configurations, 'configuration')}",
        left_out(study.excluded),
    )
    notes = [definitions(study)]
    for rows, title in ((study.overall, "first"), (study.conditional, "second")):
        if rows:
            number = len(correlations(rows))
            notes.append(f"{title} table: {text.plural(number, 'comparison')}, {len(study.significant(rows))} marked")
    notes[1:] = [f"*: p < {SIGNIFICANT:g} after Holm's correction for all of its table ({'; '.join(notes[1:])})."]
    cells = [cell for row in study.conditional for cell in row.cells.values() if isinstance(cell, Association)]
    adjusted = sorted({name for cell in cells for name in cell.adjusted_for})
    if adjusted:
        notes.append(
            f"~: too few pairs are equal in {text.listing(adjusted)}; their effect on the ranks was subtracted instead."
        )
    others = [name for name in study.settings if name != given]
    if given is not None and len(chosen) < len(study.conditional):
        notes.append(f"Not shown: the same for {text.listing(others)} (--given NAME, or --given all).")
    tables = [_rich_table(study, rows) for rows in (study.overall, chosen) if rows]
    return Group(head, Text(), *[part for table in tables for part in (table, Text())], *[Text(n) for n in notes])


def _rich_table(study: RankStudy, rows: Sequence[Row]) -> TextTable:
    marked = study.significant(rows)
    headings = ["measure", "runs compared", "pairs", *study.targets]
    body = []
    last = ""
    for k, row in enumerate(rows):
        known = sorted({cell.num_pairs for cell in row.cells.values() if isinstance(cell, Association)})
        pairs = "–" if not known else str(known[0]) if len(known) == 1 else f"{known[0]}–{known[-1]}"
        cells = [_cell_text(cell, (k, name) in marked) for name, cell in row.cells.items()]
        body.append(["" if row.measure == last else row.measure, row.compared, pairs, *cells])
        last = row.measure
    table = TextTable(headings, right=("pairs",))
    for line in body:
        table.add_row(*line)
    return table


def _cell_text(cell: Found, marked: bool) -> str:
    if isinstance(cell, str):
        return cell.replace(": ", "\n", 1)
    mark = ("*" if marked else "") + ("~" if cell.adjusted_for else "")
    return f"{text.signed(cell.tau, 2)}{mark}\n{text.signed(cell.low, 2)} to {text.signed(cell.high, 2)}"
