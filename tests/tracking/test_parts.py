"""Parts: every float as it was, every committed row once, whatever instant the process is killed at."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from landscape_ray.errors import UserError
from landscape_ray.records import COLUMNS, SCHEMA_VERSION, EvalRecord, ProbeRecord, to_row
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import ARROW_SCHEMA, PartWriter, conform, read_part, to_table


def _bits(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def _same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    return [{k: _bits(v) for k, v in row.items()} for row in left] == [
        {k: _bits(v) for k, v in row.items()} for row in right
    ]


def test_the_schema_is_the_columns_of_records() -> None:
    assert [(field.name, str(field.type).replace("double", "float64")) for field in ARROW_SCHEMA] == [
        (column.name, column.dtype) for column in COLUMNS
    ]
    assert ARROW_SCHEMA.metadata == {b"landscape_ray.schema_version": str(SCHEMA_VERSION).encode()}


@pytest.mark.acceptance
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(), st.floats(), st.integers(0, 2**62)), min_size=1, max_size=5))
def test_every_float_and_none_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, make: SimpleNamespace, values: list[tuple[float, float, int]]
) -> None:
    sweep = SweepFolder.create(tmp_path_factory.mktemp("r") / "a", spec_text="", meta={})
    trial = sweep.trial("t1")
    records = [
        ProbeRecord(
            step=tokens,
            num_tokens=tokens,
            flops=a,
            elapsed_seconds=b,
            time_unix=1.0,
            cost_seconds=a,
            probe="p",
            value=a,
            standard_error=b,
            num_matvecs=tokens,
        )
        for a, b, tokens in values
    ]
    writer = PartWriter(trial)
    for record in records:
        writer.append(record)
    trial.commit(make.summary("t1"), writer.flush())
    got = collect(sweep).records.to_pylist()
    assert _same(got, [to_row("t1", record) for record in records])
    assert got[0]["lr"] is None
    assert got[0]["donor"] is None


def test_flush_numbers_the_parts_and_skips_an_empty_buffer(folder: SweepFolder, make: SimpleNamespace) -> None:
    trial = folder.trial("t1")
    writer = PartWriter(trial)
    assert writer.flush() == 0
    for number, record in enumerate(make.rows(1, 3), 1):
        writer.append(record)
        assert writer.flush() == number
        assert writer.flush() == number == writer.num_parts
    assert sorted(path.name for path in trial.records_path.iterdir())[:2] == [
        "part-000000.parquet",
        "part-000001.parquet",
    ]


def test_reopening_discards_the_parts_that_will_be_made_again(folder: SweepFolder, make: SimpleNamespace) -> None:
    trial = folder.trial("t1")
    make.write(trial, 1, 10, part_rows=5)
    committed = trial.num_parts()
    make.write(trial, 11, 20, part_rows=5, commit=False)
    (trial.records_path / ".part-000009.parquet.1-2.tmp").write_text("half")
    before = collect(folder).records
    assert before["step"].to_pylist()[-1] == 10, "uncommitted rows are not there for readers"
    PartWriter(trial, committed)
    assert len(list(trial.records_path.iterdir())) == committed
    make.write(trial, 11, 20, part_rows=5)
    steps = (
        collect(folder).records.filter(pa.compute.equal(collect(folder).records["kind"], "step"))["step"].to_pylist()
    )
    assert steps == list(range(1, 21))


def test_a_checkpoint_of_another_folder_is_refused(folder: SweepFolder) -> None:
    for number in (1, -1):
        with pytest.raises(ValueError, match=f"got {number}; the checkpoint does not belong to this folder"):
            PartWriter(folder.trial("t1"), number)


def test_a_full_disk_keeps_the_rows_for_the_next_flush(
    folder: SweepFolder, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = folder.trial("t1")
    writer = PartWriter(trial)
    for record in make.rows(1, 3):
        writer.append(record)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"part-000000.parquet: no space left"):
            writer.flush()
    assert list(trial.records_path.iterdir()) == []
    assert writer.flush() == 1
    assert len(read_part(trial.part_path(0))) == len(make.rows(1, 3))


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_part_is_an_error_that_names_it(folder: SweepFolder, make: SimpleNamespace, keep: float) -> None:
    trial = folder.trial("t1")
    make.write(trial, 1, 20, part_rows=1000)
    path = trial.part_path(0)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UserError, match=r"part-000000.parquet is damaged"):
        read_part(path)


def test_a_flipped_bit_never_passes_as_data(folder: SweepFolder, make: SimpleNamespace) -> None:
    trial = folder.trial("t1")
    make.write(trial, 1, 20, part_rows=1000)
    path = trial.part_path(0)
    content, whole = path.read_bytes(), read_part(path)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    noticed = 0
    for position in range(4, footer, 5):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            assert _same(read_part(path).to_pylist(), whole.to_pylist()), f"bit at byte {position}"
        except UserError:
            noticed += 1
    assert noticed > 0.5 * footer / 5


def test_a_missing_part_is_not_damage(folder: SweepFolder) -> None:
    with pytest.raises(FileNotFoundError):
        read_part(folder.trial("t1").part_path(0))


def test_a_part_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    table = ARROW_SCHEMA.empty_table().replace_schema_metadata(
        {b"landscape_ray.schema_version": str(SCHEMA_VERSION + 1).encode()}
    )
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(UserError, match=rf"schema version {SCHEMA_VERSION + 1}, .*; upgrade landscape_ray"):
        read_part(tmp_path / "p.parquet")


def test_conform_fills_missing_columns_and_drops_unknown_ones() -> None:
    table = conform(pa.table({"step": [1], "other": ["x"]}))
    assert table.schema.equals(ARROW_SCHEMA)
    assert table.to_pylist()[0]["step"] == 1
    assert table.to_pylist()[0]["lr"] is None


def test_numpy_numbers_are_numbers() -> None:
    record = EvalRecord(
        step=np.int64(3),  # type: ignore[arg-type]
        num_tokens=1,
        flops=np.float64(1.5),
        elapsed_seconds=1,
        time_unix=2,
        cost_seconds=0,
        loss_nats=np.float32("nan"),  # type: ignore[arg-type]
    )
    row = to_table("t1", [record]).to_pylist()[0]
    assert (row["step"], row["flops"], row["elapsed_seconds"]) == (3, 1.5, 1.0)
    assert math.isnan(row["loss_nats"])


_WORKER = """
import json, sys
from pathlib import Path
from landscape_ray.records import EvalRecord, RunSummary
from landscape_ray.files import write_atomic
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import PartWriter

trial = SweepFolder.open(Path(sys.argv[1])).trial("t1")
last = int(sys.argv[2])
checkpoint = trial.checkpoint_path / "state.json"
state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "num_parts": 0}
writer = PartWriter(trial, state["num_parts"])
for step in range(state["step"] + 1, last + 1):
    place = dict(step=step, num_tokens=step, flops=0.0, elapsed_seconds=0.0, time_unix=float(step), cost_seconds=0.0)
    writer.append(EvalRecord(**place, loss_nats=1.0))
    if step % 3 == 0 or step == last:
        num_parts = writer.flush()
        write_atomic(checkpoint, json.dumps({"step": step, "num_parts": num_parts}))
        trial.commit(RunSummary(run_id="t1", status="running", config={}, varied={}, step=step), num_parts)
"""


@pytest.mark.acceptance
def test_kill_at_any_instant_then_resume_gives_every_row_once(folder: SweepFolder) -> None:
    last, kills, generator = 3000, 0, np.random.default_rng(0)
    command = [sys.executable, "-c", _WORKER, str(folder.path), str(last)]
    trial = folder.trial("t1")
    for _ in range(4):
        before = trial.num_parts()
        with subprocess.Popen(command) as process:
            patience = time.monotonic() + 60
            while trial.num_parts() == before and process.poll() is None and time.monotonic() < patience:
                time.sleep(0.001)
            time.sleep(float(generator.uniform(0.0, 0.05)))  # anywhere in flush, checkpoint, commit
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        got = collect(folder)
        assert got.warnings == []
        assert got.records["step"].to_pylist() == list(range(1, got.runs[0].step + 1))
    assert kills >= 3, "the work must be long enough to be killed"
    subprocess.run(command, check=True)
    assert collect(folder).records["step"].to_pylist() == list(range(1, last + 1))
