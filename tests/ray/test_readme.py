"""What README tells a reader to type, typed: in its order, on sweeps that are as small as the tests' own."""

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from landscape_ray.cli import main
from landscape_ray.config import parse
from landscape_ray.data import DATASETS
from landscape_ray.models import MODELS
from landscape_ray.populations import STRATEGIES
from landscape_ray.probes import PROBES
from landscape_ray.schedules import SCHEDULES
from landscape_ray.sweep.placement import request
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.training.optimizers import OPTIMIZERS
from landscape_ray.training.probe_tables import ProbesConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def run(lines: list[str], here: Path) -> str:
    """Type lines into one fresh interpreter, one after the other; return what they print."""
    calls = [shlex.split(line, comments=True) for line in lines]
    code = f"""
import sys
from landscape_ray.cli import main
for sys.argv in {calls!r}:
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"{{sys.argv}} ended with {{ended.code}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def sweep(lines: list[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Type lines into this interpreter, whose Ray they use."""
    with monkeypatch.context() as patch:
        patch.chdir(here)
        for line in lines:
            patch.setattr(sys, "argv", shlex.split(line))
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 0, line


def serve(line: str, here: Path, port: int) -> None:
    """Start the UI, see it answer on the loopback address, end it by Ctrl-C."""
    command = [sys.executable, "-m", "landscape_ray.cli", *shlex.split(line)[1:], "--port", str(port)]
    server = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        first = server.stdout.readline()  # printed when the server answers; the test's own limit bounds the wait
        assert f"http://127.0.0.1:{port}" in first
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            assert answer.read() == b"OK"
        server.send_signal(signal.SIGINT)
        out, _ = server.communicate(timeout=20)
        assert server.returncode == 0, out
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
    finally:
        server.kill()
        server.wait()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_grid(path: Path) -> None:
    """Write runs over learning rate and batch at six pairs of N and D, around a known optimum."""
    lines = ["N,D,lr,sequences,updates,loss"]
    for n, d in itertools.product((1e8, 3e8, 9e8), (5e9, 2e10)):
        for i, j in itertools.product(range(-2, 3), repeat=2):
            u, v = 0.4 * i + 0.03, 0.5 * j - 0.02
            batch = max(1, round(0.58 * d**0.571 * 2.71828**v / 2048))
            lr = 1.79 * n**-0.713 * d**0.307 * 2.71828**u
            loss = (1.7 + 400 * n**-0.34 + 400 * d**-0.28) * (1 + 0.006 * u * u + 0.004 * v * v - 0.002 * u * v)
            lines.append(
                f"{n!r},{d!r},{lr!r},{batch},{round(d / batch / 2048)},{loss + 1e-3 * ((7 * i + 3 * j) % 5 - 2)!r}"
            )
    path.write_text("\n".join(lines) + "\n")


def test_learning_rate_and_batch(tmp_path: Path) -> None:
    """The lines of README on the step law, without Ray."""
    write_grid(tmp_path / "grid.csv")
    (bash,) = [text for text in blocks("bash") if "step_law" in text]
    lines = [line for line in bash.splitlines() if "step_law" in line and "chinchilla" not in line]
    assert [line.split()[1] for line in lines] == ["fit", "predict", "recommend"]
    said = run([f"{line} --num-bootstrap 40" if " fit " in line else line for line in lines], tmp_path)
    assert "peak_lr = " in said
    assert "above the lowest loss" in said


@pytest.mark.acceptance
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session", "ready_store")
def test_the_three_jobs(
    sweep_text: Callable[..., str], tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sweeps run beside the tests' own Ray, where README starts one, and what follows them in one interpreter."""
    import ray

    spaces = tmp_path / "search_spaces"
    spaces.mkdir()
    train = {**tiny, "num_steps": 60}
    population = {"num_members": 4, "interval_steps": 20}
    # one trial at a time, with one thread: each more would start an interpreter of its own, and says nothing here
    alone = {"cpus_per_trial": 1.5}
    (spaces / "quickstart.toml").write_text(
        sweep_text(name="quickstart", train=train, commit_steps=20, resources=alone)
    )
    (spaces / "quickstart_population.toml").write_text(
        sweep_text(
            "population",
            name="quickstart_population",
            train=train,
            population=population,
            commit_steps=20,
            resources=alone,
        )
    )
    digits = {"num_steps": 20, "data": {"name": "images"}, "model": {"name": "mlp", "width": 8}}
    digits |= {"eval": {"every_steps": 20, "num_batches": 2}, "batch_size": 8}
    digits |= {"probes": {"sharpness": {"every_steps": 5, "batch_size": 8}}, "optimizer": {"name": "sgd"}}
    (spaces / "digits_cohort.toml").write_text(
        sweep_text("search", name="d", train=digits, cohort={"num_members": 3}, resources=alone)
    )
    (spaces / "width_transfer.toml").write_text(sweep_text("search", name="w", train=digits))
    full = digits | {"data": {"name": "images", "train_size": 8}}
    (spaces / "edge_gradient_descent.toml").write_text(sweep_text("search", name="edge", train=full))
    sizes, tokens = [1e6 * 3**k for k in range(6)], [1e8 * 3**k for k in range(6)]
    runs = [
        (n / 1e6, d, 1.7 + 400 * n**-0.34 + 400 * d**-0.28 + 1e-3 * ((7 * i) % 5 - 2))
        for i, (n, d) in enumerate((n, d) for n in sizes for d in tokens)
    ]
    (tmp_path / "runs.csv").write_text("params_m,tokens,loss\n" + "".join(f"{n!r},{d!r},{y!r}\n" for n, d, y in runs))
    write_grid(tmp_path / "grid.csv")
    address = ray.get_runtime_context().gcs_address
    setup, *jobs = blocks("bash")
    assert [line.split()[0] for line in setup.splitlines()] == ["scripts/quickstart", "scripts/test"]
    typed = [line for job in jobs for line in job.splitlines()]
    assert all(line.startswith("landscape-ray ") for line in typed)
    where = {"sweep": "here", "resume": "here", "ui": "served"}
    for place, lines in itertools.groupby(typed, key=lambda line: where.get(line.split()[1], "fresh")):
        if place == "here":
            sweep([line.replace("ray-head:6379", address) for line in lines], tmp_path, monkeypatch)
        elif place == "served":
            for line in lines:
                serve(line, tmp_path, free_port())
        else:
            run(list(lines), tmp_path)
    assert {line.split()[1] for line in typed} == {
        *("sweep", "resume", "check", "probe", "rank", "fit", "predict", "recommend", "list", "report"),
        *("ui", "status", "export"),
    }
    assert {path.stem for path in (tmp_path / "checks").glob("*.png")} == {
        "coordinate-check-standard",
        "coordinate-check-mup",
        "lr-transfer",
        "lr-range-test",
        "edge-edge",
    }
    assert list((tmp_path / "runs" / "first" / "tensorboard").glob("*/events.*"))
    fits = tmp_path / "runs" / "first" / "fits"
    assert list(fits.glob("probes-*.json"))
    assert list(fits.glob("spectrum-*.png"))
    assert (tmp_path / "runs" / "third" / "fits" / "rank.png").exists()
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 1e5
    assert (tmp_path / "fits" / "runs" / "chinchilla" / "page.html").stat().st_size > 1e5

    for code in blocks("python"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_the_sweep_file_in_the_text_is_valid() -> None:
    text, population, probes, resources = blocks("toml")
    spec = parse(SweepSpec, tomllib.loads(text), "README")
    assert spec.search is not None
    other = {"name": "p", "train": spec.train, "space": {"schedule.peak_lr": spec.space["schedule.peak_lr"]}}
    found = parse(SweepSpec, other | tomllib.loads(population), "README").population
    assert found is not None
    assert found.explorer is not None
    (line,) = re.findall(r"^strategy = (.*), or", population, flags=re.MULTILINE)
    assert set(STRATEGIES) == set(re.findall(r"\w+", line))
    asked = tomllib.loads(probes)["train"]["probes"]
    assert set(parse(ProbesConfig, asked, "README").tables) == set(asked) - {"budget"}
    wanted = parse(SweepSpec, tomllib.loads(text) | tomllib.loads(resources), "README").resources
    assert request(wanted).bundles == [{"CPU": 2, "GPU": 1, "fast_disk": 0.25, "accelerator_type:H200": 0.001}] * 4
    assert set(tomllib.loads(resources)["resources"]) >= {"workers", "placement", "accelerator", "custom", "labels"}


def test_all_probes_are_named_in_the_text() -> None:
    chapter = README.split("## Measure the landscape")[1].split("```bash")[0]
    assert set(PROBES) <= set(re.findall(r"\w+", chapter))


@pytest.mark.parametrize(
    ("field", "registry"),
    [("model", MODELS), ("data", DATASETS), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)],
    ids=["models", "data", "optimizers", "schedules"],
)
def test_the_names_in_the_text_are_the_registered_ones(field: str, registry: dict[str, Any]) -> None:
    (row,) = re.findall(rf"^\| `{field}.name` \| (.*) \|$", README, flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == set(registry)


def test_the_tree_in_the_text_is_the_tree() -> None:
    (tree,) = blocks("text")
    named = set(re.findall(r"^  (\w+(?:\.py|/))", tree, flags=re.MULTILINE))
    package = ROOT / "landscape_ray"
    assert all((package / name).exists() for name in named)
    folders = {f"{p.name}/" for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= named
    assert all((ROOT / name).is_dir() for name in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE))


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
    assert os.access(ROOT / "scripts/quickstart", os.X_OK)
    assert os.access(ROOT / "scripts/test", os.X_OK)
