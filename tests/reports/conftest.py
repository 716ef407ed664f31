from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from landscape_ray.reports.analysis import SweepFit, fit_sweep
from landscape_ray.reports.views import Sweep, open_sweep
from landscape_ray.tracking.folder import SweepFolder


def load_fabricate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fabricate", Path(__file__).with_name("fabricate.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fabricate() -> ModuleType:
    return load_fabricate()


@pytest.fixture(scope="session")
def search_folder(fabricate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> SweepFolder:
    """A search of twelve runs, fitted; nobody may change it."""
    folder: SweepFolder = fabricate.make_search(tmp_path_factory.mktemp("sweeps") / "search", steps=300)
    fit_sweep(folder, num_bootstrap=30)
    return folder


@pytest.fixture(scope="session")
def population_folder(fabricate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> SweepFolder:
    folder: SweepFolder = fabricate.make_population(tmp_path_factory.mktemp("sweeps") / "members", steps=300)
    return folder


@pytest.fixture(scope="session")
def search(search_folder: SweepFolder) -> Sweep:
    return open_sweep(search_folder)


@pytest.fixture(scope="session")
def population(population_folder: SweepFolder) -> Sweep:
    return open_sweep(population_folder)


@pytest.fixture(scope="session")
def fit(search: Sweep) -> SweepFit:
    assert search.fit is not None
    return search.fit
