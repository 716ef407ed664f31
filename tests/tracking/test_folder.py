"""The sweep folder: whole or absent, committed or not, and never outside itself."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from landscape_ray.errors import UserError
from landscape_ray.files import write_atomic
from landscape_ray.records import RunSummary
from landscape_ray.tracking.folder import FORMAT_VERSION, SweepFolder, find_sweeps
from landscape_ray.tracking.parts import PartWriter
from landscape_ray.tracking.uris import default_tracking_uri, mask_secrets, resolve_tracking_uri


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    return SweepFolder.create(tmp_path / "results" / "a", spec_text="seed = 0\n", meta={"seed": 0})


def _files(path: Path) -> set[str]:
    return {str(each.relative_to(path)) for each in path.rglob("*")}


# ---- writing atomically


def test_write_atomic_replaces_the_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_atomic(path, "long old content é")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert _files(tmp_path) == {"deep", "deep/file.json"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "may write to")])
def test_write_atomic_keeps_the_old_content_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, remedy: str
) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, "old")

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=f"cannot write .*file.json: .*{remedy}"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert _files(tmp_path) == {"file.json"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_the_kernel_says_full_where_we_expect_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert caught.value.errno == errno.ENOSPC


def test_write_atomic_below_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "file" / "x", "")


# ---- sweeps


def test_create_fills_in_what_identifies_a_sweep(sweep: SweepFolder) -> None:
    meta = sweep.meta
    assert meta["format_version"] == FORMAT_VERSION
    assert meta["name"] == "a"
    assert meta["status"] == "running"
    assert meta["seed"] == 0
    assert len(meta["sweep_id"]) == 32
    assert sweep.spec_text == "seed = 0\n"
    assert _files(sweep.path.parent) == {"a", "a/spec.toml", "a/sweep.json", "a/trials"}
    assert SweepFolder.open(sweep.path).meta == meta


def test_create_refuses_a_path_that_exists(sweep: SweepFolder) -> None:
    with pytest.raises(UserError, match=r"exists; use another --name, or `landscape-ray resume a`"):
        SweepFolder.create(sweep.path, spec_text="", meta={})


def test_create_loses_a_race_without_damage(
    sweep: SweepFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sweep.meta
    monkeypatch.setattr(Path, "exists", lambda self: False if self == sweep.path else os.path.lexists(self))
    original = os.rename

    def rename(source: Any, target: Any) -> None:
        monkeypatch.undo()  # the check came before the other's folder, what follows comes after it
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UserError, match="exists; use another --name"):
        SweepFolder.create(sweep.path, spec_text="other", meta={})
    assert sweep.meta == before
    assert {each.name for each in sweep.path.parent.iterdir()} == {"a"}


def test_create_leaves_nothing_when_the_disk_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left on device; free some space"):
        SweepFolder.create(tmp_path / "a", spec_text="", meta={})
    assert _files(tmp_path) == set()


def test_create_in_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        SweepFolder.create(tmp_path / "file" / "a", spec_text="", meta={})


def test_open_refuses_what_is_not_a_sweep(sweep: SweepFolder) -> None:
    with pytest.raises(UserError, match=r"not a sweep folder: .*/b; in that place: .*/a"):
        SweepFolder.open(sweep.path.parent / "b")
    with pytest.raises(UserError, match=r"give a folder that holds a sweep.json"):
        SweepFolder.open(sweep.trials_path)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, None])
def test_open_refuses_a_newer_format(sweep: SweepFolder, version: int | None) -> None:
    sweep.update_meta(format_version=version)
    with pytest.raises(UserError, match=f"has format version {version}, .*; upgrade landscape_ray"):
        SweepFolder.open(sweep.path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_meta_is_named(sweep: SweepFolder, text: str) -> None:
    sweep.meta_path.write_text(text)
    with pytest.raises(UserError, match=r"sweep.json is damaged"):
        SweepFolder.open(sweep.path)


def test_passwords_are_not_written_down(tmp_path: Path) -> None:
    secret = {"tracking_uri": "https://ada:s3cr3t@host:5000/x"}
    sweep = SweepFolder.create(tmp_path / "a", spec_text="", meta=secret)
    assert sweep.meta["tracking_uri"] == "https://***@host:5000/x"
    sweep.update_meta(tracking_uri="http://:t0ken@host")
    assert "s3cr3t" not in sweep.meta_path.read_text()
    assert sweep.meta["tracking_uri"] == "http://***@host"


def test_find_sweeps_newest_first_and_only_whole_ones(tmp_path: Path) -> None:
    for name, created in (("b", 1.0), ("a", 3.0), ("c", 2.0)):
        SweepFolder.create(tmp_path / name, spec_text="", meta={"created_unix": created})
    SweepFolder.create(tmp_path / ".c.123.tmp", spec_text="", meta={})
    SweepFolder.create(tmp_path / "newer", spec_text="", meta={"format_version": FORMAT_VERSION + 1})
    (tmp_path / "other").mkdir()
    assert [sweep.path.name for sweep in find_sweeps(tmp_path)] == ["a", "c", "b"]
    assert find_sweeps(tmp_path / "none") == []


def test_lock_holds_against_another_process_and_goes_with_it(sweep: SweepFolder) -> None:
    code = (
        "import os, sys; from pathlib import Path; from landscape_ray.tracking.folder import SweepFolder\n"
        "with SweepFolder(Path(sys.argv[1])).lock(): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(sweep.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"already being run by process {process.pid}"), sweep.lock():
            pass
        process.kill()
    with sweep.lock():
        pass


# ---- trials


@pytest.mark.parametrize("trial_id", ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a b", "a\n", "ä", "a\x00"])
def test_trial_id_is_a_plain_name(sweep: SweepFolder, trial_id: str) -> None:
    with pytest.raises(UserError, match="trial_id must be made of"):
        sweep.trial(trial_id)


@given(st.text(max_size=12))
def test_no_trial_id_leads_out_of_the_sweep(trial_id: str) -> None:
    sweep = SweepFolder(Path("/results/sweep"))
    try:
        path = sweep.trial(trial_id).path
    except UserError:
        return
    assert Path(os.path.normpath(path)).parent == sweep.trials_path


def test_trials_are_sorted_and_plain(sweep: SweepFolder, make: SimpleNamespace) -> None:
    for trial_id in ("t0010", "t0002", "t0001"):
        sweep.trial(trial_id).set_status("pending")
    (sweep.trials_path / ".t.tmp").mkdir()
    (sweep.trials_path / "file").write_text("")
    assert [trial.trial_id for trial in sweep.trials()] == ["t0001", "t0002", "t0010"]
    assert SweepFolder(Path("/nonexistent")).trials() == []


def test_a_trial_that_never_committed(sweep: SweepFolder) -> None:
    trial = sweep.trial("t1")
    assert (trial.summary(), trial.num_parts(), trial.read()) == (None, 0, None)
    assert not trial.path.exists()
    trial.set_status("failed", "the process died")
    assert trial.summary() == RunSummary(
        run_id="t1", status="failed", config={}, varied={}, message="the process died"
    ) or math.isnan(trial.summary().final_loss_nats)  # type: ignore[union-attr]  # NaN is never equal
    assert trial.summary().message == "the process died"  # type: ignore[union-attr]


def test_commit_round_trip_keeps_every_float(sweep: SweepFolder, make: SimpleNamespace) -> None:
    trial = sweep.trial("t1")
    for loss in (math.nan, math.inf, -math.inf, 0.1 + 0.2, 5e-324, -0.0):
        want = make.summary("t1", final_loss_nats=loss, best_loss_nats=1.0)
        trial.commit(want, 0)
        got = trial.summary()
        assert got is not None
        assert repr(dataclasses.asdict(got)) == repr(dataclasses.asdict(want))


def test_commit_refuses_what_does_not_fit(sweep: SweepFolder, make: SimpleNamespace) -> None:
    trial = sweep.trial("t1")
    with pytest.raises(ValueError, match=r"summary.run_id must be 't1', got 't2'"):
        trial.commit(make.summary("t2"), 0)
    with pytest.raises(ValueError, match="num_parts must be the number of written parts, got 1"):
        trial.commit(make.summary("t1"), 1)
    make.write(trial, 1, 20)
    with pytest.raises(ValueError, match="num_parts must be at least the 3 committed before, got 1"):
        trial.commit(make.summary("t1"), 1)


def test_set_status_keeps_the_rest(sweep: SweepFolder, make: SimpleNamespace) -> None:
    trial = sweep.trial("t1")
    make.write(trial, 1, 20, message="so far so good")
    trial.set_status("stopped")
    after = trial.summary()
    assert after is not None
    assert (after.status, after.message, after.step, trial.num_parts()) == ("stopped", "so far so good", 20, 3)


def test_fields_of_a_later_version_are_left_out(sweep: SweepFolder, make: SimpleNamespace) -> None:
    trial = sweep.trial("t1")
    trial.commit(make.summary("t1"), 0)
    content = json.loads(trial.commit_path.read_text())
    content["summary"]["invented_later"] = 1
    trial.commit_path.write_text(json.dumps(content))
    assert trial.summary() is not None


@pytest.mark.parametrize("text", ["", "[]", '{"num_parts": 1}', '{"num_parts": "x", "summary": {}}'])
def test_a_damaged_commit_is_named(sweep: SweepFolder, text: str) -> None:
    trial = sweep.trial("t1")
    write_atomic(trial.commit_path, text)
    with pytest.raises(UserError, match=r"trial.json is damaged"):
        trial.read()


def test_rewind_counts_only_when_something_was_given_up(sweep: SweepFolder, make: SimpleNamespace) -> None:
    trial = sweep.trial("t1")
    trial.rewind(0)
    assert trial.read() is None
    make.write(trial, 1, 20)
    PartWriter(trial, 3)
    assert trial.read().num_rewinds == 0  # type: ignore[union-attr]
    PartWriter(trial, 1)
    commit = trial.read()
    assert commit is not None
    assert (commit.num_parts, commit.num_rewinds) == (1, 1)


@pytest.mark.parametrize(
    ("module", "absent"),
    [("folder", {"pyarrow", "mlflow", "ray", "torch"}), ("collect", {"mlflow", "ray", "torch"})],
)
def test_light_modules_stay_light(module: str, absent: set[str]) -> None:
    code = f"import sys, landscape_ray.tracking.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert absent & set(loaded) == set()


# ---- addresses


def test_the_default_address_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri(Path("results")) == f"sqlite:///{tmp_path}/results/mlflow.db"


def test_precedence_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:1")
    assert resolve_tracking_uri("http://explicit:1", Path("/r")) == "http://explicit:1"
    assert resolve_tracking_uri(None, Path("/r")) == "http://env:1"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert resolve_tracking_uri(None, Path("/r")) == "sqlite:////r/mlflow.db"


@given(st.from_regex(r"[^\s/@]{1,12}", fullmatch=True), st.from_regex(r"[^\s/]{4,12}", fullmatch=True))
def test_no_password_survives_masking(user: str, password: str) -> None:
    masked = mask_secrets(f"failed: https://{user}:{password}@server.example/api and more")
    assert masked == "failed: https://***@server.example/api and more"
