"""What is written down about the code and the packages beside a result."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from landscape_ray.sweep import provenance
from landscape_ray.sweep.provenance import git_state, packages


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_state_names_commit_changes_and_a_remote_without_its_password(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=trunk"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init")
    (tmp_path / "a.txt").write_text("1")
    git("add", "a.txt")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "branch": "trunk", "changed_files": [], "dirty": False}
    git("remote", "add", "origin", "https://ada:s3cret@git.example.org/x.git")
    (tmp_path / "a.txt").write_text("2")
    (tmp_path / "untracked.txt").write_text("a password may lie about")
    state = git_state(tmp_path)
    assert state == {
        "commit": commit,
        "branch": "trunk",
        "changed_files": ["a.txt"],
        "dirty": True,
        "remote": "https://***@git.example.org/x.git",
    }


def test_outside_a_repository_and_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None

    def slow(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("git", 5)

    monkeypatch.setattr(provenance.subprocess, "run", slow)
    assert git_state(tmp_path) is None


def test_packages_are_named_with_their_versions() -> None:
    import torch

    found = packages()
    assert found["torch"] == torch.__version__
    assert list(found) == sorted(found, key=str.lower)
