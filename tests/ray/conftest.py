"""One Ray session for all tests of this folder, on this machine only."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture
def ready_store(tmp_path: Path, store_template: Path) -> Path:
    """Put an MLflow store with its tables where the sweeps of a test, in its folder `runs`, look for theirs."""
    (tmp_path / "runs").mkdir()
    return Path(shutil.copy(store_template, tmp_path / "runs" / "mlflow.db"))
