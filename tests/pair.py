"""Two processes of torch.distributed, for tests of what is data-parallel."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


class Pair:
    """Two processes that have met and wait for work; started by the first, and anew by the next after a failure.

    Args:
        make_folder: makes a folder for their meeting and what they complain of.
    """

    PATIENCE_SECONDS = 120.0

    def __init__(self, make_folder: Callable[[], Path]) -> None:
        self._make_folder = make_folder
        self._processes: list[subprocess.Popen[str]] = []

    def call(self, file: str, folder: Path) -> None:
        """Let both call `in_process` of a test file."""
        if not self._processes or any(process.poll() is not None for process in self._processes):
            self.end()
            self._start()
        for process in self._processes:
            print(json.dumps([file, str(folder)]), file=process.stdin, flush=True)
        deadline = time.monotonic() + self.PATIENCE_SECONDS
        while not all((folder / f"{rank}.done").exists() for rank in range(2)):
            late = time.monotonic() > deadline
            if late or any(process.poll() is not None for process in self._processes):
                self.end()
                errors = [(self._folder / f"{rank}.txt").read_text() for rank in range(2)]
                pytest.fail(f"{'too late' if late else 'a process died'}: {'; '.join(errors)}")
            time.sleep(0.01)

    def _start(self) -> None:
        self._folder = self._make_folder()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may resolve to nothing
        program = str(Path(__file__).with_name("process.py"))
        for rank in range(2):
            with open(self._folder / f"{rank}.txt", "w") as errors:
                command = [sys.executable, program, str(rank), str(self._folder)]
                self._processes.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=errors, text=True)
                )

    def end(self) -> None:
        """End both."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes = []
