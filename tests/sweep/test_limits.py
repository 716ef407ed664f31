"""A block that takes too long ends its process, even inside a C function, and says where it was."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from landscape_ray.sweep.limits import hang_path, limit_gpu_memory, time_limit

HANGS = """
import ctypes, sys
from pathlib import Path
from landscape_ray.sweep.limits import time_limit
with time_limit(0.2, Path(sys.argv[1])):
    ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock
"""


def test_a_hanging_block_ends_its_process(tmp_path: Path) -> None:
    report = hang_path(tmp_path, "t0001")
    done = subprocess.run([sys.executable, "-c", HANGS, str(report)], timeout=50)
    assert done.returncode == 1
    assert "most recent call first" in report.read_text()
    assert "<string>" in report.read_text()


def test_a_block_in_time_leaves_nothing(tmp_path: Path) -> None:
    report = hang_path(tmp_path, "t0001")
    with time_limit(60, report):
        assert report.exists()
    assert not report.exists()
    with time_limit(None, tmp_path / "absent" / "x"):
        pass
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(("share", "limits"), [(0.0, []), (0.25, [0.25]), (1.0, []), (2.0, [])])
def test_a_share_of_a_gpu_is_a_share_of_its_memory(
    share: float, limits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_to.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    limit_gpu_memory(share)
    assert set_to == [], "there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    limit_gpu_memory(share)
    assert set_to == limits
