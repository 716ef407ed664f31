"""One trial over several processes: its actor is the first of them and drives the others.

The others are actors in the bundles of the trial's own placement group. They train the same updates on their parts of
every batch (`training/parallel.py`), and know nothing of folders, storages and decisions: the first one opens, commits
and reports, and sends them its state through the object store when it has another one than they have followed.

Not Ray Train's TorchTrainer, which this was to be. Inside a trial it starts a controller and N new processes for every
`fit`, in a placement group of its own (train/v2/_internal/execution/worker_group/worker_group.py of Ray 2.60): the
trial's bundles lie idle or are counted twice, Ray Tune takes a trial for running that waits for room, the workers are
not reused by the next trial, a report reaches the trial with the controller's next look, every two seconds, and
`RunConfig.storage_path` must be a place that all nodes see. Here the processes are those of the bundles and live as
long as the trial's actor, from one trial to the next.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch's types leave it out

from landscape_ray.config import parse
from landscape_ray.records import Record
from landscape_ray.sweep.limits import confine
from landscape_ray.sweep.resources import ResourcesConfig
from landscape_ray.training import TrainConfig, TrainState, read_checkpoint, train
from landscape_ray.training.parallel import fingerprint

JOIN_SECONDS = 120.0
"""How long the processes of a trial have to find each other once they are up."""
WAIT_SECONDS = 600.0
"""How long one waits for another in the middle of an update, where resources.max_report_seconds does not say."""
GRACE_SECONDS = 15.0
"""How long is waited, after connections broke, for what broke them."""


class Follower:
    """A process of a trial that is not the first. Its methods are called by the first one only."""

    def __init__(self, num_threads: int, gpu_share: float) -> None:
        confine(num_threads, gpu_share)
        self._state: TrainState | None = None

    def where(self) -> tuple[str, int]:
        """Return the node's identifier and the process."""
        return str(ray.get_runtime_context().get_node_id()), os.getpid()

    def join(self, address: str, port: int, rank: int, size: int, backend: str, seconds: float) -> None:
        """Join the process group that the first process offers."""
        use_interface(ray.util.get_node_ip_address() if address != LOOPBACK else LOOPBACK)
        store = TCPStore(address, port, size, False, timeout=timedelta(seconds=JOIN_SECONDS))
        _initialise(store, rank, size, backend, seconds)

    def open(self, content: np.ndarray[Any, Any], same: bool) -> None:
        """Become a replica of a state.

        Args:
            content: of a checkpoint.
            same: whether it is the state object of before in the first process. Only then it is here too: what an
                object learns in its first update (`Reducer`) is asked of all processes at the same time.
        """
        payload = read_checkpoint(Path("of the first worker"), content.tobytes())
        config = parse(TrainConfig, payload["config"], "the first worker's configuration")
        state = self._state
        if state is not None and same:
            state.config = config
        else:
            data = state.data if state is not None and state.config.data == config.data else None
            self._state = state = TrainState.create(config, data)
        state.restore(payload)

    def train(self, until: int) -> tuple[int, int]:
        """Train along; return step and fingerprint of the weights.

        Raises:
            Exception: whatever training raises; the first process, which watches, lets the others go then.
        """
        assert self._state is not None
        for _ in train(self._state, until):
            pass
        return self._state.step, fingerprint(self._state.module)


class Workers:
    """The processes of one trial after another, seen from the first.

    Args:
        resources: what a trial gets; more than one worker.
        group: the trial's placement group; bundle 0 is this process'.
    """

    def __init__(self, resources: ResourcesConfig, group: PlacementGroup) -> None:
        self._seconds = resources.max_report_seconds or WAIT_SECONDS
        share = dict(resources.share)
        options: dict[str, Any] = {"num_cpus": share.pop("CPU", 0), "num_gpus": share.pop("GPU", 0)}
        if "memory" in share:
            options["memory"] = share.pop("memory")
        actor = ray.remote(Follower)
        self._followers = [
            actor.options(
                resources=share,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
                **options,
            ).remote(resources.num_threads, resources.gpus_per_worker)
            for rank in range(1, resources.workers)
        ]
        self._known: tuple[weakref.ref[TrainState], TrainConfig, int] | None = None
        # NCCL refuses two processes on one device
        self._backend = "nccl" if resources.gpus_per_worker >= 1 else "gloo"
        self._sound = True
        self._join()

    def _join(self) -> None:
        """Meet the others; on one machine over its loopback address."""
        here, size = ray.get_runtime_context().get_node_id(), len(self._followers) + 1
        places = _results([follower.where.remote() for follower in self._followers])
        address = LOOPBACK if all(node == here for node, _ in places) else ray.util.get_node_ip_address()
        use_interface(address)
        listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        port = listener.getsockname()[1]
        # the store listens on all addresses, unless it is given a socket
        store = TCPStore(
            address, port, size, True, timedelta(seconds=JOIN_SECONDS), False, master_listen_fd=listener.detach()
        )
        calls = [
            follower.join.remote(address, port, rank, size, self._backend, self._seconds)
            for rank, follower in enumerate(self._followers, 1)
        ]
        _initialise(store, 0, size, self._backend, self._seconds)
        _results(calls)

    def train(self, state: TrainState, until: int) -> Iterator[Record]:
        """Yield what `train` yields, in all processes at the same time.

        Raises:
            RuntimeError: a process died, or has other weights than this one.
            Exception: whatever training raises here or there.
        """
        self._bring(state)
        calls = [follower.train.remote(until) for follower in self._followers]
        watch = _Watch(calls, self._release)
        try:
            yield from train(state, until)
            found = _results(calls)
        except BaseException as error:
            cause = watch.explain() if lost_peer(error) else error
            watch.stop()
            self._release()  # what is left of the others would wait for its time limit
            if cause is error:
                raise
            raise cause or RuntimeError(f"the workers of the trial lost each other: {error}") from None
        watch.stop()
        mine = (state.step, fingerprint(state.module))
        for rank, theirs in enumerate(found, 1):
            if theirs != mine:
                raise RuntimeError(
                    f"worker {rank} of the trial has other weights than worker 0 after step {state.step}; let all have "
                    "the same kind of device (resources.accelerator)"
                )

    def _bring(self, state: TrainState) -> None:
        """Send the state where it is not what the others have been trained to."""
        same = self._known is not None and self._known[0]() is state
        if same and self._known is not None and self._known[1:] == (state.config, state.num_restores):
            return
        file = io.BytesIO()
        torch.save(state.payload(), file)
        content = ray.put(np.frombuffer(file.getbuffer(), dtype=np.uint8))
        _results([follower.open.remote(content, same) for follower in self._followers])
        self._known = weakref.ref(state), state.config, state.num_restores

    def close(self) -> None:
        """End the other processes."""
        if self._sound:
            with contextlib.suppress(Exception):
                distributed.destroy_process_group()
        for follower in self._followers:
            ray.kill(follower)

    def _release(self) -> None:
        """End the other processes where one of them has failed, so that this one waits for none of them."""
        self._sound = False
        for follower in self._followers:
            ray.kill(follower)
        if self._backend == "nccl":  # which waits on for processes that are gone; gloo would stand still here
            with contextlib.suppress(Exception):
                distributed.distributed_c10d._abort_process_group()


def workers_of(resources: ResourcesConfig, before: Workers | None) -> Workers | None:
    """Return the processes of a trial's actor, those that it has had already if any; None for one process."""
    if resources.workers == 1 or before is not None:
        return before
    return Workers(resources, ray.util.get_current_placement_group())


class _Watch:
    """A thread that looks after the others during an update, and ends them all when one of them has failed.

    This process, which waits for the one that failed, is let go by that: connections of a process that ends are closed.
    """

    def __init__(self, calls: Sequence[Any], release: Callable[[], None]) -> None:
        self.cause: BaseException | None = None
        """What made the processes lose each other; None where nothing is known but that they did."""
        self._calls, self._release, self._stopped = calls, release, threading.Event()
        self._thread = threading.Thread(target=self._run, name="workers", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pending, deadline = list(self._calls), math.inf
        while pending and not self._stopped.is_set() and self.cause is None and time.monotonic() < deadline:
            ready, pending = ray.wait(pending, timeout=0.2)
            for call in ready:
                try:
                    ray.get(call)
                except Exception as error:
                    if not lost_peer(cause := _cause(error)):
                        self.cause = cause
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if deadline < math.inf and not self._stopped.is_set():
            self._release()

    def explain(self) -> BaseException | None:
        """Wait for what broke the connections to this process; return it where it is known."""
        self._thread.join(2 * GRACE_SECONDS)
        return self.cause

    def stop(self) -> None:
        """Let the thread end."""
        self._stopped.set()


def lost_peer(error: BaseException) -> bool:
    """Return whether an error says no more than that another process was not there."""
    return isinstance(error, distributed.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))


def _results(calls: Sequence[Any]) -> list[Any]:
    """Return the results of all calls, or raise what a process raised."""
    try:
        found: list[Any] = ray.get(list(calls))
    except (RayTaskError, RayActorError) as error:
        raise _cause(error) from None
    return found


def _cause(error: BaseException) -> BaseException:
    if isinstance(error, RayActorError):
        return RuntimeError("a worker process of the trial died or its node was lost; is there enough memory?")
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _initialise(store: Any, rank: int, size: int, backend: str, seconds: float) -> None:
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))


LOOPBACK = "127.0.0.1"


def use_interface(address: str) -> None:
    """Let gloo and NCCL use the network interface of an address, unless the environment names one.

    gloo would take the one that the machine's own name leads to, which may lead nowhere, or to another network.
    """
    if not sys.platform.startswith("linux"):
        return
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address of this family
                found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                if socket.inet_ntoa(found[20:24]) == address:
                    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                        os.environ.setdefault(variable, name)
                    return
