"""Scaling laws that were fitted to a sweep are part of its report, with residuals, intervals and checklist."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from landscape_ray.analysis.scaling import fit_table, save
from landscape_ray.analysis.table import read_table
from landscape_ray.reports.page import figures, render_page
from landscape_ray.reports.views import open_sweep
from landscape_ray.tracking.folder import SweepFolder


@pytest.fixture(scope="module")
def sweep(search_folder, tmp_path_factory):
    """The search, with a law of N and D fitted beside it, and a fit that cannot be read."""
    place = tmp_path_factory.mktemp("laws")
    size, tokens = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
    loss = (1.7 + 400 * size**-0.34 + 400 * tokens**-0.28) * np.exp(2e-3 * np.random.default_rng(0).standard_normal(16))
    rows = zip(size.tolist(), tokens.tolist(), loss.tolist(), strict=True)
    lines = ["run,N,D,loss", *(f"r{i},{n!r},{d!r},{y!r}" for i, (n, d, y) in enumerate(rows))]
    (place / "runs.csv").write_text("\n".join(lines) + "\n")
    table = read_table(place / "runs.csv", {})
    folder = SweepFolder(shutil.copytree(search_folder.path, place / "search"))
    save(fit_table("chinchilla", table, num_bootstrap=20), table, folder.fits_path / "chinchilla")
    (folder.fits_path / "broken").mkdir()
    (folder.fits_path / "broken" / "fit.json").write_text("{")
    return open_sweep(folder)


def test_its_figures_have_keys_of_their_own(sweep):
    keys = [figure.key for figure in figures([sweep])]
    assert len(set(keys)) == len(keys)
    assert {"law-0-law", "law-0-agreement"} < set(keys)
    assert any(key.startswith("law-0-residual") for key in keys)


def test_the_page_has_parameters_intervals_forecasts_and_the_record(sweep):
    page = render_page([sweep])
    (found,) = sweep.scaling
    for name in found.fit.parameters:
        assert f">{name}<" in page
    assert "How it was made and checked" in page
    assert all(item.name in page for item in found.record[:5])


def test_a_fit_that_cannot_be_read_is_a_warning(sweep):
    assert any(warning.startswith("fits/broken: ") for warning in sweep.warnings)
