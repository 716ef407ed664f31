"""The layers of the house, read from the source: who may import whom, and what a fresh interpreter loads."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import landscape_ray

PACKAGE = Path(landscape_ray.__file__).parent

BASE = {"errors", "registry", "config", "files", "records", "domains", "signals", "signature", "tables", "text"}
INTERNAL = {
    **dict.fromkeys(BASE, BASE),
    "__init__": set(),
    "schedules": BASE,
    "laws": BASE,
    "populations": BASE | {"laws", "schedules"},
    "search": BASE | {"laws"},
    "models": BASE,
    "data": BASE,
    "probes": BASE,
    "training": BASE | {"schedules", "models", "data", "probes", "populations"},
    "tracking": BASE,
    "sweep": BASE | {"schedules", "populations", "search", "models", "data", "probes", "training", "tracking"},
    "analysis": BASE | {"schedules", "laws", "tracking"},
    "reports": BASE | {"schedules", "laws", "tracking", "analysis"},
    "cli": BASE | {"sweep", "tracking", "laws", "analysis", "reports", "training", "schedules"},
}
EXTERNAL = {
    "torch": {"models", "data", "probes", "training", "sweep"},
    "ray": {"sweep"},
    "optuna": {"sweep"},
    "mlflow": {"tracking"},
    "pyarrow": {"tracking", "data"},
    "plotly": {"reports"},
    "matplotlib": {"reports"},
    "typer": {"cli"},
    "pandas": set(),
    "sklearn": set(),
}


def room(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


@functools.cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Return the imported module names, and whether each is imported when the module is (not in a function)."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_import
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", at_import
        elif isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        elif isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case | ast.Module):  # no import hides in a value
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_import and not inside)

    return list(visit(ast.parse(path.read_text()), True))


FILES = sorted(PACKAGE.rglob("*.py"))


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 40
    assert {room(path) for path in FILES} == set(INTERNAL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_stay_inside_the_layers(path: Path) -> None:
    here = room(path)
    for name, _ in imports(path):
        top, *rest = name.split(".")
        if top == "landscape_ray" and rest:
            assert rest[0] == here or rest[0] in INTERNAL[here], f"{here} must not import {name}"
        elif top in EXTERNAL:
            assert here in EXTERNAL[top], f"{here} must not import {name}"


def test_layers_are_acyclic() -> None:
    done: set[str] = set()
    pending = {
        name: {other for other in uses if other not in BASE} for name, uses in INTERNAL.items() if name not in BASE
    }
    while pending:
        ready = {name for name, uses in pending.items() if uses <= done}
        assert ready, f"a circle among {sorted(pending)}"
        done |= ready
        pending = {name: uses for name, uses in pending.items() if name not in ready}


def test_modules_are_acyclic() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {
            target for target, at_import in imports(path) if at_import and target.startswith("landscape_ray.")
        }
    for name in graph:
        graph[name] = {t for t in graph[name] if t in graph and not name.startswith(f"{t}.")} - {name}
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"circle: {' -> '.join((*trail, name))}"
        if name not in state:
            state[name] = 1
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            state[name] = 2

    for name in graph:
        visit(name, ())


CHAINS = [
    [
        ("landscape_ray", ("torch", "ray", "mlflow", "optuna", "pyarrow", "pandas", "numpy")),
        ("landscape_ray.cli", ("torch", "ray", "mlflow", "numpy", "scipy", "plotly")),
        ("landscape_ray.schedules", ("torch", "ray", "mlflow", "scipy")),
        ("landscape_ray.laws", ("torch", "ray", "mlflow", "optuna", "pyarrow", "pandas", "matplotlib")),
        ("landscape_ray.search", ("torch", "ray", "mlflow", "optuna", "pyarrow", "pandas")),
        ("landscape_ray.populations", ("torch", "ray", "mlflow", "optuna")),
        ("landscape_ray.analysis.annealing", ("torch", "ray", "mlflow", "plotly", "matplotlib")),
    ],
    [
        ("landscape_ray.probes", ("ray", "mlflow", "optuna", "pyarrow", "pandas")),
        ("landscape_ray.training", ("ray", "mlflow", "optuna", "pandas", "matplotlib", "torch._dynamo", "sympy")),
        ("landscape_ray.sweep.session", ("ray", "optuna", "torch._dynamo", "sympy")),
    ],
]
"""Layers in an order in which each must do without what the ones before it do without: one interpreter for a chain."""


@pytest.mark.acceptance
@pytest.mark.parametrize("chain", CHAINS, ids=["laws", "training"])
def test_a_fresh_interpreter_loads_only_what_the_layers_need(chain: list[tuple[str, tuple[str, ...]]]) -> None:
    code = f"""
import importlib, sys
for module, absent in {chain!r}:
    importlib.import_module(module)
    for name in absent:
        if name in sys.modules:
            print(module, "loads", name)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == ""
