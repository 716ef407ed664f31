"""The benchmark of training speed, on the CPU with a tiny preset and a peer of the same make."""

import importlib.util
import math
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from landscape_ray.data import TextData, open_text
from landscape_ray.errors import UserError
from landscape_ray.models import GPTConfig
from landscape_ray.training import TrainConfig

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests/golden/corpus"
CPU = torch.device("cpu")

PEER = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table, self.places = nn.Embedding(config.vocab_size, config.n_embd), nn.Embedding(config.block_size, 4)
        self.mix = nn.Linear(config.n_embd + 4, config.n_embd, bias=config.bias)
        print("number of parameters: so many")

    def forward(self, idx, targets=None):
        places = self.places.weight[: idx.shape[1]].expand(*idx.shape, 4)
        logits = self.mix(torch.cat((self.table(idx), places), dim=-1)) @ self.table.weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        self.asked = weight_decay, learning_rate, betas, device_type
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, its small preset made tiny, with a cache of its own."""
    spec = importlib.util.spec_from_file_location("bench_training", ROOT / "scripts/bench_training.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tiny = {
        "batch_size": 2,
        "data": {"context_length": 16, "vocab_size": 320},
        "model": {"depth": 1, "width": 16, "num_heads": 2},
    }
    monkeypatch.setitem(module.PRESETS, "small", tiny)
    monkeypatch.setenv("LANDSCAPE_RAY_CACHE", str(tmp_path / "cache"))
    return module


@pytest.fixture
def peer_folder(tmp_path: Path) -> Path:
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer/model.py").write_text(PEER)
    return tmp_path / "peer"


@pytest.fixture
def opened(bench: ModuleType) -> tuple[TrainConfig, TextData]:
    config = bench.config_for(arguments(bench, "--precision", "float32"))
    return config, open_text(config.data)


def arguments(bench: ModuleType, *more: str) -> object:
    return bench.parser().parse_args(["--preset", "small", "--device", "cpu", "--source", str(CORPUS), *more])


@pytest.mark.acceptance
def test_one_table_shows_speed_utilisation_and_memory_with_and_without_the_probe_and_beside_the_peer(
    bench: ModuleType, peer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--preset", "small", "--device", "cpu", "--precision", "float32", "--source", str(CORPUS)]
    rounds = ["--num-steps", "2", "--rounds", "3"]
    bench.main([*sizes, *rounds, "--peer", str(peer_folder), "--peak-tflops", "0.001"])
    out = capsys.readouterr().out.splitlines()
    assert "2 x 16 tokens an update, float32, eager; CPU" in out[0]
    assert " ".join(out[2].split()) == "tokens/s ms/update MFU % MFU 6N % memory MB vs peer"
    labels = ["ours", "ours, a probe every 200", "ours, a probe every 100", "peer (nanoGPT)"]
    rows = {line[:24].strip(): [float(cell) for cell in line[24:].split()] for line in out[3:-1]}
    assert list(rows) == labels
    for tokens_per_second, ms, mfu, mfu_6n, memory, ratio in rows.values():
        assert tokens_per_second * ms / 1e3 == pytest.approx(32, rel=0.02)
        assert 0 < mfu < mfu_6n * 2
        assert memory >= 0
        assert ratio > 0
    assert rows["peer (nanoGPT)"][-1] == 1.0
    # a probe every 100 costs one part in 200 of it more than a probe every 200, in every round
    extra = rows["ours, a probe every 100"][1] - rows["ours, a probe every 200"][1]
    probe_ms = float(out[-1].split()[2])
    assert extra == pytest.approx(probe_ms / 200, rel=0.5, abs=0.1)
    assert "Hessian-vector products" in out[-1]


def test_without_a_peer_and_a_known_device_there_are_dashes(
    bench: ModuleType, opened: tuple[TrainConfig, TextData]
) -> None:
    result = bench.measure(*opened, None, num_steps=1, rounds=1)
    lines = list(bench.table(result, 32, bench.peak_flops(CPU, "bfloat16", None)))
    assert [line[24:].split()[2:4] + line[24:].split()[5:] for line in lines[1:4]] == [["-", "-", "-"]] * 3
    assert len(lines) == 5


def test_the_table_is_arithmetic_on_what_was_measured(bench: ModuleType) -> None:
    rows = [bench.Row("ours", [0.5, 0.4, 0.8], 7.0), bench.Row("peer", [1.0, 0.4, 0.9], math.nan)]
    probe = bench.Timing(update=0.5, probe=5.0, num_products=9, sharpness=12.3456)
    result = bench.Result(rows, probe, num_params=[1, 1], flops=6e9, flops_6n=3e9)
    _, ours, peer, last = bench.table(result, tokens=100, peak=4e12)
    # medians 0.5 and 0.9 s; 100 tokens of 6 GFLOP in 0.5 s are 1.2 TFLOP/s of 4; ratios are 2, 1 and 1.125
    assert ours.split()[1:] == ["200", "500.00", "30.0", "15.0", "7", "1.125"]
    assert peer.split()[1:] == ["111", "900.00", "16.7", "8.3", "-", "1.000"]
    # 5 s of 5 + 200 * 0.5 s
    assert last == (
        "one probe: 5000 ms, 10.0 updates, 9 Hessian-vector products; "
        "4.8 % of the time at one every 200 and 9.1 % of the time at one every 100; sharpness 12.35"
    )


def test_rounds_are_updates_of_the_real_loop_with_one_probe_from_a_random_start(
    bench: ModuleType, opened: tuple[TrainConfig, TextData]
) -> None:
    config, data = opened
    probed = config.model_copy(
        update={"probes": config.probes.model_validate({"sharpness": {"every_steps": 3, "batch_size": 1}})}
    )
    run = bench.Ours(probed, data)
    run(3)
    assert run.state.step == 3
    starts = []
    measure = run.state.monitor.probes["sharpness"].measure
    run.state.monitor.probes["sharpness"].measure = lambda *given: (starts.append(run.state.step), measure(*given))[1]
    timing = run(3)
    assert run.state.step == 6
    assert starts == [6]
    assert run.state.monitor.probes["sharpness"].cold_every == 1
    assert timing.num_products > 0
    assert timing.probe > 0
    assert bench.Ours(config, data)(1).probe == 0


def test_the_peer_trains_on_our_text_in_our_sizes_by_its_own_optimizer(
    bench: ModuleType, peer_folder: Path, opened: tuple[TrainConfig, TextData], capsys: pytest.CaptureFixture[str]
) -> None:
    config, data = opened
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    peer = bench.Peer(bench.load_peer(peer_folder), config, data, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert capsys.readouterr().out == ""
    sizes = peer.model.config
    assert isinstance(config.model, GPTConfig)
    assert (sizes.block_size, sizes.vocab_size, sizes.n_layer, sizes.n_head, sizes.n_embd) == (16, 320, 1, 2, 16)
    assert (sizes.dropout, sizes.bias) == (0.0, False)
    assert peer.model.asked == (0.1, 6e-4, (0.9, 0.95), "cpu")
    inputs, targets = peer._batch
    assert inputs.shape == targets.shape == (2, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text = bytes(data.train_tokens.tolist())
    assert all(bytes(row.tolist()) in text for row in inputs)
    losses = [(peer(1), peer.loss)[1] for _ in range(600)]
    assert statistics.mean(losses[-20:]) < statistics.mean(losses[:20]) - 0.2


def test_the_learning_rate_of_the_peer_is_that_of_our_schedule(
    bench: ModuleType, peer_folder: Path, opened: tuple[TrainConfig, TextData]
) -> None:
    config, data = opened
    peer = bench.Peer(bench.load_peer(peer_folder), config, data, CPU)
    schedule = config.schedule.build(config.num_steps)
    for step in (0, 1, 1999, 2000, 500_000):
        peer._step = step
        assert peer._lr() == pytest.approx(float(schedule(step)), rel=0.01)


def test_a_run_that_stops_cannot_be_timed(bench: ModuleType, opened: tuple[TrainConfig, TextData]) -> None:
    run = bench.Ours(*opened)
    with torch.no_grad():
        run.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="a run must train to be timed, got 'diverged: held-out loss nan"):
        run(1)


def test_a_folder_that_is_no_checkout_is_told(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"--peer must be a checkout of nanoGPT, got .* without model.py; clone"):
        bench.load_peer(tmp_path)
    (tmp_path / "model.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="without GPT and GPTConfig; clone it anew"):
        bench.load_peer(tmp_path)
    with pytest.raises(SystemExit):
        bench.main(["--preset", "small", "--device", "cpu", "--peer", str(tmp_path)])
    assert "error: --peer must be" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--num-steps", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_peaks_are_of_the_device_by_its_name(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, names = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[-1])
    for name, tflops in (
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
    ):
        names.append(name)
        assert bench.peak_flops(cuda, "bfloat16", None) == tflops * 1e12
    assert math.isnan(bench.peak_flops(cuda, "float32", None))
    names.append("NVIDIA A10G")
    assert math.isnan(bench.peak_flops(cuda, "bfloat16", None))
    assert math.isnan(bench.peak_flops(CPU, "bfloat16", None))
    assert bench.peak_flops(cuda, "float32", 67.0) == 67e12


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_is_the_peak_since_the_last_reset(bench: ModuleType) -> None:
    before = bench.reset_peak(CPU)
    held = torch.ones(10_000_000)
    del held
    assert 30 < bench.peak_memory(CPU) - before < 60  # pages of before may be used again
    assert bench.reset_peak(CPU) < before + 10


def test_the_large_preset_is_of_124_million_parameters(bench: ModuleType) -> None:
    config = bench.config_for(bench.parser().parse_args([]))
    sizes = config.model
    assert isinstance(sizes, GPTConfig)
    assert (config.precision, config.compile, config.clipping.threshold) == ("bfloat16", False, 1.0)
    blocks = 12 * sizes.depth * sizes.width**2
    tables = (50304 + 1024) * sizes.width
    assert round((blocks + tables) / 1e6) == 124


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_memory_is_what_the_allocator_gave(
    bench: ModuleType, peer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = ["--num-steps", "2", "--rounds", "1", "--peer", str(peer_folder), "--peak-tflops", "1"]
    bench.main(["--preset", "small", "--device", "cuda", "--precision", "bfloat16", "--source", str(CORPUS), *rounds])
    out = capsys.readouterr().out.splitlines()
    assert torch.cuda.get_device_name() in out[0]
    assert "-" not in out[3][24:].split()
    before = bench.reset_peak(torch.device("cuda"))
    torch.ones(10_000_000, device="cuda")
    assert bench.peak_memory(torch.device("cuda")) - before == pytest.approx(40, abs=1)
