"""Threads that compute side by side, each with kernels of its own."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

import torch

Job = Callable[[], None]


class Workers:
    """Python threads, the caller's among them, that share the threads which kernels may take.

    Several threads on the kernels of small networks wait for each other at the end of every one of them. Those that
    work on members of their own wait once an update. What runs here must spend its time in kernels, which let go of
    Python's lock.

    The threads end when this is collected.
    """

    def __init__(self, count: int) -> None:
        """Start one thread less than `count`."""
        self._share = max(1, torch.get_num_threads() // count)
        self._jobs: list[SimpleQueue[Job | None]] = [SimpleQueue() for _ in range(count - 1)]
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        for jobs in self._jobs:
            thread = threading.Thread(target=_work, args=(jobs, self._done, self._share), name="cohort", daemon=True)
            thread.start()
        weakref.finalize(self, _stop, self._jobs)

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Let the caller's kernels take its share of the threads only.

        What takes kernels and comes just before `run` belongs inside too: threads that shared a kernel keep their
        processors for some milliseconds, to be ready for the next one.
        """
        total = torch.get_num_threads()
        torch.set_num_threads(self._share)
        try:
            yield
        finally:
            torch.set_num_threads(total)

    def run(self, functions: Sequence[Job]) -> None:
        """Call each function, the first one here and each other on the thread with its number; return when all did.

        Raises:
            BaseException: what a function raised; nothing goes on any more then.
        """
        others = functions[1:]
        for jobs, function in zip(self._jobs, others, strict=False):
            jobs.put(function)
        try:
            functions[0]()
        finally:
            errors = [self._done.get() for _ in others]
        for error in errors:
            if error is not None:
                raise error


def _work(jobs: SimpleQueue[Job | None], done: SimpleQueue[BaseException | None], num_threads: int) -> None:
    torch.get_num_threads()  # the first question of a thread makes it begin with the number of the last setting
    torch.set_num_threads(num_threads)
    while (job := jobs.get()) is not None:
        error: BaseException | None = None
        try:
            job()
        except BaseException as raised:  # the caller raises it
            error = raised
        del job  # it holds what the caller may let go of while this waits
        done.put(error)


def _stop(jobs: Sequence[SimpleQueue[Job | None]]) -> None:
    for each in jobs:
        each.put(None)
