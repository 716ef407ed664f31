"""What a sweep on many machines needs beyond one: the code reaches the nodes, and every node sees the same folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import landscape_ray
from landscape_ray.errors import UserError
from landscape_ray.sweep.session import versions
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.cache import META
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.storage import open_storage
from landscape_ray.tracking.uris import mask_secrets

CHECK_SECONDS = 120.0
"""How long nodes have to answer; each starts an interpreter for it."""

ALIKE = ("python", "ray", "torch", "numpy", "pyarrow")
"""Versions that decide about results or about what can be read."""

_PATH = re.compile(r"([A-Za-z_]\w*)(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def runtime_env(spec: SweepSpec) -> dict[str, Any]:
    """Return Ray's runtime environment for the workers of a sweep on a cluster: the code that this driver runs.

    That is this package, so that a node's own installation may be older or absent, and every module that the sweep
    names by path and that is not an installed package. Dependencies are the nodes' own (`cluster/`, README). No
    variable of this process is passed on: Ray shows the environment of a job to all who see its dashboard.
    """
    return code_env(*named_modules(spec.params()))


def code_env(*names: str) -> dict[str, Any]:
    """Return the runtime environment with this package and those of the named modules that are not installed."""
    modules = {Path(landscape_ray.__file__).parent}
    modules |= {path for name in names if (path := _own_code(name)) is not None}
    return {"py_modules": sorted(map(str, modules)), "excludes": ["**/__pycache__/"]}


def named_modules(params: Mapping[str, Any]) -> set[str]:
    """Return the top-level names of all `package.module:Name` in a flat configuration."""
    return {match[1] for text in _texts(params) if (match := _PATH.fullmatch(text))}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)


def _own_code(name: str) -> Path | None:
    """Return the folder or file of a top-level module, None for one that is installed, built in or not there."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if found is None:
        return None
    places = list(found.submodule_search_locations or ())  # a package, perhaps without an __init__.py
    path = Path(places[0] if places else found.origin or "")
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    if not path.exists() or any(path.resolve().is_relative_to(place) for place in installed):
        return None
    return path if path.is_dir() or path.suffix == ".py" else None


@contextlib.contextmanager
def private_token() -> Iterator[None]:
    """Keep to this user the token that Ray makes inside the block: Ray leaves its file readable by everybody."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    before = path.exists()
    try:
        yield
    finally:
        if not before and path.exists():
            with contextlib.suppress(OSError):
                path.chmod(0o600)


def _look(path: str, stored: tuple[str, str] | None = None) -> dict[str, str]:
    """Return what a node has: its versions, and what it reads at a path or, for lack of it, in a storage."""
    try:
        if stored is not None and not Path(path).exists():
            content = open_storage(stored[0]).get(stored[1]).decode()
        else:
            content = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        content = str(error)
    return {**versions(), "content": content}


def nodes_alive() -> list[dict[str, Any]]:
    """Return Ray's entries of the nodes that are up."""
    return [node for node in ray.nodes() if node["Alive"]]


def ask_nodes(path: str, stored: tuple[str, str] | None = None) -> dict[str, dict[str, str] | str]:
    """Return by node address its versions and what it reads at `path`; a sentence where it cannot tell.

    Args:
        path: of a file.
        stored: address of a storage, and the name of an object with the same content in it.
    """
    asked, look = {}, ray.remote(num_cpus=0, max_retries=0)(_look)
    for node in nodes_alive():
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[node["NodeManagerAddress"]] = look.options(scheduling_strategy=here).remote(path, stored)
    found: dict[str, dict[str, str] | str] = {}
    for address, answer in asked.items():
        try:
            found[address] = ray.get(answer, timeout=CHECK_SECONDS)
        except GetTimeoutError:
            found[address] = f"it does not answer within {CHECK_SECONDS:.0f} s"
        except RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            found[address] = f"it cannot run landscape_ray: {lines[-1]}"
    return found


def check_nodes(folder: SweepFolder, storage_uri: str | None = None) -> list[str]:
    """Return what is odd about the cluster's nodes, one sentence each; a single node is not asked.

    Args:
        folder: of the sweep.
        storage_uri: of its storage, through which nodes may take part that do not see the folder.

    Raises:
        UserError: a node does not see the sweep, or cannot run this package.
    """
    if len(nodes_alive()) < 2:
        return []
    here, warnings = versions(), []
    stored = None if storage_uri is None else _stored_meta(storage_uri, folder.path.name)
    for address, there in ask_nodes(str(folder.meta_path), stored).items():
        if isinstance(there, str):
            raise UserError(f"node {address} cannot take trials ({there}); install landscape_ray's dependencies there")
        if str(folder.meta["sweep_id"]) not in there["content"]:
            raise UserError(
                f"node {address} does not see the sweep in {folder.path} "
                f"({mask_secrets(there['content'])[:200]}); give a --results folder that all nodes share, or --storage"
            )
        warnings += [
            f"node {address} has {name} {there.get(name, 'not at all')}, this machine {here.get(name)}; "
            "results may differ by node"
            for name in ALIKE
            if there.get(name) != here.get(name)
        ]
    return warnings


def _stored_meta(storage_uri: str, name: str) -> tuple[str, str] | None:
    """Return where a sweep's sweep.json is stored; None where the storage does not answer."""
    with contextlib.suppress(OSError, UserError):
        if (manifest := open_storage(storage_uri).at(name).latest()) is not None:
            return storage_uri, f"{name}/{manifest.files[META].object_name(META)}"
    return None
