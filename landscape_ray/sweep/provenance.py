"""Where results come from: the state of the code beside them, and the packages that made them. No secrets."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

from landscape_ray.tracking.uris import mask_secrets

_GIT_SECONDS = 5.0


def git_state(path: Path) -> dict[str, Any] | None:
    """Return commit, branch, remote and whether files differ from the commit; None outside a repository.

    A password inside the address of the remote is masked.

    Args:
        path: a folder in the working tree.
    """
    commit = _git(path, "rev-parse", "HEAD")
    if commit is None:
        return None
    status = _git(path, "status", "--porcelain", "--untracked-files=no")
    remote = _git(path, "config", "--get", "remote.origin.url")
    state: dict[str, Any] = {"commit": commit, "branch": _git(path, "rev-parse", "--abbrev-ref", "HEAD")}
    state["changed_files"] = [line[3:] for line in (status or "").splitlines()][:100]
    state["dirty"] = None if status is None else bool(status)  # None: it took too long to say
    if remote:
        state["remote"] = mask_secrets(remote)
    return state


def _git(path: Path, *arguments: str) -> str | None:
    """Return what git prints, None where it fails, is not installed or takes too long."""
    # no lock: a sweep must not get in the way of somebody who is committing; no question for a password either
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(path), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def packages() -> dict[str, str]:
    """Return the version of every installed package."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found[str(name)] = str(distribution.version)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))
