"""Tables in a terminal: names and numbers are whole at any width."""

import io
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.text import Text

from landscape_ray.reports.law_tables import law_table
from landscape_ray.sweep.display import Row, trial_table
from landscape_ray.tables import LEAST, TextTable


def printed(table, width, terminal=True):
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    console.print(table, crop=False)
    return console.file.getvalue().splitlines()


WORDS = st.text("ab9.[]界é", max_size=30)


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), max_size=4), st.integers(1, 100))
def test_only_flexible_columns_give_way(rows, width):
    table = TextTable(("name", "loss", "remark"), right=("loss",), flexible=("remark",), title="what it is")
    for row in rows:
        table.add_row(*row)
    lines = printed(table, width)[2:]
    for (name, loss, remark), line in zip(rows, lines, strict=True):
        assert line.startswith(name)
        assert loss in line
        assert remark.strip() in line or "…" in line
    names, losses = (
        max([len(heading), *(cell_len(row[place]) for row in rows)]) for place, heading in ((0, "name"), (1, "loss"))
    )
    rigid = names + losses + 4
    room = max(width, rigid + LEAST)
    assert all(cell_len(line) <= room for line in lines)
    assert all(cell_len(a) == cell_len(b) for a, b in pairwise(lines))


def test_the_widest_gives_way_first_and_nothing_does_in_a_file():
    table = TextTable(("a", "b"), flexible=("a", "b"))
    table.add_row("x" * 30, "y" * 12)
    assert printed(table, 34)[1] == "x" * 19 + "…  " + "y" * 12
    assert printed(table, 22)[1] == "x" * 9 + "…  " + "y" * 9 + "…"
    assert printed(table, 22, terminal=False)[1] == "x" * 30 + "  " + "y" * 12


def test_cells_of_several_lines_and_bars():
    table = TextTable(("bar", "value"), right=("value",))
    table.add_row(ProgressBar(total=2, completed=1, width=6), Text("1\n23"), style="bold")
    assert [line.split()[-1] for line in printed(table, 10)] == ["value", "1", "23"]
    assert {len(line) for line in printed(table, 10)} == {13}


@pytest.mark.parametrize("width", [60, 80, 110])
def test_laws_and_trials_have_their_names(width):
    laws = printed(law_table(), width)
    assert [line for line in laws if line.startswith("chinchilla ")]
    running = Row("t0007", 800, {"schedule.peak_lr": 0.0043}, "running", 400, 1.25, 3e-3)
    ended = Row("t0011", 800, {"schedule.peak_lr": 0.001}, "finished", 800, 1.5)
    heading, first, second = printed(trial_table([ended, running]), width)
    assert first.split()[:2] == ["t0007", "running"]
    assert second.split()[:2] == ["t0011", "finished"]
    assert "400/800" in first
    assert "1.2500" in first
    assert "3.00e-03" in first
    assert "lr now" in heading
    assert "lr now" not in printed(trial_table([ended]), width)[0]
