from __future__ import annotations

import pytest

from landscape_ray.analysis.annealing import SweepFit, load_fit
from landscape_ray.tracking.folder import SweepFolder


@pytest.fixture(scope="session")
def fit(search_folder: SweepFolder) -> SweepFit:
    """The law of the search of twelve runs."""
    found = load_fit(search_folder)
    assert found is not None
    return found
