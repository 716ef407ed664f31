"""What the doctor finds, and what it says to do."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from landscape_ray.cli.app import app
from landscape_ray.sweep import doctor
from landscape_ray.sweep.doctor import Finding, check_packages, check_storage, check_token, worst

GIB = 2**30


def test_a_sound_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    found = {
        each.name: each for each in doctor.examine(tmp_path / "runs", None, f"sqlite:///{tmp_path}/m.db", ray=False)
    }
    assert list(found) == [
        *("Python", "packages", "GPU", "storage", "disk", "shared memory", "tracking", "Ray token"),
    ]
    assert {name: each.status for name, each in found.items() if each.status == "error"} == {}
    assert "torch 2" in found["packages"].found
    assert list((tmp_path / "runs").iterdir()) == [], "it leaves nothing behind"


def test_packages_that_are_missing_or_old() -> None:
    finding = check_packages(["torch>=2.10", "no-such-package>=1", "numpy>=99", 'pytest>=8; extra == "dev"'])
    assert finding.status == "error"
    assert "no-such-package is missing" in finding.found
    assert "is older than 99" in finding.found
    assert "torch" not in finding.found
    assert finding.remedy.startswith("pip install")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = check_storage(tmp_path / "file" / "runs")
    assert finding.status == "error"
    assert "choose a --results folder" in finding.remedy


def test_a_file_system_without_locks_or_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        assert check_storage(tmp_path)[1:3] == ("warning", f"{tmp_path}: {doctor._try_folder(tmp_path)}")
    monkeypatch.setattr("fcntl.flock", refuse)
    finding = check_storage(tmp_path)
    assert finding.status == "error"
    assert "cannot be locked" in finding.found


class Usage(NamedTuple):
    total: float
    used: float
    free: float


@pytest.mark.parametrize(("free", "status"), [(0.1, "error"), (3.0, "warning"), (50.0, "ok")])
def test_free_space(free: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"0" * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, free * GIB))
    finding = doctor.check_disk(tmp_path)
    assert finding.status == status
    assert f"{free:.1f} of 100.0 GiB free" in finding.found


def test_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(GIB, 0, 0.06 * GIB))
    finding = doctor.check_shared_memory(tmp_path)
    assert finding.status == "warning"
    assert "--shm-size" in finding.remedy
    assert doctor.check_shared_memory(tmp_path / "absent").status == "ok"


def test_the_token_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert check_token(None, tmp_path).status == "ok"
    finding = check_token("head:6379", tmp_path)
    assert finding.status == "warning"
    assert "ray get-auth-token --generate" in finding.remedy
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")
    path.chmod(0o644)
    assert check_token("head:6379", tmp_path).remedy == f"chmod 600 {path}"
    path.chmod(0o600)
    assert check_token("head:6379", tmp_path) == Finding("Ray token", "ok", "there")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "switched off" in check_token(None, tmp_path).found
    assert "secret" not in str(check_token(None, tmp_path))


def test_a_tracking_server_that_is_not_there() -> None:
    finding = doctor.check_tracking("ftp://ada:s3cret@nowhere")
    assert finding.status == "error"
    assert "s3cret" not in finding.found


def test_the_worst_counts() -> None:
    assert worst([Finding("a", "ok", "")]) == "ok"
    assert worst([Finding("a", "warning", ""), Finding("b", "error", ""), Finding("c", "ok", "")]) == "error"


@pytest.mark.parametrize(("uri", "status"), [("sqlite:///{0}/m.db", 0), ("ftp://x", 2)])
def test_the_verb_prints_remedies_and_ends_with_a_status(uri: str, status: int, tmp_path: Path) -> None:
    arguments = ["doctor", "--no-ray", "--results", str(tmp_path), "--tracking-uri", uri.format(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == status, done.output
    assert ("error  tracking" in done.output) == bool(status)
    assert ("-> start the server" in done.output) == bool(status)


def test_a_storage_is_tried(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/store"
    finding = doctor.check_object_storage(uri)
    assert finding.status == "ok"
    assert finding.found.startswith(f"{uri}, an object comes and goes in ")
    assert list((tmp_path / "store").iterdir()) == []
    finding = doctor.check_object_storage("foo://ada:s3cret@bucket")
    assert finding.status == "error"
    assert "that pyarrow opens, got 'foo://***@bucket'" in finding.found
    assert "s3cret" not in finding.found
    names = [
        each.name for each in doctor.examine(tmp_path, None, f"sqlite:///{tmp_path}/m.db", ray=False, storage_uri=uri)
    ]
    assert names[3:5] == ["storage", "--storage"]
