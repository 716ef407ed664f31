"""Seconds of an ask and a tell with 1,000 and 10,000 trials in the study: ours, raw Optuna, and their ratio.

    python scripts/bench_search.py [--trials 1000 10000] [--repeats 9]

Ours is the book of a search: the proposal itself, made in a thread beside the trials, and what the driver waits for,
which is the line in the journal. Raw Optuna is `study.ask`, `suggest_*` and `study.tell` on a journal file of its own,
which is as durable, and on a study in memory, which is lost with the process. Same sampler settings, space and
history; medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial

from landscape_ray.config import parse
from landscape_ray.domains import Domain
from landscape_ray.sweep.searching.book import Book
from landscape_ray.sweep.searching.proposer import Outcome, frozen_trial
from landscape_ray.sweep.searching.samplers import START_UP_TRIALS
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.folder import SweepFolder

SPACE = {
    "schedule.peak_lr": Domain(log_uniform=[1e-4, 1e-1]),
    "schedule.cooldown_fraction": Domain(uniform=[0.0, 1.0]),
    "schedule.final_ratio": Domain(uniform=[0.0, 0.5]),
    "schedule.warmup_steps": Domain(integers=[0, 100]),
    "optimizer.weight_decay": Domain(log_uniform=[1e-4, 1.0]),
    "optimizer.beta1": Domain(uniform=[0.5, 0.99]),
    "optimizer.beta2": Domain(uniform=[0.9, 0.999]),
    "optimizer.eps": Domain(log_uniform=[1e-10, 1e-6]),
}


def history(number: int) -> list[FrozenTrial]:
    """Return random points with losses of a quadratic."""
    generator = np.random.default_rng(0)
    trials = []
    for _ in range(number):
        values = {name: domain.at(float(generator.random())) for name, domain in SPACE.items()}
        loss = (np.log10(values["schedule.peak_lr"]) + 2) ** 2 + float(values["schedule.final_ratio"])
        trials.append(frozen_trial(list(SPACE.items()), values, Outcome(state="complete", values=(float(loss),))))
    return trials


def suggest(trial: optuna.Trial) -> None:
    for name, domain in SPACE.items():
        if domain.integers is not None:
            trial.suggest_int(name, *domain.integers)
        else:
            trial.suggest_float(name, *domain.bounds, log=domain.log_uniform is not None)


def journal(path: Path, name: str, trials: list[FrozenTrial]) -> JournalStorage:
    """Return a journal file that holds the history, each trial in one line."""
    storage = JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
    study_id = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], name)
    with mock.patch("os.fsync"):  # the history is not what is timed
        for trial in trials:
            storage.create_new_trial(study_id, trial)
    return storage


def raw(storage: optuna.storages.BaseStorage, repeats: int) -> tuple[float, float]:
    """Return seconds of an ask with its suggestions, and of a tell."""
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=START_UP_TRIALS)
    study = optuna.load_study(study_name="bench", storage=storage, sampler=sampler)
    asks, tells = [], []
    for number in range(repeats + 1):
        start = time.perf_counter()
        trial = study.ask()
        suggest(trial)
        asks.append(time.perf_counter() - start)
        start = time.perf_counter()
        study.tell(trial, 1.0 + number)
        tells.append(time.perf_counter() - start)
    return statistics.median(asks[1:]), statistics.median(tells[1:])


def ours(path: Path, trials: list[FrozenTrial], repeats: int) -> tuple[float, float, float]:
    """Return seconds of a proposal, of what the driver waits for to hand it out, and of a tell."""
    data = {
        "name": "bench",
        "train": {"num_steps": 1000},
        "space": {name: domain.model_dump(exclude_none=True) for name, domain in SPACE.items()},
        "search": {"num_trials": len(trials) + repeats + 1},
    }
    spec = parse(SweepSpec, data, "bench")
    folder = SweepFolder(path)
    journal(folder.study_path, "bench", trials)
    book = Book(spec, folder)
    making, handing, telling = [], [], []
    for _ in range(repeats + 1):
        book._open.add(-1)  # a trial is running, so that nothing is waited for
        book._propose(1)  # begins it, as the driver's first look does
        assert book._asked is not None
        start = time.perf_counter()
        book._asked.result()
        making.append(time.perf_counter() - start)
        (job,) = timed(handing, lambda: book.next() or [])
        summary = {"loss_nats": 1.5}
        timed(telling, lambda number=job.number, found=summary: book.ended(number, found))
    book.close()
    return statistics.median(making[1:]), statistics.median(handing[1:]), statistics.median(telling[1:])


def timed(into: list[float], work: Callable[[], object]) -> object:
    start = time.perf_counter()
    found = work()
    into.append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print("milliseconds, medians; ratio = ours / raw Optuna on a journal")
    print(f"{'trials':>7} {'what':<34} {'ours':>8} {'journal':>8} {'memory':>8} {'ratio':>6}")
    for number in options.trials:
        trials = history(number)
        with tempfile.TemporaryDirectory() as scratch:
            made, handed, told = ours(Path(scratch), trials, options.repeats)
            on_disk = raw(journal(Path(scratch) / "raw.journal", "bench", trials), options.repeats)
        memory = optuna.storages.InMemoryStorage()
        optuna.create_study(study_name="bench", storage=memory).add_trials(trials)
        in_memory = raw(memory, options.repeats)
        rows = [
            ("proposal (beside the trials)", made, on_disk[0], in_memory[0]),
            ("ask: what the driver waits for", handed, on_disk[0], in_memory[0]),
            ("tell", told, on_disk[1], in_memory[1]),
        ]
        for name, mine, journalled, remembered in rows:
            cells = f"{1e3 * mine:8.2f} {1e3 * journalled:8.2f} {1e3 * remembered:8.2f} {mine / journalled:6.2f}"
            print(f"{number:>7} {name:<34} {cells}")


if __name__ == "__main__":
    main()
