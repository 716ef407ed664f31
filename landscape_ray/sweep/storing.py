"""How a sweep and its trials come by their folders where there is a storage beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from landscape_ray.errors import UserError
from landscape_ray.tracking.cache import META, SPEC, bring_sweep, bring_unit, held, read_mark, stored_meta
from landscape_ray.tracking.driver_mirror import DriverMirror
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.mirror import Mirror
from landscape_ray.tracking.storage import Storage, open_storage, reason_of


def check_new(uri: str, name: str) -> None:
    """Raise unless a new sweep of this name can go to a storage.

    Raises:
        UserError: no such storage, it cannot be written, or it has a sweep of this name.
    """
    storage = open_storage(uri)
    storage.check()
    try:
        taken = stored_meta(storage.at(name)) is not None
    except OSError as error:
        raise UserError(f"the storage {storage.shown} cannot be used ({reason_of(error)}); check the address") from None
    if taken:
        raise UserError(
            f"{storage.at(name).shown} exists; use another --name, or `landscape-ray resume {storage.at(name).shown}` "
            "to go on with it"
        )


def sweep_storage(uri: str, name: str) -> Storage:
    """Return the place of a sweep in a storage.

    Raises:
        UserError: no such storage.
    """
    return open_storage(uri).at(name)


def driver_mirror(folder: SweepFolder, uri: str | None) -> DriverMirror | None:
    """Return what keeps a sweep and its storage alike, None for a sweep without one.

    Raises:
        UserError: no such storage.
    """
    return None if uri is None else DriverMirror(folder, sweep_storage(uri, folder.path.name))


@contextlib.contextmanager
def stopping(mirror: DriverMirror | None) -> Iterator[None]:
    """End a driver's thread when the block ends, in whichever way."""
    try:
        yield
    finally:
        if mirror is not None:
            mirror.stop()


def open_for_trial(
    path: Path, uri: str | None, attempt: int, mirror: Mirror | None = None
) -> tuple[SweepFolder, Mirror | None]:
    """Return the sweep's folder on the machine of a trial, and what uploads the trial.

    On the driver's machine, or where its folder is shared, that is the folder itself. Elsewhere it is one under the
    same path that gets what a trial needs to know of the sweep.

    Args:
        path: of the folder, as the driver has it.
        uri: of the storage; None where there is none, and the folder is shared by all machines.
        attempt: the number of the driver; a folder that knows of earlier ones only is one of theirs.
        mirror: that this process has already.

    Raises:
        UserError: no folder, and none to be had.
    """
    if uri is None or mirror is not None:
        return SweepFolder.open(path), mirror
    sweep, mark = sweep_storage(uri, path.name), read_mark(path)
    known = int(SweepFolder.open(path).meta.get("attempts", 0)) if (path / META).is_file() else -1
    home = known >= attempt and not (mark is not None and mark.copied)
    if known < attempt:
        try:
            with held(path):
                bring_unit(sweep, path, lambda relative: relative in (META, SPEC))
            if not (path / META).is_file():
                raise UserError(f"no sweep at {sweep.shown}, and none in {path}; has its driver reached the storage?")
        except OSError as error:
            raise UserError(f"{sweep.shown} cannot be read ({reason_of(error)}); is the storage up?") from None
    return SweepFolder.open(path), Mirror(sweep, home=home)


def send_sweep(folder: SweepFolder, uri: str) -> None:
    """Send to its storage what it has not got of a sweep that nobody runs.

    Raises:
        UserError: no such storage, or not everything could be sent.
    """
    mirror = DriverMirror(folder, sweep_storage(uri, folder.path.name))
    mirror.publish()
    behind = mirror.settle()
    if behind or mirror.problem:
        why = mirror.problem or f"{behind} trials are missing"
        raise UserError(f"sweep '{folder.path.name}' is not fully stored ({why}); run the command again")


def bring_up_to_date(folder: SweepFolder, uri: str) -> str:
    """Bring a sweep's folder up to what is stored, where another machine went on with it; return what was wrong.

    A population that is extended needs the checkpoints of its members here; other trials fetch theirs when they begin.
    """
    sweep = sweep_storage(uri, folder.path.name)
    try:
        if stored_meta(sweep) is not None:
            bring_sweep(sweep, folder.path, checkpoints=folder.population_path.exists())
    except (OSError, UserError) as error:
        return reason_of(error)
    return ""
