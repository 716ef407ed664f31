"""What a driver costs for each trial and each result, beside Ray Tune itself in the same run.

usage: python scripts/bench_scale.py [--trials 1000] [--results 3] [--seconds 0] [--num-cpus 2] [--out FILE.json]

Trials do nothing but report; `--seconds` makes each sleep, or with `--compute` work, so long in all. The drivers that
`--only` names run the same number of trials and results one after the other, each in a process of its own: Ray Tune
with a function, Ray Tune with a class whose actors are reused, the same with a new actor for each trial (`fresh`), and
ours, with trial folders, Parquet, proposals, journal and MLflow switched on. Printed are wall-clock and CPU time of the
driver process for each trial and each result, over all and once a fifth of the trials is done (the rest is what is paid
once: MLflow's tables, the first actors), the memory that a trial more takes, what is left to do after the last trial,
and how all of it goes over the run. `--limit` stops each after so many seconds; what it had done is shown.

Ray's release test runs 10,000 trials of 1 s on 16 CPUs in less than 800 s, of which 625 s are the trials: 28 %.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import logging
import os
import subprocess
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

TITLES = {
    "function": "Ray Tune, a function",
    "class": "Ray Tune, a class",
    "fresh": "Ray Tune, new actors",
    "ours": "landscape_ray",
}
CURVE_TRIALS = 500
"""A point of the curve is so many trials."""

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


def measured(options: argparse.Namespace, run: Callable[[Marks], None]) -> dict[str, Any]:
    """Run a driver; return its time and memory: of all, and of a trial more once it is under way."""
    process, marks = psutil.Process(), Marks()
    before, cpu, started = process.memory_info().rss, sum(process.cpu_times()[:2]), time.monotonic()
    run(marks)
    seconds, busy = time.monotonic() - started, sum(process.cpu_times()[:2]) - cpu
    trials = len(marks.rows)  # fewer than were wanted where it was stopped
    ideal_seconds = options.seconds * trials * options.cpus / options.num_cpus
    begun, ended = marks.rows[trials // 5], marks.rows[-1]  # after imports, the making of tables, the first actors
    more = trials - 1 - trials // 5
    start_seconds = marks.rows[0][0] - started - options.seconds  # until the first trial began
    return {
        "trials": trials,
        "results": trials * options.results,
        "seconds": seconds,
        "ideal_seconds": ideal_seconds,
        "start_seconds": start_seconds,
        "over_ideal_percent": 100 * ((seconds - start_seconds) / ideal_seconds - 1) if ideal_seconds else None,
        "driver_cpu_ms_per_trial": 1000 * busy / trials,
        "marginal_ms_per_trial": 1000 * (ended[0] - begun[0]) / more,
        "marginal_cpu_ms_per_trial": 1000 * (ended[1] - begun[1]) / more,
        "marginal_cpu_ms_per_result": 1000 * (ended[1] - begun[1]) / (more * options.results),
        "marginal_kib_per_trial": slope([row[2] for row in marks.rows[trials // 5 :]]) / 2**10,
        "workers": len(marks.workers),
        "closing_seconds": started + seconds - ended[0],
        "closing_cpu_seconds": cpu + busy - ended[1],
        "memory_start_mib": before / 2**20,
        "memory_tenth_mib": marks.rows[trials // 10][2] / 2**20,
        "memory_half_mib": marks.rows[trials // 2][2] / 2**20,
        "memory_last_trial_mib": ended[2] / 2**20,
        "memory_end_mib": process.memory_info().rss / 2**20,
        "curve": [point(marks.rows, started, stop) for stop in range(CURVE_TRIALS, trials + 1, CURVE_TRIALS)],
    }


def slope(values: list[int]) -> float:
    """Return the slope of the straight line through values at 0, 1, 2 ..., by least squares."""
    middle = (len(values) - 1) / 2
    return sum((i - middle) * value for i, value in enumerate(values)) / sum(
        (i - middle) ** 2 for i in range(len(values))
    )


def point(rows: list[tuple[float, float, int]], started: float, stop: int) -> dict[str, float]:
    """Return what the trials up to number `stop`, since the point before it, took of the driver each."""
    first, last = rows[max(0, stop - CURVE_TRIALS)], rows[stop - 1]
    count = min(stop, CURVE_TRIALS) - 1
    return {
        "trials": stop,
        "seconds": last[0] - started,
        "ms_per_trial": 1000 * (last[0] - first[0]) / count,
        "cpu_ms_per_trial": 1000 * (last[1] - first[1]) / count,
        "memory_mib": last[2] / 2**20,
    }


ROWS = (
    ("trials ended", "trials", "{}"),
    ("wall clock, s", "seconds", "{:.1f}"),
    ("until the first trial began, s", "start_seconds", "{:.1f}"),
    ("from there, over the ideal, %", "over_ideal_percent", "{:.1f}"),
    ("a trial more: wall, ms", "marginal_ms_per_trial", "{:.1f}"),
    ("a trial more: driver CPU, ms", "marginal_cpu_ms_per_trial", "{:.1f}"),
    ("a result more: driver CPU, ms", "marginal_cpu_ms_per_result", "{:.2f}"),
    ("driver CPU over all, ms a trial", "driver_cpu_ms_per_trial", "{:.1f}"),
    ("memory, KiB a trial", "marginal_kib_per_trial", "{:.1f}"),
    ("memory at start, MiB", "memory_start_mib", "{:.0f}"),
    ("memory at 10 %, MiB", "memory_tenth_mib", "{:.0f}"),
    ("memory at 50 %, MiB", "memory_half_mib", "{:.0f}"),
    ("memory at the last trial, MiB", "memory_last_trial_mib", "{:.0f}"),
    ("memory at the end, MiB", "memory_end_mib", "{:.0f}"),
    ("after the last trial, s", "closing_seconds", "{:.1f}"),
    ("after the last trial, CPU s", "closing_cpu_seconds", "{:.1f}"),
    ("workers", "workers", "{}"),
)


def show(found: dict[str, dict[str, Any]]) -> None:
    """Print one table: a column for each driver, and ours over the peer's."""
    names = list(found)
    peer = next((name for name in ("class", "fresh", "function") if name in found), None)
    ratio = peer is not None and "ours" in found
    print(f"{'':<32}" + "".join(f"{TITLES[name]:>22}" for name in names) + ("   ratio" if ratio else ""))
    for title, key, form in ROWS:
        values = [found[name][key] for name in names]
        if None in values:
            continue
        over = f"{found['ours'][key] / found[peer][key]:8.2f}" if ratio and peer and found[peer][key] > 0 else ""
        print(f"{title:<32}" + "".join(f"{form.format(value):>22}" for value in values) + over)
    for name in names if max(len(each["curve"]) for each in found.values()) > 1 else ():
        print(f"\n{TITLES[name]}: trials, s, ms a trial, driver CPU ms a trial, MiB")
        for each in found[name]["curve"]:
            print(
                f"{each['trials']:8.0f} {each['seconds']:8.1f} {each['ms_per_trial']:8.1f} "
                f"{each['cpu_ms_per_trial']:8.1f} {each['memory_mib']:8.0f}"
            )


def spend(seconds: float) -> None:
    """Sleep, or compute: then so much processor time, however long that takes beside others."""
    if os.environ.get("SCALE_COMPUTE") != "1":
        time.sleep(seconds)
        return
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        sum(range(1000))


class Silent(tune.Trainable):
    """Reports and does nothing."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the configuration."""
        self.given = config

    def step(self) -> dict[str, Any]:
        """Return a result."""
        spend(self.given["seconds"] / self.given["results"])
        return {"loss_nats": 1.0, "done": self.training_iteration + 1 >= self.given["results"]}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial."""
        self.given = new_config
        return True


def raw(trainable: Any, options: argparse.Namespace, folder: str, marks: Marks, reuse: bool = True) -> None:
    """Run Ray Tune itself."""
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": options.cpus}),
        param_space={"x": tune.uniform(0, 1), "results": options.results, "seconds": options.seconds},
        tune_config=tune.TuneConfig(
            num_samples=options.trials, reuse_actors=reuse, metric="loss_nats", mode="min", time_budget_s=options.limit
        ),
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
        spend(config["seconds"] / config["results"])
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

        spend(float(os.environ["SCALE_SECONDS"]) / int(os.environ["SCALE_RESULTS"]))
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
            if options.limit is not None and time.monotonic() - started > options.limit:
                raise self._dashboard._halting("it has had its time")

    started = time.monotonic()
    patched: Any = tuner
    patched.SweepTrainable, patched.DashboardCallback = Recorded, Shown
    made = new_sweep(parse(SweepSpec, tomllib.loads(text), "scale"), text, Path(folder), "scale", None)
    outcome = tuner.drive(made, Console(file=io.StringIO()))
    if outcome.counts != {"finished": options.trials} and not outcome.halt:
        raise SystemExit(f"not all trials ended: {outcome.counts} {outcome.failures}")


def one(options: argparse.Namespace) -> dict[str, Any]:
    """Run one driver in this process."""
    name = options.only
    compute = "1" if options.compute else "0"
    # for the trials
    os.environ |= {
        "SCALE_SECONDS": str(options.seconds),
        "SCALE_RESULTS": str(options.results),
        "SCALE_COMPUTE": compute,
    }
    ray.init(
        address="local", num_cpus=options.num_cpus, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR,
    )  # fmt: skip
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    if name == "ours":  # what is loaded once is no cost of a trial
        for module in (
            "landscape_ray.sweep.tuner",
            "landscape_ray.sweep.session",
            "mlflow",
            "pyarrow.parquet",
            "torch",
        ):
            importlib.import_module(module)
    runs: dict[str, Callable[[str, Marks], None]] = {
        "function": functools.partial(raw, function, options),
        "class": functools.partial(raw, Silent, options),
        "fresh": functools.partial(raw, Silent, options, reuse=False),
        "ours": functools.partial(ours, options),
    }
    try:
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            return measured(options, functools.partial(runs[name], folder))
    finally:
        ray.shutdown()


def main() -> int:
    """Measure, each driver in a process of its own, one after the other, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--results", type=int, default=3, help="of each trial")
    parser.add_argument("--seconds", type=float, default=0.0, help="that each trial sleeps")
    parser.add_argument("--compute", action="store_true", help="trials compute for so long instead of sleeping")
    parser.add_argument("--cpus", type=float, default=1.0, help="CPUs of a trial")
    parser.add_argument(
        "--num-cpus", type=int, default=2, help="of the cluster; more than there are for trials that sleep"
    )
    parser.add_argument("--only", default="function,class,ours", help="of function, class, fresh and ours")
    parser.add_argument("--limit", type=float, default=None, help="seconds after which each driver is stopped")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--alone", action="store_true", help="in this process; --out is needed")
    options = parser.parse_args()
    if options.alone:
        options.out.write_text(json.dumps(one(options)))
        return 0
    found = {}
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        for name in options.only.split(","):
            path = Path(folder) / f"{name}.json"
            given = [*sys.argv[1:], "--only", name, "--out", str(path), "--alone"]
            subprocess.run([sys.executable, __file__, *given], check=True)
            found[name] = json.loads(path.read_text())
            if options.out is not None:  # at once: the next one may be stopped
                rows = [{"driver": name} | row for name, row in found.items()]
                options.out.write_text(json.dumps(rows, indent=1) + "\n")
    show(found)
    return 0


if __name__ == "__main__":
    # by its name: Ray then looks classes up in a module, as it does those of a package, and does not carry their code
    sys.exit(importlib.import_module("bench_scale").main())
