"""Shared by all tests: a small real corpus, tiny configurations, an MLflow store; how the tests are shared out.

What authors of tests need to know:

- A run of many files is shared out to one worker process a core (pytest-xdist); a single file, `-k`, `-s`, `--pdb` and
  `-n 0` run in this process. A file stays in one worker, in its order: what is dear is made once, by a fixture of its
  module. A fixture of the session is made once a worker. The files in SHARED stay together: they share
  one Ray, or two processes.
- A worker has neighbours: no fixed port (bind to 0), no file outside `tmp_path`, and no limit on seconds that a machine
  three times as slow would break; wait for a condition, with a generous bound. Seconds that are measured and asserted
  belong behind the mark `slow`.
- Parameters and their ids must be equal in every worker: no order of a set, no address, no time.
- Whoever starts a process ends it on every way out, Ctrl-C included: a `with` or a fixture that yields.
- Dear are: an interpreter with PyTorch (2 s), the command line with Ray (10 s), each trial that Ray runs at the same
  time (4 s, its interpreter), an exploit on Ray (1 s), a new MLflow store (2 s; copy `store_template`).
"""

import contextlib
import json
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

# Before NumPy and PyTorch are loaded, and for the processes that tests start: OpenBLAS reads it once, as it is loaded.
# On small matrices its threads wait for each other in a busy loop: beside a busy neighbour a fit takes twice as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from landscape_ray.config import parse
from tests.pair import Pair

if TYPE_CHECKING:
    from landscape_ray.tracking.folder import SweepFolder
    from landscape_ray.training import TrainConfig

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets its workers hardly run beside a busy neighbour
os.environ.pop("RAY_ADDRESS", None)  # tests never join a cluster that happens to run here
os.environ.pop("MLFLOW_TRACKING_URI", None)
# Dozens of interpreters are started here, and they and the workers read the same files: compile each once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
torch.set_num_threads(1)  # tiny models: more threads only wait for each other

MANY_FILES = 25
"""From so many Python files on, workers gain more than their own start, an import of PyTorch, takes."""
MOST_WORKERS = 8
"""Each takes about a gigabyte, and with that many the longest file decides."""
SHARED = {
    f"tests/{file}.py": shared
    for shared, files in {
        "one Ray session": [f"ray/test_{name}" for name in ("exchange", "faults", "readme", "sweep", "workers")],
        "two processes": [
            "probes/gradients/test_gradients_distributed",
            "probes/operators/test_distributed",
            "probes/test_monitor_distributed",
            "training/test_parallel",
            "training/test_parallel_probes",
        ],
    }.items()
    for file in files
}
"""Files that stay in one worker, under the name of what they share."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Choose the number of workers where the command line does not."""
    option = config.option
    if not hasattr(option, "numprocesses") or option.numprocesses is not None or hasattr(config, "workerinput"):
        return  # no pytest-xdist, or -n is given, or this is a worker
    here = option.usepdb or option.trace or option.collectonly or option.capture == "no"
    if here or option.keyword or option.lf or getattr(option, "stepwise", False):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    many = sum(len(list(Path(argument).rglob("*.py"))) for argument in config.args) >= MANY_FILES
    # not more: Ray's workers take a core beside the worker that waits for them
    option.numprocesses = min(cores, MOST_WORKERS) if cores > 1 and many else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share out whole files, in their order, which begins with the longest."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return SHARED.get(file, file)

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker, begin with Ray: the longest piece, during which the other workers do the rest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith("tests/ray/"))


DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def published_data() -> Path:
    """Folder with published curves; users don't have it."""
    if not DATA.is_dir():
        pytest.skip("published data is not here")
    return DATA


@pytest.fixture(scope="session")
def store_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with its tables: making one takes two seconds, copying it none."""
    from landscape_ray.tracking.server import open_client

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    open_client(f"sqlite:///{path}").search_experiments(max_results=1)
    with contextlib.closing(sqlite3.connect(path)) as connection:  # everything into the one file that is copied
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


TINY: dict[str, Any] = {
    "num_steps": 10,
    "batch_size": 4,
    "data": {"context_length": 16},
    "model": {"depth": 1, "width": 16, "num_heads": 2},
    "schedule": {"name": "wsd", "peak_lr": 0.01, "warmup_steps": 2},
    "eval": {"every_steps": 5, "num_batches": 1, "batch_size": 4},
    "probes": {"sharpness": {"every_steps": 5, "batch_size": 2}},
}


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A training configuration that takes a tenth of a second."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}


@pytest.fixture
def tiny_config(tiny: dict[str, Any]) -> "TrainConfig":
    from landscape_ray.training import TrainConfig  # not for tests of rooms that need no training

    return parse(TrainConfig, tiny, "tiny")


SPACE: dict[str, Any] = {
    "schedule.name": {"choices": ["constant", "linear", "cosine", "wsd"]},
    "schedule.peak_lr": {"log_uniform": [1e-3, 1e-1]},
    "schedule.cooldown_fraction": {"uniform": [0.2, 0.8], "when": {"schedule.name": "wsd"}},
}


def to_toml(entry: Any) -> str:
    """Return a value as inline TOML. But for tables, JSON is TOML."""
    if isinstance(entry, dict):
        return "{ " + ", ".join(f'"{key}" = {to_toml(value)}' for key, value in entry.items()) + " }"
    return "[" + ", ".join(map(to_toml, entry)) + "]" if isinstance(entry, list) else json.dumps(entry)


@pytest.fixture
def sweep_text(tiny: dict[str, Any]) -> Callable[..., str]:
    """Return a function that writes a sweep file: five trials, or a population of four, of the tiny model."""

    def write(kind: str = "search", **changes: Any) -> str:
        # no samples by the clock: rows are compared, and a busy machine may take long
        data: dict[str, Any] = {"name": "tiny", "seed": 1, "commit_steps": 5, "system_seconds": 0, "train": tiny}
        data["resources"] = {"cpus_per_trial": 0.5}
        if kind == "search":
            first = [{"schedule.name": name, "schedule.peak_lr": 0.02} for name in ("constant", "linear", "cosine")]
            data |= {"space": SPACE, "search": {"num_trials": 5, "initial": first}}
        else:
            data |= {"space": {"schedule.peak_lr": SPACE["schedule.peak_lr"]}}
            data |= {"population": {"num_members": 4, "interval_steps": 5}}
        return "".join(f"{key} = {to_toml(entry)}\n" for key, entry in (data | changes).items())

    return write


@pytest.fixture(scope="session")
def fabricate() -> ModuleType:
    """The module that makes sweeps of runs with a known law."""
    from tests import fabricate

    return fabricate


@pytest.fixture(scope="session")
def search_folder(fabricate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> "SweepFolder":
    """A search of twelve runs, fitted; nobody may change it."""
    from landscape_ray.analysis.annealing import fit_sweep

    folder: SweepFolder = fabricate.make_search(tmp_path_factory.mktemp("sweeps") / "search", steps=300)
    fit_sweep(folder, num_bootstrap=30)
    return folder


@pytest.fixture(scope="session")
def population_folder(fabricate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> "SweepFolder":
    folder: SweepFolder = fabricate.make_population(tmp_path_factory.mktemp("sweeps") / "members", steps=300)
    return folder


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes for all tests of a worker: to start and to meet takes them three times as long as a test."""
    processes = Pair(lambda: tmp_path_factory.mktemp("pair"))
    yield processes
    processes.end()


@pytest.fixture
def two_processes(pair: Pair, tmp_path: Path) -> Callable[[str], Path]:
    """Return the function that calls a test file's `in_process` in two processes, and gives the folder they share."""

    def run(file: str) -> Path:
        pair.call(file, tmp_path)
        return tmp_path

    return run
