"""TensorBoard files hold every committed row, read back with the format's own reader."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from landscape_ray.errors import UserError
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.tensorboard import write_events


def read_events(folder: Path) -> list:
    """Return the events of a folder: records of length, checksum, bytes, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob("events.out.tfevents.*")
    content, at, found = path.read_bytes(), 0, []
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        found.append(Event.FromString(content[at + 12 : at + 12 + size]))
        at += 16 + size
    return found


@pytest.fixture(scope="module")
def written(population_folder, tmp_path_factory) -> dict[str, list]:
    out = tmp_path_factory.mktemp("tensorboard")
    return {path.name: read_events(path) for path in write_events(population_folder, out)}


def scalars(events: list, tag: str) -> list[tuple[int, float, float]]:
    return [
        (event.step, event.wall_time, value.simple_value)
        for event in events
        for value in event.summary.value
        if value.tag == tag
    ]


def test_every_row_of_every_trial_is_there(written, population_folder):
    rows = collect(population_folder).records.to_pylist()
    assert sorted(written) == sorted({row["run_id"] for row in rows})
    for run_id, events in written.items():
        own = [row for row in rows if row["run_id"] == run_id]
        for tag, kind, column in (("train/lr", "step", "lr"), ("eval/loss_nats", "eval", "loss_nats")):
            wanted = [(row["step"], row["time_unix"], row[column]) for row in own if row["kind"] == kind]
            assert scalars(events, tag) == [(s, t, pytest.approx(v, rel=1e-6)) for s, t, v in wanted]


def test_copies_of_weights_are_told_and_searched_values_are_listed(written):
    values = [value for event in written["t001"] for value in event.summary.value]
    texts = [value.tensor.string_val[0].decode() for value in values if value.tag.startswith("event/")]
    assert texts == ['exploit from t000 at step 100: `{"schedule.peak_lr": 0.0031}`']
    assert "hparams" in [value.metadata.plugin_data.plugin_name for value in values]


def test_a_second_copy_is_refused(population_folder, tmp_path):
    write_events(population_folder, tmp_path)
    with pytest.raises(UserError, match="t000 exists; delete it, or write to another folder with --tensorboard"):
        write_events(population_folder, tmp_path)


def test_a_sweep_without_a_commit_has_nothing_to_write(tmp_path):
    folder = SweepFolder.create(tmp_path / "s", spec_text="", meta={})
    with pytest.raises(UserError, match="has committed nothing yet"):
        write_events(folder, tmp_path / "out")


def test_a_missing_package_is_named(population_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="need the package tensorboardX; install it"):
        write_events(population_folder, tmp_path)
