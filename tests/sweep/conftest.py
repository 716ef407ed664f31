"""Sweep files of the tiny model, parsed, and a sweep folder."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from landscape_ray.config import parse
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.folder import SweepFolder


@pytest.fixture
def search_spec(sweep_text: Callable[..., str]) -> SweepSpec:
    return parse(SweepSpec, tomllib.loads(sweep_text("search")), "search")


@pytest.fixture
def population_spec(sweep_text: Callable[..., str]) -> SweepSpec:
    return parse(SweepSpec, tomllib.loads(sweep_text("population")), "population")


@pytest.fixture
def folder(tmp_path: Path, sweep_text: Callable[..., str]) -> SweepFolder:
    return SweepFolder.create(tmp_path / "sweep", spec_text=sweep_text("search"), meta={"experiment": "e"})
