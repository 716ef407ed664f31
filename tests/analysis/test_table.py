"""Runs as a table: from foreign files and from sweeps."""

import gzip

import numpy as np
import pytest

from landscape_ray.analysis.table import complete_compute, joined, read_table, table_of
from landscape_ray.errors import UserError
from landscape_ray.laws import Points
from landscape_ray.laws.scaling.chinchilla import CHINCHILLA
from landscape_ray.tracking.collect import collect

LINES = """run,params (M),tokens,final,kind
a,10,1e9,3.1,dense
b,100,2e9,2.8,dense
"c, d",1000,4e9,2.6,moe
e,1000,,2.5,dense
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(LINES)
    return path


COLUMNS = {"N": "params (M)*1e6", "D": "tokens", "loss": "final"}


def item(table, name):
    return next(item for item in table.facts if item.name == name)


def test_columns_factors_and_computed_compute(file):
    table = read_table(file, COLUMNS)
    assert table.run_ids == ("a", "b", "c, d", "e")
    assert table.columns["N"].tolist() == [1e7, 1e8, 1e9, 1e9]
    np.testing.assert_allclose(table.columns["C"][:3], 6 * table.columns["N"][:3] * table.columns["D"][:3])
    assert item(table, "C was computed").value == "C = 6 N D"
    assert "N from 'params (M)' times 1e+06" in item(table, "columns").value


def test_points_leave_out_what_lacks_a_number(file):
    points, without = read_table(file, COLUMNS).points(CHINCHILLA)
    assert points.run_ids == ("a", "b", "c, d")
    assert without == {"e": "D is missing or not finite"}


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("final<2.7", ("c, d", "e")),
        ("N >= 1e8", ("b", "c, d", "e")),
        ("kind == dense", ("a", "b", "e")),
        ("kind!='dense'", ("c, d",)),
        ("loss != 2.6", ("a", "b", "e")),
    ],
)
def test_conditions(file, condition, kept):
    table = read_table(file, COLUMNS, [condition])
    assert table.run_ids == kept
    assert set(table.dropped) == {"a", "b", "c, d", "e"} - set(kept)
    assert all(condition.strip() in why for why in table.dropped.values())
    assert item(table, "left out").value.startswith(f"{4 - len(kept)} of 4")


def test_compressed_files_and_our_own_names(tmp_path):
    path = tmp_path / "runs.csv.gz"
    path.write_bytes(gzip.compress(b"N,D,loss\n1e7,1e9,3\n2e7,1e9,2.9\n"))
    table = read_table(path)
    assert table.run_ids == ("1", "2")
    assert set(table.columns) == {"N", "D", "loss", "C"}


def test_the_table_travels_as_text(file, tmp_path):
    table = read_table(file, COLUMNS)
    copy = tmp_path / "copy.csv"
    copy.write_text(table.to_csv())
    again = read_table(copy)
    assert again.run_ids == table.run_ids
    for name, values in table.columns.items():
        np.testing.assert_array_equal(again.columns[name], values)


@pytest.mark.parametrize(
    ("columns", "where", "message"),
    [
        ({"N": "parms (M)"}, [], r"column N: .* has no column 'parms \(M\)'; did you mean 'params \(M\)'"),
        ({"N": "kind"}, [], "column 'kind' of .* must hold numbers, got 'dense'"),
        ({}, [], "columns must map a number, got none"),
        (COLUMNS, ["final<<3"], "must compare with a number, got '<3'"),
        (COLUMNS, ["final"], "where must be `column operator value`"),
        (COLUMNS, ["weight<3"], "where: no column 'weight' in"),
        (COLUMNS, ["final<1"], "where must leave a line of .*, got none that meets final<1"),
    ],
)
def test_unsound_requests(file, columns, where, message):
    with pytest.raises(UserError, match=message):
        read_table(file, columns, where)


def test_a_missing_column_is_named_with_its_meaning(file):
    with pytest.raises(
        UserError, match=r"column 'loss' \(loss\) must be there for law 'chinchilla'; map it with --column"
    ):
        read_table(file, {"N": "params (M)*1e6", "D": "tokens"}).points(CHINCHILLA)


def test_no_complete_run(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("N,D,loss\n1e7,,3\n2e7,1e9,\n")
    with pytest.raises(UserError, match="no run has all of N, D, loss; D is missing or not finite and loss is missing"):
        read_table(path).points(CHINCHILLA)


@pytest.mark.parametrize("missing", ["N", "D", "C"])
def test_two_give_the_third(missing):
    whole = {"N": np.array([1e7, 1e8]), "D": np.array([1e9, 2e9])}
    whole["C"] = 6 * whole["N"] * whole["D"]
    part = {name: values for name, values in whole.items() if name != missing}
    complete_compute(part)
    np.testing.assert_allclose(part[missing], whole[missing])


def test_compute_that_was_counted_otherwise_is_noticed():
    columns = {"N": np.array([1e7, 1e8]), "D": np.array([1e9, 1e9]), "C": np.array([6.3e16, 6.1e17])}
    (found,) = complete_compute(columns)
    assert found.verdict == "warning"
    assert found.value == "1.017 to 1.050"
    columns["C"] = 6 * columns["N"] * columns["D"] * 1.01
    assert complete_compute(columns)[0].verdict == "ok"


def test_a_sweep_is_a_table(search_folder):
    collected = collect(search_folder.path)
    table = table_of(collected, "sweep search")
    finished = [run for run in collected.runs if run.status == "finished"]
    assert len(table.run_ids) == len(finished)
    assert {"N", "D", "C", "lr", "batch", "steps", "loss"} <= set(table.columns)
    by_run = dict(zip(table.run_ids, table.columns["loss"], strict=True))
    for run in finished:
        assert by_run[run.run_id] == run.final_loss_nats
    for run in collected.runs:
        if run.status == "diverged":
            assert table.dropped[run.run_id] == "the run is diverged"
    assert item(table, "schedule").section == "B"
    assert item(table, "seeds").verdict in ("ok", "warning")
    other = table_of(collected, "sweep search", count="non_embedding")
    assert (other.columns["N"] <= table.columns["N"]).all()


def test_sweeps_are_joined_under_their_names(search_folder):
    table = table_of(collect(search_folder.path), "sweep search")
    both = joined([table, table], ["one", "two"])
    assert len(both.run_ids) == 2 * len(table.run_ids)
    assert both.run_ids[0] == f"one/{table.run_ids[0]}"
    assert both.source == "sweep search and sweep search"
    assert joined([table], ["one"]) is table


def test_a_sweep_without_a_finished_run(search_folder):
    import dataclasses

    collected = collect(search_folder.path)
    runs = [dataclasses.replace(run, status="failed") for run in collected.runs]
    with pytest.raises(UserError, match=r"sweep x must hold a finished run, got none .*the run is failed"):
        table_of(dataclasses.replace(collected, runs=runs), "sweep x")


def test_points_of_a_law_can_be_made_by_hand(file):
    points, _ = read_table(file, COLUMNS).points(CHINCHILLA)
    assert isinstance(points, Points)
    assert points.response.tolist() == [3.1, 2.8, 2.6]
