"""Kill workers and drivers of one sweep at random, again and again; nothing may be lost and nothing counted twice.

usage: python scripts/soak.py [--kills 100] [--minutes 60] [--trials 6] [--most 20] [--seed 0] [--folder FOLDER]

Runs a search of small trials through the command line, ends a random one of its processes (a trial's or the driver)
with SIGKILL at random moments, resumes where the driver was hit, and goes on with new sweeps, every other one a
population, until enough kills have been made. Then every trial of every sweep must have ended at its full budget with
every update recorded once, in the folder and in MLflow, and every population must have recorded what one that nobody
disturbed has: each loss, each exploit, each donor. Exit status 0, or 1 with what is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from mlflow import MlflowClient

from landscape_ray.sweep.population.book import population_of
from landscape_ray.sweep.spec import spec_of
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder

assert ray.__version__  # its import puts psutil, which comes with it, within reach
psutil: Any = importlib.import_module("psutil")

STEPS = 600
COMMON = """
name = "soak"
commit_steps = 5
resources = {{ cpus_per_trial = 1, max_failures = 1000 }}
train = {{ num_steps = {steps}, batch_size = 32, data = {{ name = "images" }}, model = {{ name = "mlp", width = 64 }}, \
eval = {{ every_steps = 20, num_batches = 2, batch_size = 64 }} }}
space = {{ "schedule.peak_lr" = {{ log_uniform = [1e-3, 1e-1] }} }}
seed = {seed}
"""
SEARCH = 'search = {{ num_trials = {trials}, sampler = "random" }}\n'
# Members wait for each other, so that what becomes of them depends on the seed alone: all of these are the same sweep.
POPULATION = "population = {{ num_members = 4, interval_steps = 60, synchronous = true }}\n"
NUM_MEMBERS = 4
ALL_THAT_IS_RECORDED = (
    "run_id", "kind", "step", "num_tokens", "loss_nats", "lr", "event", "detail", "donor", "donor_step",
)  # fmt: skip


class Sweep:
    """One sweep of the soak and the driver that runs it now."""

    def __init__(self, place: Path, number: int, trials: int, population: bool = False) -> None:
        self.name, self.place, self.population = f"soak-{number}", place, population
        self.trials = NUM_MEMBERS if population else trials
        self.path = place / "runs" / self.name
        self.wrong: list[str] = []
        text = COMMON + (POPULATION if population else SEARCH)
        text = text.format(seed=0 if population else number, steps=STEPS, trials=trials)
        (place / f"{self.name}.toml").write_text(text)
        self.driver = self.launch()

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the sweep, or resume it."""
        words = ["resume", self.name] if (self.path / "sweep.json").exists() else ["sweep", f"{self.name}.toml"]
        words += [] if words[0] == "resume" else ["--name", self.name]
        with open(self.place / f"{self.name}.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "landscape_ray.cli", *words],
                cwd=self.place,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def steps(self) -> int:
        """Return how many updates are committed."""
        if not (self.path / "sweep.json").exists():
            return 0
        return sum(s.step for trial in SweepFolder.open(self.path).trials() if (s := trial.summary()) is not None)

    def workers(self) -> list[Any]:
        """Return the processes that train at present."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.driver.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    command = " ".join(process.cmdline())
                    if "SweepTrainable" in command or "MemberTrainable" in command:
                        found.append(process)
        return found

    def problems(self) -> list[str]:
        """Return what is lost or doubled; nothing where all is well."""
        collected = collect(self.path)
        wrong = self.wrong + [f"{self.name}: {warning}" for warning in collected.warnings]
        statuses = Counter(run.status for run in collected.runs)
        if statuses != {"finished": self.trials}:
            wrong.append(f"{self.name}: {dict(statuses)} of {self.trials} trials")
        rows = collected.records.select(["run_id", "kind", "step"]).to_pylist()
        for run in collected.runs:
            steps = [row["step"] for row in rows if row["run_id"] == run.run_id and row["kind"] == "step"]
            if steps != list(range(1, STEPS + 1)):
                wrong.append(f"{self.name} {run.run_id}: {len(steps)} updates are recorded, of {STEPS}")
        if self.population:
            folder = SweepFolder.open(self.path)
            if not population_of(spec_of(folder), folder).finished:
                wrong.append(f"{self.name}: its strategy is not at its end")
        client = MlflowClient(f"sqlite:///{self.place / 'runs' / 'mlflow.db'}")
        sweep_id = SweepFolder.open(self.path).meta["sweep_id"]
        names: Counter[str] = Counter()
        for experiment in client.search_experiments():
            found = client.search_runs(
                [experiment.experiment_id], f"tags.`landscape_ray.sweep_id` = '{sweep_id}'", max_results=1000
            )
            names.update(run.data.tags.get("landscape_ray.trial_id", "parent") for run in found)
        if names != Counter(["parent", *(run.run_id for run in collected.runs)]):
            wrong.append(f"{self.name}: MLflow holds {dict(names)}")
        return wrong

    def history(self) -> list[tuple[Any, ...]]:
        """Return all rows but those that say that a member was resumed, without times; NaN as text."""
        rows = collect(self.path).records.to_pylist()
        kept = [tuple(str(row[name]) for name in ALL_THAT_IS_RECORDED) for row in rows if row["event"] != "resume"]
        return sorted(kept)

    def difference(self, other: Sweep) -> list[str]:
        """Return what is different about the same sweep when nobody disturbed it; nothing where all is the same."""
        ours, theirs = Counter(self.history()), Counter(other.history())
        if ours == theirs:
            return []
        examples = f"{list((ours - theirs).elements())[:3]} against {list((theirs - ours).elements())[:3]}"
        return [f"{self.name} differs from {other.name}, which nobody disturbed: {examples}"]


def soak(place: Path, kills: int, minutes: float, trials: int, seed: int, most: int = 20) -> list[str]:
    """Run sweeps under fire; return what is wrong with them."""
    rng = random.Random(seed)
    deadline = time.monotonic() + 60 * minutes
    made: Counter[str] = Counter()
    done: list[Sweep] = []
    while sum(made.values()) < kills and time.monotonic() < deadline:
        sweep = Sweep(place, len(done), trials, population=len(done) % 2 == 1)
        done.append(sweep)
        pause = time.monotonic() + rng.uniform(0.5, 5.0)
        seen, aim, before = 0, "", sum(made.values())
        while True:
            code = sweep.driver.poll()
            if code == 0:
                break
            if code is not None:
                if code != -signal.SIGKILL:
                    sweep.wrong.append(f"{sweep.name}: a driver that nobody killed ended with status {code}")
                sweep.driver = sweep.launch()
            enough = sum(made.values()) >= min(kills, before + most) or time.monotonic() > deadline
            # between two kills something must have been committed, or a soak could stand still for ever
            if not enough and time.monotonic() > pause and (steps := sweep.steps()) > seen:
                if not aim:
                    aim = "worker" if rng.random() < 0.75 else "driver"
                hit = False
                if aim == "worker" and (workers := sweep.workers()):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        rng.choice(workers).kill()
                        hit = True
                elif aim == "driver":
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(sweep.driver.pid, signal.SIGKILL)
                        sweep.driver.wait()
                        hit = True
                if hit:
                    made[aim] += 1
                    aim, seen, pause = "", steps, time.monotonic() + rng.uniform(0.5, 5.0)
            if time.monotonic() > deadline + 300:
                sweep.driver.kill()
                return [f"{sweep.name} does not end"]
            time.sleep(0.1)
        print(f"{sweep.name} ended; {made['worker']} workers and {made['driver']} drivers killed", flush=True)
    if any(sweep.population for sweep in done):
        done.append(Sweep(place, len(done), trials, population=True))
        if done[-1].driver.wait(timeout=600) != 0:
            return [f"{done[-1].name} fails, though nobody disturbed it"]
    wrong = [problem for sweep in done for problem in sweep.problems()]
    wrong += [problem for sweep in done if sweep.population for problem in sweep.difference(done[-1])]
    print(
        f"{sum(made.values())} kills ({made['worker']} workers, {made['driver']} drivers) in {len(done)} sweeps, "
        f"{sum(sweep.population for sweep in done)} of them populations, with {sum(sweep.trials for sweep in done)} "
        f"trials: {len(wrong)} problems"
    )
    return wrong


def main() -> int:
    """Read the command line, soak, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60.0, help="bound on the time in which kills are made")
    parser.add_argument("--trials", type=int, default=6, help="of a search")
    parser.add_argument("--most", type=int, default=20, help="kills of one sweep, which then runs to its end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary one, removed when all is well")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        place = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        place.mkdir(parents=True, exist_ok=True)
        wrong = soak(place.absolute(), options.kills, options.minutes, options.trials, options.seed, options.most)
    for problem in wrong:
        print(problem)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
