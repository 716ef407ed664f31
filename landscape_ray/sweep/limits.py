"""Limits of a trial: the time for one report, watched without the interpreter, and its share of a GPU's memory."""

from __future__ import annotations

import contextlib
import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path

import torch


def hang_path(sweep: Path, trial_name: str) -> Path:
    """Return where a trial that hung has left what it was doing."""
    return sweep / "hangs" / f"{trial_name}.txt"


@contextlib.contextmanager
def time_limit(seconds: float | None, report: Path) -> Iterator[None]:
    """End this process if the block takes too long, with the stack of every thread in `report`.

    The watch is a thread of C that does not need the interpreter's lock: it also ends a process that hangs in a
    library, a driver or a file system. A process that the kernel has stopped it cannot end.

    Args:
        seconds: the limit; None for none.
        report: file to write; removed when the block ends in time.
    """
    if seconds is None:
        yield
        return
    report.parent.mkdir(parents=True, exist_ok=True)
    with open(report, "w", encoding="utf-8") as file:
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    report.unlink(missing_ok=True)


def confine(num_threads: int, gpu_share: float) -> None:
    """Hold this process to what a trial, or a worker of it, may use of its machine.

    Args:
        num_threads: of torch.
        gpu_share: GPUs that Ray has set aside for it.
    """
    torch.set_num_threads(num_threads)
    if gpu_share == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all of them visible to those that asked for none
    limit_gpu_memory(gpu_share)


def limit_gpu_memory(share: float) -> None:
    """Let this process allocate no more of its GPU's memory than its share of the GPU.

    Ray counts shares and enforces none: without the limit one trial that grows takes its neighbours along. With it,
    that trial runs out of memory alone.

    Args:
        share: GPUs of a worker; nothing is limited at 0, or from 1 on.
    """
    if 0 < share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)
