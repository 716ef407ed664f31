"""The small JSON file that says what a folder of checkpoints holds, and the version of what is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from landscape_ray.errors import UserError


def read_manifest(path: Path, version: int, *, of: str, writer: str) -> dict[str, Any]:
    """Return the content of a manifest.

    Args:
        path: the file, in the folder of what was saved.
        version: the one that this program reads.
        of: what was saved, as "a cohort".
        writer: the folders that are meant, as "a folder that Cohort.save wrote".

    Raises:
        UserError: no such file, a damaged or foreign one, or another version.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no checkpoint of {of} in {path.parent}; give {writer}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} cannot be read ({error}); delete it to start anew") from None
    if not isinstance(content, dict) or "version" not in content:
        raise UserError(f"{path} is not of {of}; give {writer}")
    check_version(content, path.parent, version)
    return content


def check_version(content: Mapping[str, Any], path: Path, version: int) -> None:
    """Check that what was saved at `path` has the version that this program reads.

    Raises:
        UserError: it has another one.
    """
    found = content["version"]
    if not isinstance(found, int) or found != version:  # a tensor of a foreign file compares to a tensor
        raise UserError(
            f"checkpoint {path} has version {found}, this program reads {version}; "
            "use the version of landscape_ray that wrote it"
        )
