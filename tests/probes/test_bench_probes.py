"""The benchmark of the probes: its parts run, count products and tell who meets the accuracy."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "bench_peers", raising=False)
    spec = importlib.util.spec_from_file_location("bench_probes", SCRIPTS / "bench_probes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_probes", module)
    spec.loader.exec_module(module)
    return module


class Small:
    """A run as the benchmark's own: a multilayer perceptron that is trained further."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kind, self.title = "cnn", "small"
        self.module = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))
        with torch.no_grad():
            for p in self.module.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
        inputs = torch.randn(64, 8, generator=generator)
        self.probe_batch = inputs, (inputs @ torch.randn(8, 4, generator=generator)).argmax(1)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.module(self.probe_batch[0]), self.probe_batch[1]).backward()
            self.optimizer.step()


def lines(text: str, begin: str) -> list[list[str]]:
    """Return the columns behind the name of every row that begins so."""
    return [line[48:].split() for line in text.splitlines() if line.strip().startswith(begin)]


@pytest.mark.parametrize("part", ["cold", "top10", "trace", "density", "tracking"])
def test_every_part_compares_ours_with_the_peers(bench: ModuleType, part: str, capsys: pytest.CaptureFixture) -> None:
    run = Small()
    run.train(20)
    bench.PARTS_OF_THE_BENCHMARK[part](run, True)
    out = capsys.readouterr().out
    assert part in out
    ours, peers = lines(out, "ours"), lines(out, "PyHessian")
    assert ours
    assert all(float(row[0]) >= 1 for row in ours)  # products
    assert any(row[4] == "yes" for row in ours) or part == "trace"
    if part == "trace":  # one repetition tells nothing of a standard error
        assert [row[4] for row in ours[:2]] == ["?", "?"] or "hutchinson" in out
        assert ("one repetition, not judged" in out) == any(row[4] == "?" for row in ours)
    assert bool(peers) == ("pyhessian" in bench.installed() and part != "top10")
    assert any(line.strip().startswith("->") for line in out.splitlines()) or not any(
        row[4:5] == ["yes"] for row in peers
    )


def test_the_share_of_tracking_is_printed_for_every_probe_batch(
    bench: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    bench.share(Small(), True)
    out = capsys.readouterr().out
    assert sum(line.strip().startswith("1/") for line in out.splitlines()) == 4


def test_a_median_does_not_hide_misses(bench: ModuleType, capsys: pytest.CaptureFixture) -> None:
    often = bench.Row(products=[5] * 10, seconds=[1.0] * 10, errors=[1e-3] * 8 + [0.1] * 2)
    seldom = bench.Row(products=[9] * 10, seconds=[2.0] * 10, errors=[1e-3] * 9 + [0.1])
    peer = bench.Row(products=[30] * 10, seconds=[6.0] * 10, errors=[1e-3] * 10)
    failed = bench.Row()
    failed.add(lambda: 1 / 0, [1.0])
    bench.report(
        "made up",
        {"ours, often": often, "ours, seldom": seldom, "PyHessian": peer, "curvlinops": failed},
        lambda name, row: row.meets(1e-2),
    )
    out = capsys.readouterr().out
    assert [row[4] for row in lines(out, "ours")] == ["no", "yes"]
    assert "-> 3.00 times faster than PyHessian" in out
    assert "cannot: division by zero" in out


def test_nobody_is_faster_by_a_single_repetition(bench: ModuleType, capsys: pytest.CaptureFixture) -> None:
    fast = bench.Row(products=[5], seconds=[1.0], errors=[0.08])
    slow = bench.Row(products=[30], seconds=[4.0], errors=[0.01])
    peer = bench.Row(products=[30], seconds=[3.0], errors=[0.01])
    rows = {"ours, fast": fast, "ours, slow": slow, "PyHessian": peer}
    bench.report("made up", rows, lambda name, row: None if name == "ours, fast" else True)
    out = capsys.readouterr().out
    assert [row[4:6] for row in lines(out, "ours")] == [["?", "1.00"], ["yes", "4.00"]]
    assert "one repetition, not judged" in out
    assert "times faster" not in out
    bench.report("made up", {"ours": bench.Row([5], [1.0], [0.5]), "PyHessian": peer}, lambda name, row: name != "ours")
    assert "times faster" not in capsys.readouterr().out  # there is nothing of ours to compare


def test_the_command_runs(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def run_of(kind: str) -> Small:
        run = Small()
        run.kind, run.title = kind, kind.upper()
        return run

    monkeypatch.setattr(bench, "Run", run_of)
    monkeypatch.setattr(bench, "installed", list)
    monkeypatch.setattr(sys, "argv", ["bench_probes.py", "--quick", "--only", "cold", "--models", "gpt"])
    threads = torch.get_num_threads()
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "not installed, left out: pyhessian, curvlinops" in out
    assert "GPT, after 200 updates" in out
    assert "s of CPU in all" in out
