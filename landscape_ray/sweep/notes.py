"""What the sweep's run in MLflow says about itself: tags to filter by, and the result as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from landscape_ray import text
from landscape_ray.domains import Domain
from landscape_ray.records import RunSummary
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.labels import size_of, task_of

NUM_SHOWN = 5
"""Runs in the table of the best."""


def tags_of(spec: SweepSpec, summaries: Sequence[RunSummary] = ()) -> dict[str, str]:
    """Return the tags of a sweep: searcher, strategy, task, and once a run has begun its size."""
    sizes = list(dict.fromkeys(size for summary in summaries if (size := size_of(summary))))
    stopping = spec.search.stopping if spec.search is not None else None
    tags = {
        "searcher": spec.search.sampler if spec.search is not None else "none",
        "strategy": strategy_of(spec) if spec.population is not None else stopping.name if stopping else "none",
        "task": task_of(spec.train),
        "size": sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}" if sizes else "",
    }
    return {name: value for name, value in tags.items() if value}


def strategy_of(spec: SweepSpec) -> str:
    """Return the name of a population's strategy."""
    return str(getattr(spec.population, "strategy", "pbt"))


def description_of(spec: SweepSpec, name: str, summaries: Sequence[RunSummary], best: RunSummary | None) -> str:
    """Return the result of a sweep as Markdown, for the run that stands for it.

    Args:
        spec: the sweep.
        name: of its folder.
        summaries: all trials.
        best: the one to use, None if none has a result.
    """
    counts: dict[str, int] = {}
    for summary in summaries:
        counts[summary.status] = counts.get(summary.status, 0) + 1
    ended = ", ".join(f"{number} {status}" for status, number in sorted(counts.items())) or "no trial started"
    parts = [_plain(spec.description)] if spec.description else []
    parts.append(_result(summaries, best) if best is not None else f"**No result yet**: {ended}.")
    parts.append(f"{_asked(spec)} {ended[:1].upper()}{ended[1:]}. {_cost(summaries)}")
    if best is not None:
        parts.append(_table(summaries, best.loss_unit))
    parts.append(
        f"Curves are in the runs below this one. `landscape-ray report {name}` adds `report.html` to the artifacts: "
        "figures, what mattered, what to try next."
    )
    return "\n\n".join(part for part in parts if part)


def _result(summaries: Sequence[RunSummary], best: RunSummary) -> str:
    right = f", {text.percent(best.final_accuracy, 4)} right" if best.final_accuracy is not None else ""
    losses = _losses(summaries)
    beside = f" The median run ended at {text.loss(statistics.median(losses))}." if len(losses) > 2 else ""
    return (
        f"**{text.loss(best.final_loss_nats)} {best.loss_unit}**{right}, by **{best.run_id}**"
        f"{f' with {_values(best)}' if best.varied else ''}.{beside}"
    )


def _asked(spec: SweepSpec) -> str:
    if spec.search is not None:
        how = f"{spec.num_trials} trials by `{spec.search.sampler}`"
        how += f", stopped by `{spec.search.stopping.name}`" if spec.search.stopping is not None else ""
    elif spec.population is not None:
        how = f"A population of {spec.num_trials} by `{strategy_of(spec)}`"
    else:
        return "A single run."
    return f"{how} over {', '.join(f'`{name}` ({_domain(domain)})' for name, domain in spec.space.items())}."


def _domain(domain: Domain) -> str:
    if domain.choices is not None:
        return f"one of {', '.join(map(text.value, domain.choices))}"
    low, high = domain.bounds
    return f"{text.value(low)} to {text.value(high)}{', log' if domain.log_uniform is not None else ''}"


def _cost(summaries: Sequence[RunSummary]) -> str:
    seconds, probes = (math.fsum(getattr(s, f"{part}_seconds") for s in summaries) for part in ("elapsed", "probe"))
    if seconds <= 0:
        return ""
    share = f", {text.percent(probes / seconds)} of it in probes" if probes > 0 else ""
    return f"{text.duration(seconds)} of run time{share}; {text.si(sum(s.flops for s in summaries), 'FLOP')}."


def _table(summaries: Sequence[RunSummary], unit: str) -> str:
    """Return the best runs as a table, its columns what was searched."""
    ranked = sorted(
        (s for s in summaries if s.status == "finished" and math.isfinite(s.final_loss_nats)),
        key=lambda s: s.final_loss_nats,
    )[:NUM_SHOWN]
    if len(ranked) < 2:
        return ""
    names = list(dict.fromkeys(name for summary in ranked for name in summary.varied))
    head = ["run", f"final loss ({unit})", *names, "updates"]
    rows = [
        [s.run_id, text.loss(s.final_loss_nats), *(text.value(s.varied.get(name)) for name in names), f"{s.step:,}"]
        for s in ranked
    ]
    lines = [head, ["---", "---:", *("---:" for _ in names), "---:"], *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _losses(summaries: Sequence[RunSummary]) -> list[float]:
    return [s.final_loss_nats for s in summaries if s.status == "finished" and math.isfinite(s.final_loss_nats)]


def _values(summary: RunSummary) -> str:
    return ", ".join(f"`{name}` {_plain(text.value(value))}" for name, value in summary.varied.items())


def _plain(cell: str) -> str:
    """Return text that does not end a cell of a table."""
    return cell.replace("|", "\\|").replace("\n", " ")
