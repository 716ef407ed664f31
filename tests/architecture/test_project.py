"""The project's own files agree with each other."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "scripts/constraints.txt").read_text().splitlines() if "==" in line
)


def bare(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def test_every_dependency_is_pinned() -> None:
    pinned = {name.lower().replace("_", "-") for name in CONSTRAINTS}
    wanted = {bare(r) for r in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]}
    assert wanted <= pinned


def test_the_constraints_name_no_host_and_no_local_build() -> None:
    text = (ROOT / "scripts/constraints.txt").read_text()
    assert "://" not in text
    assert "+cpu" not in text
    assert "file:" not in text


@pytest.mark.parametrize("requirement", PROJECT["dependencies"], ids=bare)
def test_installed_versions_are_the_pinned_ones(requirement: str) -> None:
    name = bare(requirement)
    pinned = {key.lower().replace("_", "-"): value for key, value in CONSTRAINTS.items()}[name]
    assert importlib.metadata.version(name).split("+")[0] == pinned


def test_every_dependency_has_its_reason_beside_it() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        assert re.search(rf'"{re.escape(requirement)}",\s+# \S', text), requirement


@pytest.mark.parametrize("script", ["scripts/quickstart", "scripts/test", "scripts/environment.sh", ".ci/run"])
def test_scripts_are_valid_shell(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_top_level_holds_what_belongs_there() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "landscape_ray", "search_spaces", "tests"}
    assert {name for name in top if not name.startswith(".")} <= allowed | {"cluster", "scripts"}


def test_help_lists_every_verb() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "landscape_ray.cli", "--help"], capture_output=True, text=True, check=True
    )
    for verb in (
        "sweep",
        "resume",
        "train",
        "doctor",
        "fit",
        "predict",
        "report",
        "sync",
        "ui",
        "list",
        "check",
        "refine",
    ):
        assert re.search(rf"\b{verb}\b", out.stdout), verb
