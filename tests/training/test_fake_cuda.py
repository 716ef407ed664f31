"""Updates for CUDA where there is none: nothing is on the wrong device, and the host waits once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,  # compiles and starts an interpreter of its own
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux" or torch.version.cuda is not None, reason="stands in for CUDA on Linux"),
]


@pytest.fixture(scope="module")
def updates(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The third update of a small GPT by optimizer, clipping and precision; see tests/fake_cuda."""
    folder = request.config.cache.mkdir(f"fake-cuda-{torch.__version__}")
    script = ROOT / "tests/fake_cuda/updates.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_optimizer_clipping_and_precision_updates_on_one_device(updates: dict[str, Any]) -> None:
    assert len(updates) == 9
    assert all(each["steps"] == 1 for each in updates.values())


def test_the_host_waits_once_in_an_update(updates: dict[str, Any]) -> None:
    for name, update in updates.items():
        waits = set(update["waits"])
        if name.endswith(" float16"):  # the scaler asks whether there was an overflow
            assert len(waits) == 3, name
        elif name.startswith("muon"):  # it cannot leave an update out by itself: nothing goes on meanwhile
            assert waits == {"loop.py: loss_nats, norm = seen.tolist()"}, name
        else:  # while the optimizer is at work, told of by an event before it
            assert update["waits"] == ["loop.py: arrived.synchronize()"], name


def test_gradients_of_queries_keys_and_values_meet_in_one_kernel(updates: dict[str, Any]) -> None:
    """CUDA's kernel for `cat` knows four axes; `stack` of five-dimensional ones would be three copies a layer."""
    ops = updates["adamw norm bfloat16"]["ops"]
    assert ops["cat"][0] == 2  # one a layer
    assert ops["stack"][0] <= 2  # of loss and norms
