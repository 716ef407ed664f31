"""A sweep folder as the few objects that a page needs: what was asked, runs, the best of them, cost, fit."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from landscape_ray.analysis.annealing import SweepFit, load_fit
from landscape_ray.analysis.runs import Run, read_runs
from landscape_ray.analysis.scaling import FILE_NAME, ScalingFit
from landscape_ray.analysis.scaling import load as load_scaling
from landscape_ray.config import flatten
from landscape_ray.errors import UserError
from landscape_ray.reports.lineage import Exploit, Segment, ancestry, ancestry_lr, exploits
from landscape_ray.text import plural, si, value

if TYPE_CHECKING:
    from landscape_ray.tracking.folder import SweepFolder


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Sweep:
    """One sweep, read once."""

    name: str
    meta: dict[str, Any]
    spec_text: str
    runs: tuple[Run, ...]
    fit: SweepFit | None = None
    scaling: tuple[ScalingFit, ...] = ()
    """Laws of size, data, compute, learning rate or batch, as saved beside the sweep."""
    warnings: tuple[str, ...] = ()

    @property
    def spec(self) -> dict[str, Any]:
        """The specification as nested tables; empty when its text is not TOML."""
        try:
            return tomllib.loads(self.spec_text)
        except tomllib.TOMLDecodeError:
            return {}

    @property
    def copies(self) -> list[Exploit]:
        """All copies of weights between members, in order."""
        return exploits(self.runs)

    @property
    def population(self) -> bool:
        """Whether members changed on the way, or were meant to."""
        return "population" in self.spec or any(run.mutated for run in self.runs)

    @property
    def finished(self) -> list[Run]:
        """Runs that went to their end with a finite loss, the best first."""
        return sorted((run for run in self.runs if run.has_result), key=lambda run: (run.loss, run.run_id))

    @property
    def best(self) -> Run | None:
        """The finished run with the lowest final held-out loss."""
        return next(iter(self.finished), None)

    @property
    def ancestry(self) -> list[Segment]:
        """The path of the winner's weights through the members; empty without a finished run."""
        best = self.best
        return ancestry(self.copies, best.run_id, best.summary.step) if best else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Where the time of a sweep went, in seconds of single runs added up, and what training computed."""

    wall_seconds: float
    """From the first record to the last of each sweep, added up; runs beside each other count once."""
    total_seconds: float
    eval_seconds: float
    probe_seconds: float
    tracking_seconds: float
    """Writing records down, which runs do beside `total_seconds`; 0 where it was not recorded."""
    gpu_seconds: float
    """Run time multiplied by the GPUs that each trial had."""
    cpu_seconds: float
    flops: float
    num_tokens: int

    @property
    def training_seconds(self) -> float:
        """What is neither evaluation nor probe."""
        return max(0.0, self.total_seconds - self.eval_seconds - self.probe_seconds)

    @property
    def probe_share(self) -> float:
        """Share of the time that probes took; nan when no time was recorded."""
        return self.probe_seconds / self.total_seconds if self.total_seconds > 0 else math.nan

    @property
    def tracking_share(self) -> float:
        """Share of the time that writing records took; nan when none was recorded."""
        whole = self.total_seconds + self.tracking_seconds
        return self.tracking_seconds / whole if self.tracking_seconds > 0 else math.nan


def open_sweep(folder: SweepFolder | Path | str) -> Sweep:
    """Return a sweep with its records, summaries and, where saved, its fit.

    Raises:
        UserError: not a sweep folder. A fit that cannot be read is a warning: the rest of the page is sound.
    """
    from landscape_ray.tracking.collect import collect  # pyarrow is needed here only
    from landscape_ray.tracking.folder import SweepFolder

    opened = folder if isinstance(folder, SweepFolder) else SweepFolder.open(Path(folder))
    collected = collect(opened)
    # a page is shown to others: paths inside the sweep are enough
    warnings = [text.replace(f"{opened.path}/", "") for text in collected.warnings]
    fit = None
    try:
        fit = load_fit(opened)
    except UserError as error:
        warnings.append(f"fits: {error}")
    scaling = []
    for path in sorted(opened.fits_path.glob(f"*/{FILE_NAME}")):
        try:
            scaling.append(load_scaling(path))
        except UserError as error:
            warnings.append(f"fits/{path.parent.name}: {error}")
    meta = opened.meta
    return Sweep(
        name=str(meta.get("name", opened.path.name)),
        meta=meta,
        spec_text=opened.spec_text,
        runs=_with_inherited_rates(read_runs(collected)),
        fit=fit,
        scaling=tuple(scaling),
        warnings=tuple(warnings),
    )


def _with_inherited_rates(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Return the runs; those that copied weights know the learning rates which these had seen elsewhere."""
    copies, known = exploits(runs), {run.run_id: run for run in runs}
    out = []
    for run in runs:
        path = ancestry(copies, run.run_id, run.summary.step)
        inherited = ancestry_lr(known, path)[1] if len(path) > 1 else None
        out.append(dataclasses.replace(run, weights_lr=inherited) if inherited is not None else run)
    return tuple(out)


def best_overall(sweeps: Sequence[Sweep]) -> tuple[Sweep, Run] | None:
    """Return the finished run with the lowest final held-out loss and its sweep; None where losses do not compare."""
    if not loss_unit(sweeps):
        return None
    found = [(sweep, sweep.best) for sweep in sweeps if sweep.best is not None]
    return min(found, key=lambda pair: pair[1].loss, default=None)


def label(sweeps: Sequence[Sweep], sweep: Sweep, run_id: str) -> str:
    """Return the name of a run on a page: with the sweep's name where there are several sweeps."""
    return run_id if len(sweeps) == 1 else f"{sweep.name}/{run_id}"


def loss_unit(sweeps: Sequence[Sweep]) -> str:
    """Return the unit of the losses (`nats/token`); empty where the runs have different ones."""
    units = {run.summary.loss_unit for sweep in sweeps for run in sweep.runs}
    return units.pop() if len(units) == 1 else ""


def counted(sweeps: Sequence[Sweep]) -> str:
    """Return what the runs count, in the plural: tokens, images, examples."""
    units = {run.summary.unit for sweep in sweeps for run in sweep.runs}
    return f"{units.pop()}s" if len(units) == 1 else "examples"


def cost(sweeps: Sequence[Sweep]) -> Cost:
    """Return the cost of all runs, whatever became of them."""
    summaries = [run.summary for sweep in sweeps for run in sweep.runs]
    wall = 0.0
    for sweep in sweeps:
        stamps = [run.all_steps["time_unix"] for run in sweep.runs] + [run.evals["time_unix"] for run in sweep.runs]
        merged = np.concatenate([np.asarray(part, dtype=np.float64) for part in stamps]) if stamps else np.zeros(0)
        merged = merged[np.isfinite(merged)]
        wall += float(np.ptp(merged)) if merged.size else 0.0
    return Cost(
        wall_seconds=wall,
        total_seconds=math.fsum(s.elapsed_seconds for s in summaries),
        eval_seconds=math.fsum(s.eval_seconds for s in summaries),
        probe_seconds=math.fsum(s.probe_seconds for s in summaries),
        tracking_seconds=math.fsum(s.tracking_seconds for s in summaries),
        gpu_seconds=_occupied(sweeps, "gpus_per_trial", 0.0),
        cpu_seconds=_occupied(sweeps, "cpus_per_trial", 1.0),
        flops=math.fsum(s.flops for s in summaries),
        num_tokens=sum(s.num_tokens for s in summaries),
    )


def _occupied(sweeps: Sequence[Sweep], resource: str, default: float) -> float:
    """Return the run time of all trials multiplied by how much of a resource each had, in seconds."""
    return math.fsum(
        float(sweep.spec.get("resources", {}).get(resource, default)) * run.summary.elapsed_seconds
        for sweep in sweeps
        for run in sweep.runs
    )


def bytes_per_token(sweep: Sweep, run: Run) -> float:
    """Return how many bytes of text one token stands for; nan when that is not known.

    What the run noted. For foreign logs and older versions: one, where the embedding table shows a vocabulary of 256
    (text is read as bytes); otherwise what the sweep's notes say under `bytes_per_token`.
    """
    if run.summary.bytes_per_token is not None:
        return run.summary.bytes_per_token
    noted = sweep.meta.get("bytes_per_token")
    if isinstance(noted, int | float) and noted > 0:
        return float(noted)
    config, summary = flatten(run.summary.config), run.summary
    width, tied = config.get("model.width"), config.get("model.tied_head", True)
    if not isinstance(width, int) or width < 1:
        return math.nan
    rows = (summary.num_params - summary.num_params_non_embedding) / width
    if config.get("model.positions") == "learned":
        rows -= config.get("data.context_length", 0)
    return 1.0 if rows / (1 if tied else 2) == 256 else math.nan


def bits_per_byte(sweep: Sweep, run: Run) -> float:
    """Return the loss of a run in bits per byte, loss_nats / ln 2 / bytes_per_token; nan when bytes are unknown."""
    if run.summary.loss_unit != "nats/token":
        return math.nan
    return run.loss / math.log(2) / bytes_per_token(sweep, run)


def status_counts(runs: Sequence[Run]) -> dict[str, int]:
    """Return how many runs ended how, the usual outcomes first."""
    order = ("finished", "stopped", "diverged", "failed", "running", "pending")
    counts = {status: sum(run.summary.status == status for run in runs) for status in order}
    return {status: count for status, count in counts.items() if count}


def varied_names(sweeps: Sequence[Sweep]) -> list[str]:
    """Return the dotted names of everything that was searched, in the order of their first appearance."""
    return list(dict.fromkeys(name for sweep in sweeps for run in sweep.runs for name in run.summary.varied))


def asked(sweep: Sweep) -> list[tuple[str, str]]:
    """Return what the sweep was asked to do as (term, text) pairs, from its runs and its specification."""
    spec = sweep.spec
    # what the file says, where there is one: defaults that nobody named are not what was asked
    config = spec.get("train") or (sweep.runs[0].summary.config if sweep.runs else {})
    summary = sweep.runs[0].summary if sweep.runs else None
    out: list[tuple[str, str]] = []

    def add(term: str, text: str) -> None:
        if text:
            out.append((term, text))

    add("Data", _table(config.get("data")))
    model = _table(config.get("model"))
    if summary and summary.num_params:
        size = f"{si(summary.num_params)} parameters"
        if summary.num_params_non_embedding:
            size += f" ({si(summary.num_params_non_embedding)} without embeddings)"
        model = f"{size}; {model}" if model else size
    add("Model", model)
    steps = sorted({run.summary.num_steps for run in sweep.runs if run.summary.num_steps})
    if steps:
        length = f"{steps[0]:,} updates" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,} updates"
        batch = config.get("batch_size")
        examples = "sequences" if counted([sweep]) == "tokens" else counted([sweep])
        add("Each run", f"{length} of {batch} {examples}" if batch else length)
    elif config.get("num_steps"):
        add("Each run", f"{value(config['num_steps'])} updates")
    add("Optimizer", _table(config.get("optimizer")))
    search, population = spec.get("search"), spec.get("population")
    if isinstance(search, Mapping):
        points = search.get("initial")
        given = f", {len(points)} of them given in advance" if isinstance(points, list) and points else ""
        add("Search", f"{value(search.get('num_trials'))} trials by {search.get('sampler', 'tpe')}{given}")
    if isinstance(population, Mapping):
        add("Population", _table(population))
    space = spec.get("space")
    domains = [f"{name} {domain(entry)}".strip() for name, entry in space.items()] if isinstance(space, Mapping) else []
    add("Varied", "; ".join(domains or varied_names([sweep])))
    add("Runs", ", ".join(f"{count} {status}" for status, count in status_counts(sweep.runs).items()))
    seed = sweep.meta.get("seed", spec.get("seed", config.get("seed")))
    add("Seed", "" if seed is None else value(seed))
    return out


def domain(entry: Any) -> str:
    """Return a domain of a sweep file in words.

    >>> domain({"log_uniform": [1e-3, 0.05]}), domain({"choices": ["wsd", "cosine"]}), domain({"integers": [2, 8]})
    ('from 0.001 to 0.05 (log)', 'one of wsd, cosine', 'from 2 to 8 (whole numbers)')
    """
    if not isinstance(entry, Mapping):
        return ""
    for kind, word in (("uniform", ""), ("log_uniform", " (log)"), ("integers", " (whole numbers)")):
        ends = entry.get(kind)
        if isinstance(ends, list) and len(ends) == 2:
            return f"from {value(ends[0])} to {value(ends[1])}{word}"
    if isinstance(choices := entry.get("choices"), list):
        return f"one of {', '.join(map(value, choices))}"
    return ", ".join(f"{key.replace('_', ' ')} {value(item)}" for key, item in entry.items() if key != "when")


def edge_of_search(finished: Sequence[Run]) -> str:
    """Return a warning when the best peak LR is the smallest or largest that was tried, else an empty text."""
    peaks = np.array([run.peak_lr for run in finished])
    if len(finished) < 3 or not np.isfinite(peaks).all() or peaks.max() <= peaks.min() * (1 + 1e-6):
        return ""
    best = min(finished, key=lambda run: run.loss).peak_lr
    for extreme, word in ((peaks.min(), "lowest"), (peaks.max(), "highest")):
        if math.isclose(best, extreme, rel_tol=1e-6):
            return f"The best peak LR is the {word} that finished: the optimum may lie beyond it."
    return ""


def spread(finished: Sequence[Run]) -> tuple[float, float]:
    """Return (median, worst) final loss of runs that finished; nan without any."""
    losses = [run.loss for run in finished]
    return (float(np.median(losses)), max(losses)) if losses else (math.nan, math.nan)


def no_best(sweeps: Sequence[Sweep]) -> str:
    """Return in a sentence why `best_overall` has none."""
    units = sorted({run.summary.loss_unit for sweep in sweeps for run in sweep.runs})
    if len(units) > 1:
        return f"The losses are of different kinds ({', '.join(units)}), so no run is the best of all."
    return f"No run has finished yet: {empty_reason(sweeps)}."


def empty_reason(sweeps: Sequence[Sweep]) -> str:
    """Return why nothing can be drawn yet."""
    runs = [run for sweep in sweeps for run in sweep.runs]
    if not runs:
        return "no run has committed anything yet"
    return ", ".join(f"{plural(count, 'run')} {status}" for status, count in status_counts(runs).items())


def _table(table: Any) -> str:
    """Return a configuration table in one line, its name first."""
    if not isinstance(table, Mapping):
        return "" if table is None else value(table)
    flat = flatten(table)
    name = flat.pop("name", None) or flat.pop("algorithm", None)
    parts = [f"{key.replace('_', ' ')} {value(item)}" for key, item in flat.items() if item is not None]
    return ", ".join(([str(name)] if name else []) + parts)
