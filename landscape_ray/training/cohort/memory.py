"""Memory for what is read from end to end in every update."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys

import torch
from torch import Tensor

HUGE_PAGE = 2**21
"""Bytes."""


def zeros(*size: int, device: torch.device) -> Tensor:
    """Return float32 zeros; on Linux in huge pages, where the kernel has some to give.

    With pages of 4 kB the processor knows the addresses of only a few MB at a time by heart, and looks up the rest
    again in every update. Measured on a virtual machine that cost a tenth of an update of 32 members.
    """
    num_bytes = 4 * math.prod(size)
    if sys.platform != "linux" or device.type != "cpu" or num_bytes < HUGE_PAGE:
        return torch.zeros(size, device=device)
    block = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        block.madvise(mmap.MADV_HUGEPAGE)
    first = -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    return torch.frombuffer(block, dtype=torch.float32, count=math.prod(size), offset=first).view(size)
