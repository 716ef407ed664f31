"""Files that are whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from landscape_ray.errors import UserError


def write_atomic_with(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file through `write(file)`: readers see the old content or the new one, never a part.

    Raises:
        UserError: no space left on the device, or the folder cannot be written. The old content is untouched.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError) and (told := storage_error(error, path)) is not None:
            raise told from None
        raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` as `write_atomic_with` does."""
    data = content.encode() if isinstance(content, str) else content
    write_atomic_with(path, lambda file: file.write(data))


def storage_error(error: OSError, path: Path) -> UserError | None:
    """Return a full disk or a missing permission as a sentence, None for any other error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no space left to write {path}; free some space, then `landscape-ray resume` goes on")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"cannot write {path}: {error.strerror}; choose a folder that you may write")
    return None
