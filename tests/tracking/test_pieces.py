"""Rows that are kept for the end of a sweep are those that the parts hold, or else the parts are read."""

from __future__ import annotations

from types import SimpleNamespace

import pyarrow as pa
import pytest

from landscape_ray.tracking import parent, pieces
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import read_part, to_table
from landscape_ray.tracking.pieces import Pieces
from landscape_ray.tracking.projector import Projector


def test_what_is_kept_is_what_was_given(make: SimpleNamespace) -> None:
    rows = to_table("t1", make.rows(1, 9))
    kept = Pieces()
    assert kept.take() == {}
    kept.keep("t1", 0, 0, 2, rows.slice(0, 3))
    kept.keep("t2", 0, 0, 1, rows)
    kept.keep("t1", 0, 2, 3, rows.slice(3))
    found = kept.take()
    assert {name: (each.num_rewinds, each.num_parts) for name, each in found.items()} == {"t1": (0, 3), "t2": (0, 1)}
    assert make.same_rows(found["t1"].read(), rows)
    assert make.same_rows(found["t2"].read(), rows)
    assert kept.take() == {}, "it begins anew"


def test_what_is_sent_again_replaces_and_gaps_are_not_kept(
    make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = to_table("t1", make.rows(1, 9))
    kept = Pieces()
    for name in ("again", "rewound", "gap", "large", "late"):
        kept.keep(name, 0, 0, 1, rows.slice(0, 2))
        kept.keep(name, 0, 1, 2, rows.slice(2, 2))
    kept.keep("again", 0, 1, 3, rows.slice(2))
    kept.keep("rewound", 1, 0, 1, rows.slice(0, 1))
    kept.keep("gap", 0, 3, 4, rows)
    monkeypatch.setattr(pieces, "MAX_ROWS", 1)
    kept.keep("large", 0, 2, 3, rows)
    monkeypatch.setattr(pieces, "MAX_BYTES", 0)
    kept.keep("late", 0, 2, 3, rows.slice(0, 1))
    found = kept.take()
    assert set(found) == {"again", "rewound"}
    assert make.same_rows(found["again"].read(), rows)
    assert (found["rewound"].num_rewinds, len(found["rewound"].read())) == (1, 1)


@pytest.mark.acceptance
def test_the_rows_of_a_sweep_are_those_of_its_parts(
    folder: SweepFolder, uri: str, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of trials seen whole, in two halves, rewound, or not at all; each part is read once."""
    make.write(folder.trial("t1"), 1, 9, status="finished", part_rows=3)
    make.write(folder.trial("t2"), 1, 5, part_rows=3)
    make.write(folder.trial("t3"), 1, 9, part_rows=3)
    projector = Projector(folder, uri, "exp")
    assert projector.sync().error == ""
    make.write(folder.trial("t2"), 6, 9, status="finished", part_rows=3)
    folder.trial("t3").rewind(1)
    make.write(folder.trial("t3"), 2, 4, status="finished", part_rows=2)
    make.write(folder.trial("t4"), 1, 4, status="finished", part_rows=3)
    folder.update_meta(status="finished")
    read: list[str] = []
    monkeypatch.setattr(parent, "read_part", lambda path: read.append(path) or read_part(path))
    kept: list[pa.Table] = []
    write_records = parent.write_records

    def written(*args: object) -> None:
        write_records(*args)  # type: ignore[arg-type]
        kept.append(parent.read_records(args[2])[0])  # type: ignore[arg-type]

    monkeypatch.setattr(parent, "write_records", written)
    assert projector.close().error == ""
    assert read == []
    (records,) = kept
    parts = [read_part(trial.part_path(index)) for trial in folder.trials() for index in range(trial.num_parts())]
    assert make.same_rows(records, pa.concat_tables(parts))
    commits = parent.commits_of(folder)
    assert make.same_rows(pa.concat_tables(parent._parts(folder, commits)), records)
    assert len(read) == len(parts), "without what was kept"
