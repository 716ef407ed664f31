"""Damaged and hostile files: every reader answers with one clean error, runs no foreign code and writes nowhere else.

A few dozen examples each by default; many more under the mark `slow`.
"""

import copy
import json
import os
import pickle
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.records import EvalRecord, RunSummary, StepRecord
from landscape_ray.sweep.session import new_sweep
from landscape_ray.sweep.spec import SweepSpec, read_spec
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.parts import PartWriter, read_part
from landscape_ray.training import TrainConfig, TrainState, read_checkpoint

FEW, MANY = 25, 1000


def fuzz(test: Callable[..., None]) -> Callable[..., None]:
    """Run a property with few examples, and once more with many under `slow`."""

    @pytest.mark.parametrize("num_examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
    def run(num_examples: int, request: pytest.FixtureRequest) -> None:
        parts = {name: request.getfixturevalue(name) for name in fixtures}
        inner = given(st.data())(lambda data: test(data=data, **parts))
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
        settings(max_examples=num_examples, deadline=None, derandomize=True, suppress_health_check=checks)(inner)()

    fixtures = [name for name in test.__code__.co_varnames[: test.__code__.co_argcount] if name != "data"]
    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def named(error: UserError, path: Path) -> None:
    assert str(path) in str(error)


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Return the content cut off, with flipped bytes, with a stretch repeated or zeroed, or something else entirely."""
    kind = data.draw(st.sampled_from(["cut", "flip", "repeat", "zero", "other", "append"]))
    place = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.integers(1, 64))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        found = bytearray(content)
        for _ in range(data.draw(st.integers(1, 8))):
            found[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        return bytes(found)
    if kind == "repeat":
        return content[:place] + content[place : place + length] * 2 + content[place + length :]
    if kind == "zero":
        return content[:place] + bytes(length) + content[place + length :]
    if kind == "append":
        return content + data.draw(st.binary(min_size=1, max_size=64))
    return data.draw(st.binary(max_size=256))


@pytest.fixture
def tiny_mlp() -> TrainConfig:
    return parse(
        TrainConfig,
        {
            "num_steps": 3,
            "batch_size": 2,
            "data": {"name": "images"},
            "model": {"name": "mlp", "width": 4},
            "eval": {"every_steps": 3, "num_batches": 1, "batch_size": 2},
        },
        "tiny",
    )


@pytest.fixture
def checkpoint(tiny_mlp: TrainConfig, tmp_path: Path) -> Path:
    path = tmp_path / "state.pt"
    TrainState.create(tiny_mlp).save(path, run_id="t0000")
    return path


@pytest.fixture
def sweep(tmp_path: Path, sweep_text: Callable[..., str]) -> SweepFolder:
    folder = SweepFolder.create(tmp_path / "sweep", spec_text=sweep_text(), meta={"experiment": "e"})
    writer = PartWriter(folder.trial("t0000"))
    stamp: dict[str, Any] = {"num_tokens": 1, "flops": 1.0, "elapsed_seconds": 1.0, "time_unix": 1.0}
    for step in range(1, 40):
        writer.append(
            StepRecord(
                step=step,
                cost_seconds=0.1,
                loss_nats=1.0,
                grad_norm=1.0,
                lr=0.1,
                weight_decay=0.0,
                momentum=0.9,
                **stamp,
            )
        )
    writer.append(EvalRecord(step=40, cost_seconds=0.1, loss_nats=0.5, **stamp))
    folder.trial("t0000").commit(RunSummary(run_id="t0000", status="running", config={}, varied={}), writer.flush())
    return folder


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.acceptance
@fuzz
def test_damaged_checkpoints(data: st.DataObject, checkpoint: Path) -> None:
    """Read as it was saved, or refused: never silently other numbers."""
    sound = read_checkpoint(checkpoint)
    broken = checkpoint.with_name("broken.pt")
    broken.write_bytes(damaged(data, checkpoint.read_bytes()))
    try:
        found = read_checkpoint(broken)
    except UserError as error:
        named(error, broken)
        return
    assert found["checksum"] == sound["checksum"]
    for name, tensor in sound["module"].items():
        assert torch.equal(found["module"][name], tensor)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(torch.zeros(2)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.acceptance
@fuzz
def test_foreign_checkpoints(data: st.DataObject, checkpoint: Path, tiny_mlp: TrainConfig) -> None:
    """Tensors and plain values under our names, but not ours, with a checksum that fits."""
    from landscape_ray.training.state import PARTS, checksum

    payload = dict(read_checkpoint(checkpoint))
    for name in data.draw(st.lists(st.sampled_from([*PARTS, "version"]), min_size=1, max_size=3)):
        if data.draw(st.booleans()):
            payload.pop(name, None)
        else:
            payload[name] = data.draw(VALUES)
    if all(name in payload for name in PARTS):
        payload["checksum"] = checksum(payload)
    foreign = checkpoint.with_name("foreign.pt")
    torch.save(payload, foreign)
    try:
        TrainState.load(foreign, tiny_mlp)
    except UserError:
        return


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.acceptance
@pytest.mark.parametrize("place", ["whole", "payload", "zip", "key"])
def test_hostile_pickles_run_nothing(place: str, checkpoint: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    bomb = Bomb(f"touch {mark}")
    if place == "whole":
        checkpoint.write_bytes(pickle.dumps(bomb))
    elif place == "zip":
        with zipfile.ZipFile(checkpoint, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(bomb))
            archive.writestr("archive/version", "3\n")
    else:
        payload: dict[Any, Any] = dict(read_checkpoint(checkpoint))
        payload["extra" if place == "payload" else "more"] = bomb
        torch.save(payload, checkpoint)
    with pytest.raises(UserError, match=r"cannot be read"):
        read_checkpoint(checkpoint)
    assert not mark.exists()


# --- Parquet parts and trial.json -------------------------------------------------------------------------------------


@pytest.mark.acceptance
@fuzz
def test_damaged_parts(data: st.DataObject, sweep: SweepFolder) -> None:
    """A damaged part is named, or it holds rows under our schema; the reader does not fall over it."""
    part = sweep.trial("t0000").part_path(0)
    content = part.read_bytes()
    try:
        part.write_bytes(damaged(data, content))
        try:
            table = read_part(part)
        except UserError as error:
            named(error, part)
        else:
            assert "step" in table.column_names
        collected = collect(sweep.path)
        assert [run.run_id for run in collected.runs] == ["t0000"]
    finally:
        part.write_bytes(content)


@pytest.mark.acceptance
@fuzz
def test_damaged_commits(data: st.DataObject, sweep: SweepFolder) -> None:
    """A damaged trial.json costs its trial only, and is named."""
    path = sweep.trial("t0000").commit_path
    content = path.read_bytes()
    try:
        if data.draw(st.booleans()):
            path.write_bytes(damaged(data, content))
        else:
            fields = json.loads(content)
            inside = data.draw(st.sampled_from([fields, fields["summary"]]))
            inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(
                VALUES.filter(lambda value: "tensor" not in repr(value))
            )
            path.write_text(json.dumps(fields))
        collected = collect(sweep.path)
        assert len(collected.runs) + len(collected.warnings) >= 1
        for run in collected.runs:
            assert run.run_id == "t0000", "a name inside the file is not trusted"
            assert isinstance(run.step, int)
            assert isinstance(run.config, dict)
    finally:
        path.write_bytes(content)


@pytest.mark.acceptance
@fuzz
def test_damaged_sweep_files_of_a_folder(data: st.DataObject, sweep: SweepFolder) -> None:
    content = sweep.meta_path.read_bytes()
    try:
        sweep.meta_path.write_bytes(damaged(data, content))
        try:
            SweepFolder.open(sweep.path)
        except UserError as error:
            named(error, sweep.path)
    finally:
        sweep.meta_path.write_bytes(content)


# --- sweep files ------------------------------------------------------------------------------------------------------


@pytest.mark.acceptance
@fuzz
def test_damaged_specs(data: st.DataObject, tmp_path: Path, sweep_text: Callable[..., str]) -> None:
    path = tmp_path / "spec.toml"
    path.write_bytes(damaged(data, sweep_text(search={"num_trials": 2}).encode()))
    try:
        read_spec(path)
    except UserError as error:
        named(error, path)


def leaves(table: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for key, value in table.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += leaves(value, (*prefix, key))
    return found


HOSTILE = st.sampled_from(
    [
        *("../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "", "\0", "a\nb", "~", "$HOME", "con", "x" * 300),
        *("os:system", "builtins:exec", "no.such:thing", ":", "a:", "mlflow:", "{0}", "%s", "-rf", "\u202e", "é"),
        *(-1, 0, 1, 2**63, -(2**63), 10**400, 1e308, float("nan"), float("inf"), True, None, [], {}, [[]], [{}]),
        *({"name": "sgd"}, {"choices": []}, {"uniform": [1, 0]}, {"log_uniform": [0, 1]}, {"uniform": ["a", "b"]}),
    ]
)


@pytest.mark.acceptance
@fuzz
def test_hostile_values_in_specs(data: st.DataObject, sweep_text: Callable[..., str]) -> None:
    """Any value anywhere: a validated spec or one UserError, and never a name that leaves the results folder."""
    kind = data.draw(st.sampled_from(["search", "population"]))
    table = tomllib.loads(sweep_text(kind))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(leaves(table)))
        inner: Any = table
        for key in place[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[place[-1]] = copy.deepcopy(data.draw(HOSTILE))  # else a value drawn twice may come to hold itself
    try:
        spec = parse(SweepSpec, table, "fuzz")
    except UserError:
        return
    assert "/" not in spec.name
    assert spec.name not in ("", ".", "..")


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".", "", ".hidden", "a\0b", "a\nb", "-x"])
def test_names_cannot_leave_the_results_folder(name: str, sweep_text: Callable[..., str], tmp_path: Path) -> None:
    text = sweep_text()
    spec = parse(SweepSpec, tomllib.loads(text), "file")
    if name:  # an empty --name takes the file's
        with pytest.raises(UserError, match=r"--name must be letters"):
            new_sweep(spec, text, tmp_path / "runs", name, None)
    with pytest.raises(UserError, match=r"name must be letters"):
        parse(SweepSpec, {**tomllib.loads(text), "name": name}, "file")
    folder = SweepFolder.create(tmp_path / "s", spec_text=text, meta={})
    if name != "-x":
        with pytest.raises(UserError, match=r"trial_id must be made of"):
            folder.trial(name)
    assert not (tmp_path / "x").exists()
