"""The doctor's last question: does Ray start here, or answer there, and do its nodes see the results folder?"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.exceptions import RayError

from landscape_ray.errors import UserError
from landscape_ray.sweep.cluster import ALIKE, ask_nodes, code_env, nodes_alive, private_token
from landscape_ray.sweep.doctor import Finding
from landscape_ray.sweep.placement import describe, present
from landscape_ray.sweep.session import versions
from landscape_ray.sweep.tuner import check_address
from landscape_ray.tracking.storage import open_storage


def check_ray(results: Path, address: str | None, storage_uri: str | None = None) -> Iterator[Finding]:
    """Yield whether Ray runs a task, and for a cluster what its nodes are; a session that is up already is used."""
    remedy = "start the cluster, correct --address, or leave it out to run here"
    started = False
    try:
        check_address(address)
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            options = {"include_dashboard": False} if address is None else {"runtime_env": code_env()}
            with private_token():
                ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
            started = True
        yield _nodes()
        yield from _each_node(results, storage_uri)
    except (UserError, RayError, OSError, RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        yield Finding("Ray", "error", first, remedy)
    finally:
        if started:
            ray.shutdown()


def _nodes() -> Finding:
    nodes = nodes_alive()
    total = ray.cluster_resources()
    found = f"{len(nodes)} node(s), {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
    if not total.get("CPU"):
        return Finding("Ray", "warning", found, "no node has a CPU for trials yet; an autoscaler will start some")
    kinds = dict.fromkeys(describe(node) for node in present())
    return Finding("Ray", "ok", f"{found}; resources.* can ask a node for {' | '.join(kinds)}")


def _each_node(results: Path, storage_uri: str | None) -> Iterator[Finding]:
    """Let every node read a file of the results folder, or of the storage, and say which versions it has."""
    mark, secret = results.absolute() / f".doctor-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
    results.mkdir(parents=True, exist_ok=True)
    mark.write_text(secret)
    here = versions()
    storage = None if storage_uri is None else open_storage(storage_uri)
    try:
        if storage is not None:
            storage.put(mark.name, secret.encode())
        stored = None if storage_uri is None else (storage_uri, mark.name)
        for address, there in ask_nodes(str(mark), stored).items():
            name = f"node {address}"
            if isinstance(there, str):
                yield Finding(name, "error", there, "install the dependencies of landscape_ray there; see README")
            elif there["content"] != secret:
                found = f"does not see {results.absolute()} ({there['content'][:120]})"
                yield Finding(name, "error", found, "give a --results folder that all nodes share, or --storage")
            elif odd := [
                f"{p} {there.get(p, 'missing')}, not {here.get(p)}" for p in ALIKE if there.get(p) != here.get(p)
            ]:
                yield Finding(name, "warning", "; ".join(odd), "install the versions of scripts/constraints.txt there")
            else:
                seen = "the results folder" if storage is None else "the results folder or the storage"
                yield Finding(name, "ok", f"runs tasks, sees {seen}, has the same versions")
    finally:
        with contextlib.suppress(OSError):
            mark.unlink()
            if storage is not None:
                storage.delete([mark.name])
