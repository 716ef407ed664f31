"""Files that are whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from landscape_ray.errors import UserError


def write_atomic_with(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file through `write(file)`: readers see the old content or the new one, also after a power cut.

    Args:
        path: the file; its folder is made when missing.
        write: called once with the open binary file.

    Raises:
        UserError: the disk is full, or the place cannot be written. The old content, if any, is untouched.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                _through(file, write)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from None


def _through(file: IO[bytes], write: Callable[[IO[bytes]], Any]) -> None:
    """Call `write(file)`; an OSError of the file wins over what the caller makes of it (torch.save: RuntimeError)."""
    watched = _Watched(file)
    try:
        write(watched)  # type: ignore[arg-type]  # what writers use of a file is there
    except Exception:
        if watched.error is not None:
            raise watched.error from None
        raise


class _Watched:
    """A file that remembers why writing failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` as `write_atomic_with` does; text is written as UTF-8."""
    content = data.encode() if isinstance(data, str) else data
    write_atomic_with(path, lambda file: file.write(content))


def sync_folder(path: Path) -> None:
    """Make a rename durable. Not every file system lets a folder be opened or synced; the rename stands regardless."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def storage_error(path: Path, error: OSError) -> UserError:
    """Return a full disk, or a place that cannot be written, as a sentence with its remedy."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space and run `landscape-ray resume`" if full else "choose a place that you may write to"
    return UserError(f"cannot write {path}: {(error.strerror or str(error)).lower()}; {remedy}")


def link_or_copy(path: Path, other: Path) -> None:
    """Give a file another name, under which it stays when the first is replaced."""
    try:
        os.link(path, other)
    except FileExistsError:
        pass  # a report is repeated
    except OSError:  # a file system without hard links
        temporary = other.with_suffix(".tmp")
        shutil.copyfile(path, temporary)
        os.replace(temporary, other)
