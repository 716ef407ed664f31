from __future__ import annotations

import pytest

from landscape_ray.analysis.annealing import SweepFit
from landscape_ray.reports.views import Sweep, open_sweep
from landscape_ray.tracking.folder import SweepFolder


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
