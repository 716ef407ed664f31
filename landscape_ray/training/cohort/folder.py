"""The checkpoint of a cohort: a folder with one file for each member, and a manifest that holds them together."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from landscape_ray.files import write_atomic
from landscape_ray.training.manifest import read_manifest
from landscape_ray.training.state import read_checkpoint

COHORT_VERSION = 1

MANIFEST = "cohort.json"


def write_folder(
    folder: Path, num_members: int, write_member: Callable[[int, Path], None], values: dict[str, Any]
) -> None:
    """Write a checkpoint; an older one in the same folder is there until the new one is complete.

    Args:
        folder: made when missing.
        num_members: how many.
        write_member: writes the checkpoint of a member, by its place, to a path.
        values: what the manifest holds besides.

    Raises:
        UserError: no space left, or no permission.
    """
    part = f"members-{uuid.uuid4().hex[:8]}"
    for k in range(num_members):
        write_member(k, folder / part / f"{k}.pt")
    manifest = {"version": COHORT_VERSION, "members": part, "num_members": num_members, **values}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))
    for old in folder.glob("members-*"):
        if old.name != part:
            shutil.rmtree(old, ignore_errors=True)


def read_folder(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the members' checkpoints, and the manifest with the values that were written.

    Raises:
        UserError: missing, damaged or foreign files, or an unknown version.
    """
    manifest = read_manifest(folder / MANIFEST, COHORT_VERSION, of="a cohort", writer="a folder that Cohort.save wrote")
    files = [folder / manifest["members"] / f"{k}.pt" for k in range(manifest["num_members"])]
    return [read_checkpoint(file) for file in files], manifest
