"""What a driver costs for each trial and each result, beside Ray Tune itself in the same run.

usage: python scripts/bench_scale.py [--trials 1000] [--results 3] [--seconds 0] [--out FILE.json]

Trials do nothing but report; `--seconds` makes each sleep so long in all. Three drivers run the same number of trials
and results in one Ray session: Ray Tune with a function, Ray Tune with a class whose actors are reused, and ours, with
trial folders, Parquet, proposals, journal and MLflow switched on. Printed are wall-clock and CPU time of the driver
process for each trial and each result, over all and once a fifth of the trials is done (the rest is what is paid once:
imports, MLflow's tables, the first actors); what is left to do after the last trial; and the driver's memory.

Ray's release test runs 10,000 trials of 1 s on 16 CPUs in less than 800 s, of which 625 s are the trials: 28 %.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
warnings.filterwarnings("ignore")

import ray  # noqa: E402
from ray import tune  # noqa: E402

psutil: Any = importlib.import_module("psutil")  # comes with Ray, whose import puts it within reach

SPEC = """
name = "scale"
commit_steps = 1
resources = {{ cpus_per_trial = {cpus} }}
train = {{ num_steps = {results}, batch_size = 1, data = {{ name = "images" }}, model = {{ name = "mlp", width = 1 }}, \
eval = {{ every_steps = 1, num_batches = 1, batch_size = 1 }} }}
space = {{ "schedule.peak_lr" = {{ log_uniform = [1e-3, 1e-1] }} }}
search = {{ num_trials = {trials}, sampler = "random" }}
"""


class Marks(tune.Callback):
    """Notes time, CPU time and memory of this process whenever a trial ends."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, int]] = []
        self.workers: set[int] = set()
        self._process = psutil.Process()

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Ray pickles callbacks into its experiment state."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note."""
        cpu, memory = sum(self._process.cpu_times()[:2]), self._process.memory_info().rss
        self.rows.append((time.monotonic(), cpu, memory))
        self.workers.add(trial.last_result["pid"])


def measured(
    name: str, trials: int, results: int, ideal_seconds: float, run: Callable[[Marks], None]
) -> dict[str, Any]:
    """Run a driver; return its time and memory: of all, and of a trial more once it is under way."""
    process, marks = psutil.Process(), Marks()
    before, cpu, started = process.memory_info().rss, sum(process.cpu_times()[:2]), time.monotonic()
    run(marks)
    seconds, busy = time.monotonic() - started, sum(process.cpu_times()[:2]) - cpu
    begun, ended = marks.rows[trials // 5], marks.rows[-1]  # after imports, the making of tables, the first actors
    more = trials - 1 - trials // 5
    found = {
        "driver": name,
        "trials": trials,
        "results": trials * results,
        "seconds": seconds,
        "ideal_seconds": ideal_seconds,
        "ms_per_trial": 1000 * (seconds - ideal_seconds) / trials,
        "driver_cpu_ms_per_trial": 1000 * busy / trials,
        "marginal_ms_per_trial": 1000 * (ended[0] - begun[0]) / more,
        "marginal_cpu_ms_per_trial": 1000 * (ended[1] - begun[1]) / more,
        "marginal_cpu_ms_per_result": 1000 * (ended[1] - begun[1]) / (more * results),
        "marginal_kib_per_trial": (ended[2] - begun[2]) / more / 2**10,
        "workers": len(marks.workers),
        "closing_seconds": started + seconds - ended[0],
        "closing_cpu_seconds": cpu + busy - ended[1],
        "memory_start_mib": before / 2**20,
        "memory_end_mib": process.memory_info().rss / 2**20,
    }
    print(
        f"{name:<20} {seconds:7.1f} s, {found['ms_per_trial']:6.1f} ms over the ideal a trial; driver CPU "
        f"{found['driver_cpu_ms_per_trial']:5.1f} ms a trial; under way {found['marginal_ms_per_trial']:5.1f} ms, CPU "
        f"{found['marginal_cpu_ms_per_trial']:5.1f} ms a trial, {found['marginal_cpu_ms_per_result']:5.2f} ms a "
        f"result, {found['marginal_kib_per_trial']:5.1f} KiB a trial; {found['workers']} workers; after the last "
        f"{found['closing_seconds']:4.1f} s ({found['closing_cpu_seconds']:4.1f} s CPU); memory "
        f"{found['memory_start_mib']:.0f} -> {found['memory_end_mib']:.0f} MiB",
        flush=True,
    )
    return found


class Silent(tune.Trainable):
    """Reports and does nothing."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the configuration."""
        self.given = config

    def step(self) -> dict[str, Any]:
        """Return a result."""
        time.sleep(self.given["seconds"] / self.given["results"])
        return {"loss_nats": 1.0, "done": self.training_iteration + 1 >= self.given["results"]}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial."""
        self.given = new_config
        return True


def raw(trainable: Any, options: argparse.Namespace, folder: str, marks: Marks) -> None:
    """Run Ray Tune itself."""
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": options.cpus}),
        param_space={"x": tune.uniform(0, 1), "results": options.results, "seconds": options.seconds},
        tune_config=tune.TuneConfig(num_samples=options.trials, reuse_actors=True, metric="loss_nats", mode="min"),
        run_config=tune.RunConfig(
            storage_path=folder,
            verbose=0,
            callbacks=[marks],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    tuner.fit()


def function(config: dict[str, Any]) -> None:
    """Report as a function of Ray Tune does."""
    for _ in range(config["results"]):
        time.sleep(config["seconds"] / config["results"])
        tune.report({"loss_nats": 1.0})


class Recorded(Silent):
    """Reports, does nothing else, and records it all: an update and an evaluation, durable at each result."""

    def setup(self, config: dict[str, Any]) -> None:
        """Open the trial's folder."""
        from landscape_ray.tracking.folder import SweepFolder
        from landscape_ray.tracking.parts import PartWriter

        self.given = config
        self.made = 0
        self.folder = SweepFolder.open(Path(config["sweep_path"])).trial(self.trial_name)
        self.writer = PartWriter(self.folder)

    def step(self) -> dict[str, Any]:
        """Record a result and return it."""
        from landscape_ray.records import EvalRecord, RunSummary, StepRecord

        time.sleep(float(os.environ["SCALE_SECONDS"]) / int(os.environ["SCALE_RESULTS"]))
        self.made += 1
        at = {
            "step": self.made,
            "num_tokens": self.made,
            "flops": 1.0,
            "elapsed_seconds": 1.0,
            "time_unix": time.time(),
        }
        rates = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9}
        self.writer.append(StepRecord(**at, cost_seconds=0.1, loss_nats=1.0, grad_norm=1.0, **rates))
        self.writer.append(EvalRecord(**at, cost_seconds=0.1, loss_nats=1.0))
        num_steps = int(os.environ["SCALE_RESULTS"])
        ended = self.made >= num_steps
        summary = RunSummary(
            run_id=self.trial_name, status="finished" if ended else "running", config={"num_steps": num_steps},
            varied=dict(self.given["trial"]["values"]), step=self.made, num_steps=num_steps, final_loss_nats=1.0,
        )  # fmt: skip
        self.folder.commit(summary, self.writer.flush())
        return {
            "loss_nats": 1.0, "step": self.made, "lr": 0.1, "diverged": False, "done": ended, "ended": ended,
            "evals": [(self.made, 1.0)], "measures": [("loss_nats", 1.0)], "first_probes": [],
        }  # fmt: skip

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial."""
        self.setup(new_config)
        return True


def ours(options: argparse.Namespace, folder: str, marks: Marks) -> None:
    """Run a sweep with everything that it writes, the training replaced by nothing."""
    import io
    import tomllib

    from rich.console import Console

    import landscape_ray.sweep.tuner as tuner
    from landscape_ray.config import parse
    from landscape_ray.sweep.session import new_sweep
    from landscape_ray.sweep.spec import SweepSpec

    text = SPEC.format(cpus=options.cpus, results=options.results, trials=options.trials)

    class Shown(tuner.DashboardCallback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            super().on_trial_complete(iteration, trials, trial, **info)
            marks.on_trial_complete(iteration, trials, trial, **info)

    patched: Any = tuner
    patched.SweepTrainable, patched.DashboardCallback = Recorded, Shown
    made = new_sweep(parse(SweepSpec, tomllib.loads(text), "scale"), text, Path(folder), "scale", None)
    outcome = tuner.drive(made, Console(file=io.StringIO()))
    if outcome.counts != {"finished": options.trials}:
        raise SystemExit(f"not all trials ended: {outcome.counts} {outcome.failures}")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--results", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.0, help="that each trial sleeps")
    parser.add_argument("--cpus", type=float, default=1.0, help="CPUs of a trial")
    parser.add_argument("--num-cpus", type=int, default=2)
    parser.add_argument("--only", default="function,class,ours")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    os.environ |= {"SCALE_SECONDS": str(options.seconds), "SCALE_RESULTS": str(options.results)}  # for the trials
    ray.init(
        address="local", num_cpus=options.num_cpus, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR,
    )  # fmt: skip
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    if "ours" in options.only:  # what is loaded once is no cost of a trial
        for module in (
            "landscape_ray.sweep.tuner",
            "landscape_ray.sweep.session",
            "mlflow",
            "pyarrow.parquet",
            "torch",
        ):
            importlib.import_module(module)
    ideal = options.seconds * options.trials * options.cpus / options.num_cpus
    rows = []
    runs: dict[str, tuple[str, Callable[[str, Marks], None]]] = {
        "function": ("Ray Tune, a function", functools.partial(raw, function, options)),
        "class": ("Ray Tune, a class", functools.partial(raw, Silent, options)),
        "ours": ("landscape_ray", functools.partial(ours, options)),
    }
    for name in options.only.split(","):
        title, run = runs[name]
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            rows.append(measured(title, options.trials, options.results, ideal, functools.partial(run, folder)))
    ray.shutdown()
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    # by its name: Ray then looks classes up in a module, as it does those of a package, and does not carry their code
    sys.exit(importlib.import_module("bench_scale").main())
