"""Training speed of a GPT: tokens per second, utilisation and memory, with and without the sharpness probe; and a peer.

    python scripts/bench_training.py [--preset 124M|small] [--device cuda] [--precision bfloat16] [--compile]
                                     [--peer FOLDER] [--num-steps 20] [--rounds 7]

Ours is the loop that users run, `train` on a `TrainState`: batches of real text (the standard library's source code, or
--source), fused AdamW, clipping by norm, a schedule, a record of every update, checked to be finite. The peer is
nanoGPT (github.com/karpathy/nanoGPT; MIT licence, Copyright (c) 2022 Andrej Karpathy), from a checkout that you give as
a folder. Nothing of it comes with this package or is installed by it: its `model.py` is loaded from there, and its
model trained by an update like that of its `train.py`: autocast, the next batch copied ahead from pinned memory,
clipping, its own choice of AdamW (fused on CUDA), gradients set to None, the loss read once an update. Both get the
same tokens, sizes, batch, precision and compile setting, start at random, and have learned positions, a tied head and
no biases in their matrices; ours has shifts in its norms. float32 is plain float32: no TF32, unless the environment
or, for the probe, --tf32 says otherwise.

The rows take turns, in one process: a round is --num-steps updates of each. The first round of each warms up and is not
counted, figures are medians of the others, and `vs peer` is the median of the rounds' ratios of tokens per second,
above 1 where we are faster. In every round of the probed run one probe is made, from a random start; later in a run
most start from the last eigenvector and cost somewhat less. Its cost is spread over as many updates as the row says.
On the CPU with one thread, seconds are those of the CPU, so that other programs do not count.

    MFU     FLOPs of the model over what the device could do in that time (--peak-tflops, or the vendor's figure for
            dense bfloat16 where it is known), causal attention counted by half; those of the probe are not the model's
    MFU 6N  the same by 6 FLOPs a parameter and token, all parameters, no attention
    memory  the most that making and warming up held beyond what was held before: allocated on CUDA, resident on CPU
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from landscape_ray.config import parse
from landscape_ray.data import TextConfig, TextData, open_text
from landscape_ray.data.dataset import Batch
from landscape_ray.errors import UserError
from landscape_ray.models import GPTConfig
from landscape_ray.probes import SharpnessProbe
from landscape_ray.records import ProbeRecord, StepRecord
from landscape_ray.training import TrainConfig, TrainState, train
from landscape_ray.training.optimizers import AdamWConfig
from landscape_ray.training.precision import autocast
from landscape_ray.training.state import select_device

PRESETS: dict[str, dict[str, Any]] = {
    "124M": {
        "batch_size": 12,
        "data": {"context_length": 1024, "vocab_size": 50304},
        "model": {"depth": 12, "width": 768, "num_heads": 12},
    },
    "small": {
        "batch_size": 8,
        "data": {"context_length": 256, "vocab_size": 256},
        "model": {"depth": 4, "width": 256, "num_heads": 4},
    },
}

PEAK_TFLOPS: dict[tuple[str, ...], float] = {
    ("B200",): 2250,
    ("H200",): 989,
    ("GH200",): 989,
    ("H100", "PCIe"): 756,
    ("H100", "NVL"): 835,
    ("H100",): 989,
    ("A100",): 312,
    ("L40S",): 362,
    ("L4",): 121,
}
"""Dense bfloat16 by the vendor's data sheets, for devices whose name has all of these words; the first match counts."""

CADENCES = (200, 100)
LAST_STEP = 10**6
"""Far away: evaluations at the end are no part of this."""


class Timing(NamedTuple):
    """One round."""

    update: float
    """Seconds of an update."""
    probe: float = 0.0
    """Seconds of the round's probe."""
    num_products: int = 0
    sharpness: float = math.nan
    """What it found."""


class Ours:
    """The project's loop."""

    def __init__(self, config: TrainConfig, data: TextData) -> None:
        self.state = TrainState(config, data)
        self.model = self.state.module
        probe = self.state.monitor.probes.get("sharpness")
        if isinstance(probe, SharpnessProbe):
            # Probes of a round are closer than those of a run, where a warm start saves less.
            probe.cold_every = 1

    def __call__(self, num_steps: int) -> Timing:
        """Do updates, and the probe where the configuration has one due."""
        clock, device, probe, products, done = clock_for(self.state.device), self.state.device, 0.0, 0, 0
        value = math.nan
        wait(device)
        start = last = clock()
        for record in train(self.state, self.state.step + num_steps):
            now = clock()
            done += isinstance(record, StepRecord)
            if isinstance(record, ProbeRecord):
                probe, products, value = probe + now - last, products + record.num_matvecs, record.value
            last = now
        wait(device)
        if done < num_steps:
            raise UserError(
                f"a run must train to be timed, got '{self.state.diverged}'; use another preset or --source"
            )
        return Timing((clock() - start - probe) / num_steps, probe, products, value)


class Peer:
    """A model of nanoGPT, trained as its own script trains one on a single device."""

    def __init__(self, module: ModuleType, config: TrainConfig, data: TextData, device: torch.device) -> None:
        self._config, self._tokens, self._device = config, data.train_tokens, device
        sizes, optimizer = config.model, config.optimizer
        assert isinstance(sizes, GPTConfig)
        assert isinstance(optimizer, AdamWConfig)
        self._context = data.context_length
        self._generator = torch.Generator().manual_seed(config.seed)
        # it draws from the global generator, and reports on standard output
        with torch.random.fork_rng(), contextlib.redirect_stdout(sys.stderr):
            torch.manual_seed(config.seed)
            model = module.GPT(
                module.GPTConfig(
                    block_size=self._context,
                    vocab_size=data.vocab_size,
                    n_layer=sizes.depth,
                    n_head=sizes.heads,
                    n_embd=sizes.width,
                    dropout=0.0,
                    bias=False,
                )
            ).to(device)
            self._optimizer = model.configure_optimizers(
                optimizer.weight_decay, config.schedule.peak_lr, (optimizer.beta1, optimizer.beta2), device.type
            )
        self.model = model.train()
        self._forward = torch.compile(model) if config.compile else model
        self._step = 0
        self._batch = self._draw()
        self.loss = math.nan

    def _draw(self) -> Batch:
        """Return windows at random offsets; on CUDA their copies are on the way."""
        starts = torch.randint(
            len(self._tokens) - self._context, (self._config.batch_size,), generator=self._generator
        ).tolist()
        windows = [self._tokens[start : start + self._context + 1].astype(np.int64) for start in starts]
        inputs = torch.stack([torch.from_numpy(window[:-1]) for window in windows])
        targets = torch.stack([torch.from_numpy(window[1:]) for window in windows])
        if self._device.type != "cuda":
            return inputs, targets
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)

    def _lr(self) -> float:
        schedule = self._config.schedule
        if self._step < schedule.warmup_steps:
            return schedule.peak_lr * (self._step + 1) / (schedule.warmup_steps + 1)
        return schedule.peak_lr * 0.5 * (1.0 + math.cos(math.pi * self._step / LAST_STEP))

    def __call__(self, num_steps: int) -> Timing:
        """Do updates."""
        clock = clock_for(self._device)
        wait(self._device)
        start = clock()
        for _ in range(num_steps):
            lr = self._lr()
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            with autocast(self._device, self._config.precision):
                _, loss = self._forward(*self._batch)
            self._batch = self._draw()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.clipping.threshold)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self.loss = loss.item()
            self._step += 1
        wait(self._device)
        return Timing((clock() - start) / num_steps)


def load_peer(folder: Path) -> ModuleType:
    """Return the module `model.py` of a checkout of nanoGPT.

    Raises:
        UserError: the folder has none, or one without what is needed.
    """
    path = folder / "model.py"
    spec = importlib.util.spec_from_file_location("bench_training_peer", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--peer must be a checkout of nanoGPT, got {folder} without model.py; clone karpathy/nanoGPT")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if not all(hasattr(module, name) for name in ("GPT", "GPTConfig")):
        raise UserError(f"--peer must be a checkout of nanoGPT, got {path} without GPT and GPTConfig; clone it anew")
    return module


def clock_for(device: torch.device) -> Callable[[], float]:
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """Return the most memory held since the last `reset_peak`, in MB; nan where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3


def reset_peak(device: torch.device) -> float:
    """Forget the peak so far; return what is held now, in MB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        # what the C library keeps of freed memory would be used again, and the next contender look small
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def peak_flops(device: torch.device, precision: str, tflops: float | None) -> float:
    """Return the FLOP/s that the device can do; nan where nobody knows."""
    if tflops is not None:
        return tflops * 1e12
    if device.type == "cuda" and precision == "bfloat16":
        words = set(re.split(r"[^0-9A-Za-z]+", torch.cuda.get_device_name(device)))
        for name, known in PEAK_TFLOPS.items():
            if words >= set(name):
                return known * 1e12
    return math.nan


class Row(NamedTuple):
    """One row of the table."""

    label: str
    seconds: list[float]
    """Of an update in each round, its share of the probe included."""
    memory: float


class Result(NamedTuple):
    """What was measured."""

    rows: list[Row]
    """Ours, ours with the probe at each of CADENCES, and the peer where there is one."""
    probe: Timing
    """Medians of the rounds with a probe."""
    num_params: list[int]
    """Ours, and the peer's."""
    flops: float
    """Of the training on a token; `flops_6n` by 6 N. The peer's model is taken for the same."""
    flops_6n: float


def measure(
    config: TrainConfig,
    data: TextData,
    peer: ModuleType | None,
    num_steps: int,
    rounds: int,
    probe: dict[str, Any] | None = None,
) -> Result:
    """Let ours, ours with the probe, and the peer take turns: `rounds` rounds of `num_steps` updates each.

    `probe` is the table of the sharpness probe.
    """
    table = (probe or {}) | {"every_steps": num_steps}
    probed = parse(TrainConfig, config.model_dump() | {"probes": {"sharpness": table}}, "probed")
    device = select_device(config.device)
    runs: dict[str, Ours | Peer] = {}
    memory: dict[str, float] = {}

    makers: dict[str, Callable[[], Ours | Peer]] = {
        "ours": lambda: Ours(config, data),
        "probed": lambda: Ours(probed, data),
    }
    if peer is not None:
        makers["peer"] = lambda: Peer(peer, config, data, device)
    for label, make in makers.items():
        before = reset_peak(device)
        runs[label] = make()
        runs[label](num_steps)
        memory[label] = peak_memory(device) - before
    turns = [{label: run(num_steps) for label, run in runs.items()} for _ in range(rounds)]

    rows = [Row("ours", [turn["ours"].update for turn in turns], memory["ours"])]
    for cadence in CADENCES:
        seconds = [turn["probed"].update + turn["probed"].probe / cadence for turn in turns]
        rows.append(Row(f"ours, a probe every {cadence}", seconds, memory["probed"]))
    if peer is not None:
        rows.append(Row("peer (nanoGPT)", [turn["peer"].update for turn in turns], memory["peer"]))
    middle = (statistics.median(values) for values in zip(*(turn["probed"] for turn in turns), strict=True))
    network = runs["ours"].model
    return Result(
        rows,
        Timing(*middle),
        [sum(p.numel() for p in run.model.parameters()) for label, run in runs.items() if label != "probed"],
        network.flops_per_unit(),
        network.approximate_flops_per_unit(embedding=True),
    )


def table(result: Result, tokens: int, peak: float) -> Iterator[str]:
    """Yield the lines of the table, for so many tokens an update and the FLOP/s of the device, nan where unknown."""
    peer = result.rows[-1] if len(result.num_params) > 1 else None
    heads = ("tokens/s", "ms/update", "MFU %", "MFU 6N %", "memory MB", "vs peer")
    yield f"{'':<24}" + "".join(f"{head:>11}" for head in heads)
    for row in result.rows:
        seconds = statistics.median(row.seconds)
        ratio = statistics.median(b / a for a, b in zip(row.seconds, peer.seconds, strict=True)) if peer else math.nan
        rate = tokens / seconds
        mfu, mfu_6n = (100 * rate * each / peak for each in (result.flops, result.flops_6n))
        values = ((rate, 0), (1e3 * seconds, 2), (mfu, 1), (mfu_6n, 1), (row.memory, 0), (ratio, 3))
        cells = (f"{value:11.{digits}f}" if math.isfinite(value) else f"{'-':>11}" for value, digits in values)
        yield f"{row.label:<24}" + "".join(cells)
    update, probe, num_products, sharpness = result.probe
    shares = " and ".join(f"{100 * probe / (probe + n * update):.1f} % of the time at one every {n}" for n in CADENCES)
    yield (
        f"one probe: {1e3 * probe:.0f} ms, {probe / update:.1f} updates, {num_products:.0f} Hessian-vector products; "
        f"{shares}; sharpness {sharpness:.4g}"
    )


def config_for(arguments: argparse.Namespace) -> TrainConfig:
    """Return our run."""
    preset = PRESETS[arguments.preset]
    settings = {
        "num_steps": LAST_STEP,
        "batch_size": arguments.batch_size or preset["batch_size"],
        "data": preset["data"] | {"source": arguments.source},
        "model": preset["model"] | {"name": "gpt", "positions": "learned"},
        "optimizer": {"name": "adamw", "weight_decay": 0.1},
        "schedule": {"name": "cosine", "peak_lr": 6e-4, "warmup_steps": 2000},
        "clipping": {"name": "norm", "threshold": 1.0},
        "eval": {"every_steps": LAST_STEP, "num_batches": 1, "batch_size": 1},
        "device": arguments.device,
        "precision": arguments.precision,
        "compile": arguments.compile,
    }
    return parse(TrainConfig, settings, "bench_training")


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="124M")
    parser.add_argument("--batch-size", type=positive, help="sequences in an update, instead of the preset's")
    parser.add_argument("--source", default="stdlib", help="text to train on, as data.source of a sweep file")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="ours and the peer through torch.compile")
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="a checkout of nanoGPT")
    parser.add_argument("--tf32", action="store_true", help="let the probe round factors of products to TF32")
    parser.add_argument("--probe-batch", type=positive, default=4, help="sequences that the probe looks at")
    parser.add_argument("--peak-tflops", type=float, help="what the device can do, in 10^12 FLOP/s")
    parser.add_argument("--num-steps", type=positive, default=20, help="updates in a round")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, help="threads of the CPU, instead of torch's default")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        config = config_for(given)
        device = select_device(config.device)
        peer = load_peer(given.peer) if given.peer else None
        assert isinstance(config.data, TextConfig)
        data = open_text(config.data, progress=True)
        result = measure(
            config, data, peer, given.num_steps, given.rounds, {"tf32": given.tf32, "batch_size": given.probe_batch}
        )
    except UserError as error:
        parser().error(str(error))
    peak = peak_flops(device, config.precision, given.peak_tflops)
    tokens = config.batch_size * data.context_length
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    counts = " and ".join(f"{count / 1e6:.2f}M" for count in result.num_params)
    print(
        f"{counts} parameters, {config.batch_size} x {data.context_length} tokens an update, {config.precision}, "
        f"{'compiled' if config.compile else 'eager'}; {name}, torch {torch.__version__}"
        + (f", {peak / 1e12:g} TFLOP/s" if math.isfinite(peak) else "")
    )
    print(f"{given.rounds} rounds of {given.num_steps} updates each in turn, medians")
    for line in table(result, tokens, peak):
        print(line)


if __name__ == "__main__":
    main()
