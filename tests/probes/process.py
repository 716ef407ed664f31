"""One of two processes that meet: `python process.py FILE RANK FOLDER` calls FILE's `in_process(RANK, FOLDER)`."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    file, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    meeting = f"file://{folder}/meeting"  # without a port, which another process might take
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    runpy.run_path(file)["in_process"](rank, folder)
    torch.distributed.barrier()
    # What was found is on disk. gloo's threads now and then abort a process that ends in the ordinary way
    # ("terminate called without an active exception"), which says nothing about what is tested here.
    sys.stderr.flush()
    os._exit(0)
