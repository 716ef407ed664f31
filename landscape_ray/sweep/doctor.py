"""Is everything there that a sweep needs? Each check says what it found and, where something is amiss, what to do."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch

from landscape_ray.errors import UserError
from landscape_ray.sweep.session import FREE_BYTES_FLOOR
from landscape_ray.tracking.projector import Projector
from landscape_ray.tracking.storage import open_storage
from landscape_ray.tracking.uris import mask_secrets

Status: TypeAlias = Literal["ok", "warning", "error"]

LITTLE_BYTES = 5 * 2**30
"""Less free space than this is worth a warning."""
SHARED_MEMORY_BYTES = 2**30
"""With less, Ray's object store goes to the disk."""
PACKAGE = "landscape_ray"


class Finding(NamedTuple):
    """The outcome of one check."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def examine(
    results: Path, address: str | None, tracking_uri: str, *, ray: bool = True, storage_uri: str | None = None
) -> Iterator[Finding]:
    """Yield one finding after the other, the quick ones first.

    Args:
        results: folder of the sweeps; made when absent, as a sweep would.
        address: of a Ray cluster, None for one that is started here.
        tracking_uri: store or server that runs are to be tracked in.
        ray: whether to start Ray or to ask the cluster, which takes some seconds.
        storage_uri: of a storage beside the results folder; None for none.
    """
    yield check_python()
    yield check_packages()
    yield check_gpu()
    yield check_storage(results)
    if storage_uri is not None:
        yield check_object_storage(storage_uri)
    yield check_disk(results)
    yield check_shared_memory()
    yield check_tracking(tracking_uri)
    yield check_token(address)
    if ray:
        from landscape_ray.sweep.doctor_ray import check_ray  # here: importing Ray takes a while

        yield from check_ray(results, address, storage_uri)


def worst(findings: list[Finding]) -> Status:
    """Return the worst status of all.

    >>> worst([Finding("a", "ok", ""), Finding("b", "warning", "", "do this")])
    'warning'
    """
    statuses = [finding.status for finding in findings]
    return "error" if "error" in statuses else "warning" if "warning" in statuses else "ok"


def check_python() -> Finding:
    """Name the interpreter; one that is too old would not have come this far."""
    return Finding("Python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")


def check_packages(requirements: list[str] | None = None) -> Finding:
    """Check that every dependency is installed in a version that fits.

    Args:
        requirements: in the form of pyproject.toml; None for those of this package.
    """
    if requirements is None:
        try:
            requirements = importlib.metadata.requires(PACKAGE) or []
        except importlib.metadata.PackageNotFoundError:
            return Finding("packages", "warning", "landscape_ray is run from its source", "pip install --editable .")
    wrong, shown = [], []
    for requirement in requirements:
        if "extra ==" in requirement:
            continue
        match = re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*(?:>=\s*([0-9.]+))?", requirement)
        assert match is not None
        name, least = match[1], match[2]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if least is not None and _numbers(version) < _numbers(least):
            wrong.append(f"{name} {version} is older than {least}")
        if name in ("torch", "ray", "mlflow", "optuna"):
            shown.append(f"{name} {version}")
    if wrong:
        remedy = "pip install --constraint scripts/constraints.txt --editable ."
        return Finding("packages", "error", "; ".join(wrong), remedy)
    return Finding("packages", "ok", ", ".join(shown))


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: 2.13.0+cpu as (2, 13, 0)."""
    match = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def check_gpu() -> Finding:
    """Check that GPUs which the machine has can be computed on."""
    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            remedy = "install a PyTorch built for CUDA (pytorch.org), and check that nvidia-smi works"
            return Finding("GPU", "warning", "there is an NVIDIA driver, but PyTorch cannot use it", remedy)
        return Finding("GPU", "ok", "none; trials run on the CPU")
    try:
        x = torch.ones(256, 256, device="cuda")
        torch.cuda.synchronize()
        wrong = float((x @ x).sum()) != 256.0**3
        free, total = torch.cuda.mem_get_info()
    except RuntimeError as error:
        return Finding("GPU", "error", str(error).splitlines()[0], "check nvidia-smi and the driver's version")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if wrong:
        return Finding("GPU", "error", f"{names} computes wrongly", "take it out of service")
    found = f"{names}; {free / 2**30:.0f} of {total / 2**30:.0f} GiB free on the first"
    if free < total / 2:
        return Finding("GPU", "warning", found, "somebody else is computing there; see nvidia-smi")
    return Finding("GPU", "ok", found)


def check_storage(results: Path) -> Finding:
    """Check that the results folder does what sweeps rely on: write, sync, rename, link, lock."""
    shown = str(results.absolute())
    try:
        results.mkdir(parents=True, exist_ok=True)
        here = results / f".doctor-{uuid.uuid4().hex[:8]}"
        started = time.monotonic()
        here.mkdir()
        try:
            problem = _try_folder(here)
        finally:
            shutil.rmtree(here, ignore_errors=True)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        return Finding("storage", "error", f"{shown}: {why}", "choose a --results folder that you may write to")
    milliseconds = 1000 * (time.monotonic() - started)
    if problem:
        return Finding("storage", "error" if "lock" in problem else "warning", f"{shown}: {problem}", _STORAGE_REMEDY)
    if milliseconds > 1000:
        remedy = "it is slow; raise commit_steps, so that trials save less often"
        return Finding("storage", "warning", f"{shown}: a write takes {milliseconds:.0f} ms", remedy)
    return Finding("storage", "ok", f"{shown}, a write takes {milliseconds:.0f} ms")


def check_object_storage(uri: str) -> Finding:
    """Check that a storage can be written, listed, read and deleted from."""
    begun = time.monotonic()
    try:
        storage = open_storage(uri)
        storage.check()
    except UserError as error:
        return Finding("--storage", "error", str(error), "correct --storage or its credentials, or leave it out")
    milliseconds = 1000 * (time.monotonic() - begun)
    return Finding("--storage", "ok", f"{storage.shown}, an object comes and goes in {milliseconds:.0f} ms")


_STORAGE_REMEDY = "choose a --results folder on a POSIX file system (local, NFS 4, Lustre, EFS ...)"


def _try_folder(here: Path) -> str:
    """Return what a folder cannot do; an empty text where it can do all."""
    import fcntl

    from landscape_ray.files import write_atomic

    content = os.urandom(2**16)
    write_atomic(here / "a", content)
    if (here / "a").read_bytes() != content:
        return "what was written is not what is read back"
    with open(here / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return "files cannot be locked, so that two drivers could run one sweep"
    try:
        os.link(here / "a", here / "b")
    except OSError:
        return "no hard links: only one checkpoint of each trial is kept"
    return ""


def check_disk(results: Path) -> Finding:
    """Check the free space of the results folder."""
    existing = next(path for path in (results, *results.absolute().parents) if path.exists())
    usage = shutil.disk_usage(existing)
    held = sum(path.stat().st_size for path in _files(results))
    found = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free, sweeps hold {held / 2**30:.2f} GiB"
    if usage.free < FREE_BYTES_FLOOR:
        return Finding("disk", "error", found, "free some space; a sweep does not start with so little")
    if usage.free < LITTLE_BYTES:
        return Finding("disk", "warning", found, "free some space before a long sweep")
    return Finding("disk", "ok", found)


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            with contextlib.suppress(OSError):
                if path.is_file() and not path.is_symlink():
                    yield path


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Check the memory that Ray's processes share; in containers it is often a few MiB."""
    if not folder.is_dir():
        return Finding("shared memory", "ok", "not used on this system")
    free = shutil.disk_usage(folder).free
    found = f"{free / 2**30:.1f} GiB free in {folder}"
    if free < SHARED_MEMORY_BYTES:
        remedy = "start the container with --shm-size=4g; until then Ray uses the disk, which is slower"
        return Finding("shared memory", "warning", found, remedy)
    return Finding("shared memory", "ok", found)


def check_tracking(tracking_uri: str) -> Finding:
    """Check that runs can be tracked."""
    shown = mask_secrets(tracking_uri)
    try:
        Projector.check(tracking_uri)
    except UserError as error:
        return Finding("tracking", "error", str(error), "start the server, correct --tracking-uri, or leave it out")
    remote = re.match(r"http://(?!127\.0\.0\.1|localhost|\[::1\])", tracking_uri)
    if remote and os.environ.get("MLFLOW_TRACKING_PASSWORD"):
        return Finding("tracking", "warning", f"{shown}: the password goes over the network unencrypted", "use https")
    return Finding("tracking", "ok", shown)


def check_token(address: str | None, home: Path | None = None) -> Finding:
    """Check Ray's token: without one, whoever reaches a cluster's ports runs code there.

    Args:
        address: of a cluster; on this machine alone, Ray 2.59 and newer make a token by themselves.
        home: folder that holds `.ray/auth_token`; None for the user's.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or (home or Path.home()) / ".ray" / "auth_token")
    if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        return Finding("Ray token", "warning", f"others can read {path}", f"chmod 600 {path}")
    if mode == "disabled":
        remedy = "unset RAY_AUTH_MODE, unless nobody else reaches this network"
        return Finding("Ray token", "warning", "switched off: whoever reaches Ray's ports can run code", remedy)
    has_token = path.exists() or bool(os.environ.get("RAY_AUTH_TOKEN"))
    if address is not None and not has_token:
        remedy = "ray get-auth-token --generate, copy it to every node, start them with RAY_AUTH_MODE=token"
        return Finding("Ray token", "warning", "none: whoever reaches the cluster's ports can run code", remedy)
    return Finding("Ray token", "ok", "there" if has_token else "made when Ray starts here")
