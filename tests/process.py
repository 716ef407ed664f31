"""One of two processes that meet: `python process.py RANK FOLDER`.

A line of its input holds a test file and a folder, as JSON; the process calls the file's `in_process(RANK, folder)`,
waits for the other one, and leaves `RANK.done` in the folder. It ends with its input.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    rank, meeting = int(sys.argv[1]), Path(sys.argv[2]) / "meeting"  # a file, not a port, which another might take
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for line in sys.stdin:
        file, folder = json.loads(line)
        runpy.run_path(file)["in_process"](rank, Path(folder))
        torch.distributed.barrier()
        (Path(folder) / f"{rank}.done").touch()
    # What was found is on disk. gloo's threads now and then abort a process that ends in the ordinary way
    # ("terminate called without an active exception"), which says nothing about what is tested here.
    sys.stderr.flush()
    os._exit(0)
