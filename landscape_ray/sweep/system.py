"""What a trial's process and its machine are doing, sampled while it trains, under MLflow's names of system metrics.

Read from the kernel and from torch directly: a sample takes well under a millisecond without a device.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import torch

_MEMORY = Path("/proc/meminfo")
_PROCESS = Path("/proc/self/statm")
_PROCESSORS = Path("/proc/stat")


class SystemSampler:
    """Samples at most every so many seconds. The first sample is due one pause after the object was made.

    Args:
        seconds: least pause between two samples; 0 for none at all.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due = time.monotonic() + seconds if seconds else float("inf")
        self._before = _clocks() if seconds else (0.0, 0.0, 0.0, 0.0)

    @property
    def due(self) -> bool:
        """Whether it is time for the next sample; costs next to nothing, so that it may be asked at every update."""
        return time.monotonic() >= self._due

    def sample(self) -> dict[str, float]:
        """Return the quantities that this system tells, by name.

        cpu_utilization_percentage: of all processors of the machine, since the last sample.
        process_cpu_percentage: processor time of this process over the time passed; 100 is one processor.
        process_memory_bytes: resident memory of this process.
        system_memory_usage_percentage: of the machine's memory.
        process_gpu_memory_bytes: held by tensors of this process on its device.
        gpu_0_memory_usage_percentage, gpu_0_utilization_percentage, gpu_0_power_usage_watts: of the device that the
            process trains on, all processes together; the last two only where NVIDIA's library for it is installed.
        """
        self._due = time.monotonic() + self._seconds
        now = _clocks()
        wall, process, busy, total = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        found: dict[str, float] = {}
        if wall > 0:
            found["process_cpu_percentage"] = 100 * process / wall
        if total > 0:
            found["cpu_utilization_percentage"] = 100 * busy / total
        with contextlib.suppress(OSError, ValueError, LookupError):  # not Linux
            found["process_memory_bytes"] = float(_PROCESS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            sizes = {line.partition(":")[0]: line.split()[1] for line in _MEMORY.read_text().splitlines()[:3]}
            found["system_memory_usage_percentage"] = 100 * (
                1 - float(sizes["MemAvailable"]) / float(sizes["MemTotal"])
            )
        return found | _of_device()


def _clocks() -> tuple[float, float, float, float]:
    """Return seconds by the clock, processor time of the process, and the machine's ticks: busy ones, and all."""
    busy = total = 0.0
    with contextlib.suppress(OSError, ValueError, LookupError):
        with open(_PROCESSORS, "rb") as file:
            ticks = [float(text) for text in file.readline().split()[1:9]]
        total = sum(ticks)
        busy = total - ticks[3] - ticks[4]  # idle, waiting for a disk
    return time.monotonic(), time.process_time(), busy, total


def _of_device() -> dict[str, float]:
    """Return what the device of this process tells; a process that does not use one is not made to."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # not annotated in torch
        return {}
    free, total = torch.cuda.mem_get_info()
    found = {
        "process_gpu_memory_bytes": float(torch.cuda.memory_allocated()),
        "gpu_0_memory_usage_percentage": 100 * (1 - free / total),
    }
    # no library for it, no permission, or a share of a device, of which it tells nothing: it has errors of its own
    with contextlib.suppress(Exception):
        found["gpu_0_utilization_percentage"] = float(torch.cuda.utilization())
        found["gpu_0_power_usage_watts"] = torch.cuda.power_draw() / 1000
    return found
