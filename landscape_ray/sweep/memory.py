"""How much memory a trial uses at most: of its device, or without one of the process that it runs in."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""What Linux takes as: set the high-water mark to the present size."""


def reset_peak() -> None:
    """Begin to measure: what an earlier trial of this process has used no longer counts."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then that of the process
        _CLEAR.write_text(_RESET_PEAK)


def peak_bytes() -> float:
    """Return the most that was used since `reset_peak`; nan where the system does not say.

    Without a device that is the resident memory of the process: interpreter and libraries included.
    """
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return math.nan
    return float(line.split()[1]) * 1024
