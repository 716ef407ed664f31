"""One browser for all tests of a worker, and a place for what it saw."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import devtools


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium; see `devtools.Browser`. Tests are skipped where there is none."""
    if devtools.BROWSER is None:
        pytest.skip(devtools.MISSING)
    with devtools.Browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where to put a screenshot of this name: in $LANDSCAPE_RAY_SCREENSHOTS, to be looked at, or nowhere lasting."""
    place = os.environ.get("LANDSCAPE_RAY_SCREENSHOTS")
    folder = Path(place) if place else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name: folder / f"{name}.png"
