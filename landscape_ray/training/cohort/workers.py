"""Threads that compute side by side, each with kernels of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Workers:
    """Python threads which share the threads that kernels may take.

    Several threads on the kernels of small networks wait for each other at the end of every one of them, and whenever
    one of them loses its processor to another program, all do. Whole updates of other members next to each other meet
    once an update. What runs here must spend its time in kernels, which let go of Python's lock.

    The threads end when this is collected.
    """

    def __init__(self, count: int) -> None:
        """Start so many threads; torch's number of threads is shared out to them."""
        total = torch.get_num_threads()
        self._pools = [ThreadPoolExecutor(1, "cohort") for _ in range(count)]  # each function has its thread
        self.run([_take(total // count)] * count)
        torch.set_num_threads(total)  # what threads to come begin with

    def run(self, functions: Sequence[Callable[[], Result]]) -> list[Result]:
        """Call each function on the thread with its number; return the results when all are done.

        Raises:
            Exception: what the first of the functions that failed raised.
        """
        futures: list[Future[Result]] = [
            pool.submit(function) for pool, function in zip(self._pools, functions, strict=False)
        ]
        wait(futures)  # also after an exception: nothing goes on in the memory that they share with the caller
        return [future.result() for future in futures]


def _take(num_threads: int) -> Callable[[], None]:
    """Return what gives the kernels of a thread so many threads."""

    def take() -> None:
        torch.get_num_threads()  # the first question of a thread makes it begin with the number of the last setting
        torch.set_num_threads(max(1, num_threads))

    return take
