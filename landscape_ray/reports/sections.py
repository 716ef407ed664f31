"""The text and the tables of the page, as HTML. Everything that comes from a sweep is escaped here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from landscape_ray import text
from landscape_ray.analysis.runs import Run
from landscape_ray.reports.markup import definitions, head, table, tile, warnings
from landscape_ray.reports.views import (
    Cost,
    Sweep,
    asked,
    best_overall,
    bits_per_byte,
    cost,
    counted,
    label,
    loss_unit,
    no_best,
    spread,
    status_counts,
    varied_names,
)

ANCHORS = (
    ("found", "Result"),
    ("use", "Recommendation"),
    ("curves", "Loss"),
    ("schedules", "Schedules"),
    ("search", "What mattered"),
    ("sharpness", "Sharpness"),
    ("probes", "Probes"),
    ("ranking", "Ranking"),
    ("law", "Law"),
    ("runs", "Runs"),
    ("cost", "Cost"),
    ("again", "Run it again"),
)


def title(sweeps: Sequence[Sweep]) -> str:
    """Return the title of the page, not escaped."""
    return " and ".join(sweep.name for sweep in sweeps)


def heading(sweeps: Sequence[Sweep]) -> str:
    """Return the head of the page: names, what they are for, when, and the table of contents."""
    said = [str(sweep.spec["description"]) for sweep in sweeps if sweep.spec.get("description")]
    made = [_day(sweep.meta.get("created_unix")) for sweep in sweeps]
    facts = [day for day in dict.fromkeys(made) if day]
    state = [str(sweep.meta["status"]) for sweep in sweeps if sweep.meta.get("status") not in (None, "finished")]
    facts += [f"state when this page was written: {text.listing(state)}"] if state else []
    description = "".join(f"<p>{escape(one)}</p>" for one in said)
    return head(title(sweeps), ["landscape_ray report", *facts], ANCHORS, description)


def found(sweeps: Sequence[Sweep]) -> str:
    """Return the result in one sentence and a few tiles, then what was asked."""
    unread = [warning for sweep in sweeps for warning in sweep.warnings]
    spent, best = cost(sweeps), best_overall(sweeps)
    tiles = [tile("Time spent", *_parted(text.duration(spent.total_seconds)), _share_of_probes(spent))]
    runs = [run for sweep in sweeps for run in sweep.runs]
    told = ", ".join(f"{count} {status}" for status, count in status_counts(runs).items())
    tiles.insert(0, tile("Runs", str(len(runs)), "", told or "none yet"))
    if best is None:
        lead = no_best(sweeps)
    else:
        sweep, run = best
        unit = run.summary.loss_unit
        median, worst = spread([one for each in sweeps for one in each.finished])
        name = label(sweeps, sweep, run.run_id)
        lead = (
            f"The best run is {name}: held-out loss {text.loss(run.loss)} {unit} with peak learning rate "
            f"{text.lr(run.peak_lr)} and {'a ' if run.shape != 'population' else ''}{_shape_words(run.shape)}."
        )
        bits = bits_per_byte(sweep, run)
        also = _also(run, bits)
        best_tiles = [
            tile("Best held-out loss", text.loss(run.loss), unit, also),
            tile("Best peak learning rate", text.lr(run.peak_lr), "", f"{run.shape} · {name}"),
        ]
        if len(runs) > 1 and worst > run.loss:
            below = f"worst finished run {text.signed(run.loss - worst)}"
            best_tiles.append(tile("Against the median run", text.signed(run.loss - median), unit, below))
        tiles = best_tiles + tiles
    tiles += [_forecast_tile(sweep) for sweep in sweeps if sweep.fit is not None]
    return (
        f'<section id="found"><p class="lead">{escape(lead)}</p><div class="tiles">{"".join(tiles)}</div>'
        f"{warnings('Not everything could be read', unread)}"
        f"{_compared(sweeps) if len(sweeps) > 1 else ''}"
        f'<div class="asked">{"".join(_asked(sweep, len(sweeps) > 1) for sweep in sweeps)}</div></section>'
    )


def _also(run: Run, bits: float) -> str:
    """Return what stands below the best loss: the accuracy, or bits per byte of text."""
    if run.summary.loss_unit != "nats/token":
        accuracy = run.summary.final_accuracy
        return f"{accuracy:.2%} predicted right" if accuracy is not None else ""
    return f"{bits:.4f} bits/byte" if math.isfinite(bits) else "bits/byte unknown: bytes per token not recorded"


def runs_table(sweeps: Sequence[Sweep]) -> str:
    """Return all runs as one table that sorts by a click on a column."""
    if not any(sweep.runs for sweep in sweeps):
        return '<p class="empty">No run has committed anything yet; each run becomes a row with its first commit.</p>'
    several = len(sweeps) > 1
    # the peak that was applied and the schedule have columns of their own
    varied = [name for name in varied_names(sweeps) if name not in ("schedule.peak_lr", "schedule.name")]
    columns = [*(["sweep"] if several else []), "run", "status", "final loss", "best loss", "peak LR", "schedule"]
    columns += [*varied, "updates", "time", "message"]
    texts = {columns.index(name) for name in ("run", "status", "schedule", "message")} | ({0} if several else set())
    messages = any(run.summary.message for sweep in sweeps for run in sweep.runs)
    if not messages:
        columns.remove("message")
        texts = {index for index in texts if index < len(columns)}
    body = []
    best = best_overall(sweeps)
    pairs = [(sweep, run) for sweep in sweeps for run in sweep.runs]
    for sweep, run in sorted(
        pairs, key=lambda pair: (not pair[1].has_result, pair[1].loss if pair[1].has_result else 0.0)
    ):
        one = run.summary
        cells: list[tuple[Any, str]] = [(sweep.name, sweep.name)] if several else []
        cells += [(run.run_id, run.run_id), (one.status, one.status)]
        cells += [(value, text.loss(value)) for value in (run.loss, one.best_loss_nats)]
        cells += [(run.peak_lr, text.lr(run.peak_lr)), (run.shape, run.shape)]
        cells += [(one.varied.get(name), text.value(one.varied.get(name))) for name in varied]
        cells += [(one.step, f"{one.step:,} / {one.num_steps:,}" if one.num_steps else f"{one.step:,}")]
        cells += [(one.elapsed_seconds, text.duration(one.elapsed_seconds))]
        cells += [(one.message, one.message)] if messages else []
        row = "".join(_cell(value, shown, index in texts, columns[index]) for index, (value, shown) in enumerate(cells))
        body.append(f"<tr{' class=best' if best is not None and run is best[1] else ''}>{row}</tr>")
    in_unit = f", in {escape(loss_unit(sweeps))}" if loss_unit(sweeps) else ""
    head = "".join(
        f'<th scope="col"{" class=text" if index in texts else ""} title="{escape(name)}">{escape(_short(name))}</th>'
        for index, name in enumerate(columns)
    )
    return (
        f'<p class="note">Click a column to sort. Losses are held-out{in_unit}; final: last evaluation.</p>'
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def variants(sweeps: Sequence[Sweep]) -> str:
    """Return what the best run's held-out loss becomes under averaged weights or shifted data; empty without any."""
    found = best_overall(sweeps)
    if found is None or not len(found[1].variants["step"]):
        return ""
    run = found[1]
    last = {str(name): k for k, name in enumerate(run.variants["variant"])}  # the last row of each name
    classes = run.summary.final_accuracy is not None

    def row(name: str, loss: float, accuracy: float | None) -> list[str]:
        shown = [name, text.loss(loss), text.signed(loss - run.loss) if loss != run.loss else "–"]
        return [*shown, f"{accuracy:.2%}"] if classes and accuracy is not None else shown

    rows = [row("as trained, held-out data", run.loss, run.summary.final_accuracy)]
    for name, k in last.items():
        rows.append(row(name, float(run.variants["loss_nats"][k]), float(run.variants["accuracy"][k])))
    unit = f" ({run.summary.loss_unit})"
    columns = ["variant", f"held-out loss{unit}", "difference", *(["predicted right"] if classes else [])]
    return f"<h3>The best run under averaged weights or shifted data</h3>{table(columns, rows, texts=(0,))}"


def cost_text(sweeps: Sequence[Sweep]) -> str:
    """Return what the sweeps cost, as a list."""
    spent = cost(sweeps)
    pairs = [
        ("Run time", f"{text.duration(spent.total_seconds)} of all runs added up"),
        ("GPU time", _gpu_time(sweeps, spent)),
        ("CPU time", f"{_hours(spent.cpu_seconds)} core-hours reserved"),
        ("Wall clock", f"{text.duration(spent.wall_seconds)} from the first record to the last"),
        ("Training", _part(spent, spent.training_seconds)),
        ("Evaluation", _part(spent, spent.eval_seconds)),
        ("Probes", _part(spent, spent.probe_seconds)),
        ("Tracking", _tracking(spent)),
        ("Computed", f"{text.si(spent.flops, 'FLOP')} in training, {text.si(spent.num_tokens)} {counted(sweeps)}"),
    ]
    if spent.training_seconds > 0 and spent.flops > 0:
        pairs.append(("Rate", f"{text.si(spent.flops / spent.training_seconds, 'FLOP/s')} a run while training"))
    return definitions(pairs)


def _gpu_time(sweeps: Sequence[Sweep], spent: Cost) -> str:
    if spent.gpu_seconds == 0:
        return "none, the runs were on CPUs"
    models = [name for sweep in sweeps for name in _table_of(sweep.meta, "hardware").get("gpus") or []]
    told = f" on {text.listing(list(dict.fromkeys(map(str, models))))}" if models else ""
    return f"{_hours(spent.gpu_seconds)} GPU-hours reserved{told}"


def _tracking(spent: Cost) -> str:
    if not spent.tracking_seconds > 0:
        return "not recorded"
    return (
        f"{text.duration(spent.tracking_seconds)} ({text.percent(spent.tracking_share)}) in which runs wrote records; "
        "the copy to MLflow is made beside them"
    )


def _hours(seconds: float) -> str:
    return text.number(seconds / 3600, 3)


def _table_of(meta: dict[str, Any], name: str) -> dict[str, Any]:
    table = meta.get(name)
    return table if isinstance(table, dict) else {}


def reproduce(sweeps: Sequence[Sweep]) -> str:
    """Return how each sweep is run again: command, seed, versions, and the whole specification."""
    out = []
    for sweep in sweeps:
        file = f"{sweep.spec.get('name', sweep.name)}.toml"
        verb = "train" if sweep.meta.get("single_run") else "sweep"
        pairs = [("Seed", text.value(sweep.meta.get("seed", sweep.spec.get("seed", 0))))]
        for term, name in (("Versions", "versions"), ("Machine", "hardware"), ("Git", "git")):
            if found := _table_of(sweep.meta, name):
                told = [f"{key} {text.value(item)}" for key, item in sorted(found.items()) if item]
                pairs.append((term, ", ".join(told)))
        if corpus := sweep.meta.get("corpus_id"):
            pairs.append(("Data", f"identity {corpus}"))
        head = f"<h3>{escape(sweep.name)}</h3>" if len(sweeps) > 1 else ""
        out.append(
            f"{head}<p>Save the specification below as <code>{escape(file)}</code>, then:</p>"
            f"<pre>landscape-ray {verb} {escape(file)}</pre>{definitions(pairs)}"
            f"<details><summary>Specification</summary><pre>{escape(sweep.spec_text)}</pre></details>"
        )
    return "".join(out)


def _asked(sweep: Sweep, several: bool) -> str:
    name = f" in {sweep.name}" if several else ""
    return f"<div><h3>What was asked{escape(name)}</h3>{definitions(asked(sweep))}</div>"


def _compared(sweeps: Sequence[Sweep]) -> str:
    """Return the best run of each sweep side by side."""
    rows, common = [], loss_unit(sweeps)
    for sweep in sweeps:
        run, spent = sweep.best, cost([sweep])
        told = (
            [
                run.run_id,
                text.loss(run.loss) + ("" if common else f" {run.summary.loss_unit}"),
                text.lr(run.peak_lr),
                run.shape,
            ]
            if run is not None
            else ["–", "–", "–", "–"]
        )
        rows.append([sweep.name, str(len(sweep.runs)), *told, text.duration(spent.total_seconds)])
    columns = [
        "sweep",
        "runs",
        "best run",
        f"final loss ({common})" if common else "final loss",
        "peak LR",
        "schedule",
        "run time",
    ]
    return f"<h3>Best of each sweep</h3>{table(columns, rows, texts=(0, 2, 5))}"


def _forecast_tile(sweep: Sweep) -> str:
    assert sweep.fit is not None
    one = sweep.fit.headline_forecast
    shape = sweep.fit.shapes.get(one.run_id, one.run_id)
    inside = "inside" if one.low <= one.observed_final <= one.high else "outside"
    more = f"{text.loss(one.predicted_final)} forecast, {text.loss(one.observed_final)} measured: {inside} the interval"
    return tile(f"Forecast error, unseen {shape}", *_parted(text.percent(abs(one.relative_error))), more)


def _short(name: str) -> str:
    """Return the last part of a dotted name, as words."""
    return name.rpartition(".")[2].replace("_", " ")


def _shape_words(shape: str) -> str:
    return "a schedule found by the population" if shape == "population" else f"{shape} schedule"


def _share_of_probes(spent: Cost) -> str:
    return f"probes took {text.percent(spent.probe_share)}" if math.isfinite(spent.probe_share) else ""


def _part(spent: Cost, seconds: float) -> str:
    share = f" ({text.percent(seconds / spent.total_seconds)})" if spent.total_seconds > 0 else ""
    return f"{text.duration(seconds)}{share}"


def _parted(written: str) -> tuple[str, str]:
    """Return a quantity as (number, unit) where it has one unit, else whole."""
    parts = written.split(" ")
    return (parts[0], parts[1]) if len(parts) == 2 and parts[0] != "<" else (written, "")


def _cell(value: Any, shown: str, is_text: bool, column: str) -> str:
    missing = value is None or (isinstance(value, float) and not math.isfinite(value))
    kinds = [*(["text"] if is_text else []), *(["wrap"] if column == "message" else [])]
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    sort_by = "" if missing else str(int(value)) if isinstance(value, bool) else str(value)
    return f'<td{kind} data-value="{escape(sort_by)}">{escape(shown)}</td>'


def _day(stamp: Any) -> str:
    if not isinstance(stamp, int | float) or not math.isfinite(stamp):
        return ""
    return datetime.fromtimestamp(float(stamp), tz=UTC).strftime("%-d %B %Y")
