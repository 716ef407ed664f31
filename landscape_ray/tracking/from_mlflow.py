"""An MLflow experiment back to rows: the Parquet copy where there is one, else metric histories under our keys."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from landscape_ray.config import with_values
from landscape_ray.errors import UserError
from landscape_ray.records import RunSummary
from landscape_ray.tracking import parent, server
from landscape_ray.tracking.collected import Collected, summarize
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.histories import read_points
from landscape_ray.tracking.parts import ARROW_SCHEMA
from landscape_ray.tracking.uris import mask_secrets

Route = Literal["auto", "parquet", "bulk", "history"]
"""Where rows come from: Parquet, the store's bulk interface, or one request for each run and metric. `auto` takes for
each sweep the first of them that has everything."""

_STEP_METRICS = {
    "train/loss_nats": "loss_nats",
    "train/lr": "lr",
    "train/grad_norm": "grad_norm",
}
_PROGRESS = {
    "progress/num_tokens": "num_tokens",
    "progress/flops": "flops",
    "progress/elapsed_seconds": "elapsed_seconds",
}
_EVAL_METRIC = re.compile(r"eval(_(?P<variant>[^/]+))?/(?P<column>loss_nats|accuracy)")
_PROBE_PREFIX = "probe/"
_ERROR_SUFFIX = "_standard_error"
_KINDS = ("step", "eval", "variant", "probe")
"""In the order in which rows of one moment stand."""
_COLUMNS: Final = ("loss_nats", "lr", "grad_norm", "accuracy", "value", "standard_error")


def read_experiment(tracking_uri: str, experiment: str, route: Route = "auto") -> Collected:
    """Return all runs of an experiment that hold our metrics; see `collect_mlflow`."""
    server.check_server(tracking_uri)
    with server.bounded_http(30.0, max_retries=2):
        client = server.open_client(tracking_uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            valid = ", ".join(sorted(each.name for each in client.search_experiments()))
            raise UserError(
                f"experiment must exist in {mask_secrets(tracking_uri)}, got '{experiment}'; there are: {valid}"
            )
        everything = server.find_runs(client, found.experiment_id)
        names, runs = _named([run for run in everything if _is_ours(run)])
        copies = _copies(client, everything, runs) if route in ("auto", "parquet") else {}
        rest = [index for index, run in enumerate(runs) if run.data.tags.get(server.SWEEP_ID) not in copies]
        if route == "parquet":
            rest = []
        points = read_points(client, tracking_uri, [runs[index] for index in rest], bulk=route != "history")
    tables, summaries, warnings = [], {}, []
    for sweep_id, copy in copies.items():
        renamed = {
            run.data.tags[server.TRIAL_ID]: name
            for name, run in zip(names, runs, strict=True)
            if run.data.tags.get(server.SWEEP_ID) == sweep_id and server.TRIAL_ID in run.data.tags
        }
        tables.append(_rename(copy.records, renamed))
        for summary in copy.runs:
            name = renamed.get(summary.run_id, summary.run_id)
            summaries[name] = dataclasses.replace(summary, run_id=name)
        warnings += copy.warnings
    table, counts = _rows(points, [runs[index] for index in rest], [names[index] for index in rest])
    for index, stop, count in zip(rest, np.cumsum(counts).tolist(), counts.tolist(), strict=True):
        run = runs[index]
        summaries[names[index]] = _summary(run, names[index], table.slice(stop - count, count))
        if server.SUMMARY in run.data.tags and _noted(run) is None:
            warnings.append(f"run {run.info.run_id}: its summary is damaged; rebuilt from its rows")
    return Collected(pa.concat_tables([*tables, table]), [summaries[name] for name in sorted(summaries)], warnings)


def _copies(client: MlflowClient, everything: Sequence[Run], runs: Sequence[Run]) -> dict[str, Collected]:
    """Return for each sweep whose Parquet files are at hand what they hold: its folder here, else the artifact.

    The artifact was made when the sweep ended. It counts only if the runs hold no more than it.
    """
    from landscape_ray.tracking.collect import collect  # which reads folders, and experiments through this module

    copies = {}
    for sweep in everything:
        tags = sweep.data.tags
        sweep_id = tags.get(server.SWEEP_ID, "")
        if tags.get(server.KIND) != "sweep" or sweep_id in copies:
            continue
        with contextlib.suppress(UserError, ValueError, OSError):
            path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(tags[server.FOLDER]).path))
            folder = SweepFolder.open(path)
            if folder.meta["sweep_id"] == sweep_id:
                copies[sweep_id] = collect(folder)
                continue
        if parent.RECORDS not in tags.get(server.ARTIFACTS, ""):
            continue
        with contextlib.suppress(MlflowException, OSError, ValueError), tempfile.TemporaryDirectory() as temporary:
            file = client.download_artifacts(sweep.info.run_id, parent.RECORDS, temporary)
            table, summaries, counts = parent.read_records(Path(file))
            ours = [run.data.tags for run in runs if run.data.tags.get(server.SWEEP_ID) == sweep_id]
            if {each[server.TRIAL_ID]: int(each.get(server.NUM_PARTS, "-1")) for each in ours} == counts:
                copies[sweep_id] = Collected(table, summaries, [])
    return copies


def _rename(table: pa.Table, names: dict[str, str]) -> pa.Table:
    """Return the table with other names of runs."""
    if all(old == new for old, new in names.items()):
        return table
    encoded = table["run_id"].combine_chunks().dictionary_encode()
    renamed = pa.array([names.get(name, name) for name in encoded.dictionary.to_pylist()], pa.string())
    return table.set_column(0, ARROW_SCHEMA.field("run_id"), renamed.take(encoded.indices))


def _is_ours(run: Run) -> bool:
    if server.KIND in run.data.tags:
        return bool(run.data.tags[server.KIND] == "trial")
    return any(_EVAL_METRIC.fullmatch(key) or key in _STEP_METRICS for key in run.data.metrics)


def _named(runs: list[Run]) -> tuple[list[str], list[Run]]:
    """Return a name for each run, and the runs, sorted by name.

    The name is the trial's identifier, with the sweep's in front where there are several sweeps.
    """
    several = len({run.data.tags.get(server.SWEEP_ID) for run in runs}) > 1
    named = {}
    for run in runs:
        trial_id = run.data.tags.get(server.TRIAL_ID)
        sweep_id = run.data.tags.get(server.SWEEP_ID, "")
        named[run.info.run_id if trial_id is None else f"{sweep_id[:8]}/{trial_id}" if several else trial_id] = run
    return sorted(named), [named[name] for name in sorted(named)]


def _targets(run: Run) -> dict[str, tuple[int, str, str]]:
    """Return for each metric of ours: number of the kind of row, which variant or probe, and the column."""
    probes = {key.removeprefix(_PROBE_PREFIX) for key in run.data.metrics if key.startswith(_PROBE_PREFIX)}
    targets = {}
    for key in run.data.metrics:
        if key in _STEP_METRICS:
            targets[key] = (0, "", _STEP_METRICS[key])
        elif match := _EVAL_METRIC.fullmatch(key):
            targets[key] = (2 if match["variant"] else 1, match["variant"] or "", match["column"])
        elif key.startswith(_PROBE_PREFIX):
            probe = key.removeprefix(_PROBE_PREFIX)
            # `x_standard_error` belongs to x, unless there is no such probe.
            owner = probe.removesuffix(_ERROR_SUFFIX)
            is_value = owner == probe or owner not in probes
            targets[key] = (3, probe, "value") if is_value else (3, owner, "standard_error")
    return targets


def _rows(points: pa.Table, runs: Sequence[Run], names: Sequence[str]) -> tuple[pa.Table, NDArray[np.int64]]:
    """Return points as rows: those of one run, moment, step, kind and variant or probe are one row, in order of time.

    The rows of a run stand together, in the order of the runs; beside them their number for each run. All of it on
    whole columns: an experiment has millions of points.
    """
    keys = points["key"].combine_chunks().dictionary_encode()
    known = {key: index for index, key in enumerate(keys.dictionary.to_pylist())}
    which: list[str] = sorted({target[1] for run in runs for target in _targets(run).values()})
    # For each run and metric: kind, variant or probe, column; -1 where it is no metric of ours.
    lookup = np.full((3, max(1, len(runs) * len(known))), -1, dtype=np.int64)
    for number, run in enumerate(runs):
        for metric, (group, owner, into) in _targets(run).items():
            if metric in known:
                lookup[:, number * len(known) + known[metric]] = (group, which.index(owner), _COLUMNS.index(into))
    run_of, step, time_ms = (points[name].to_numpy() for name in ("run", "step", "timestamp"))
    values, key_of = points["value"].to_numpy(), np.asarray(keys.indices)
    kind, name_of, column_of = lookup[:, run_of * len(known) + key_of]
    ours = kind >= 0
    order = np.lexsort((name_of[ours], kind[ours], step[ours], time_ms[ours], run_of[ours]))
    chosen = np.flatnonzero(ours)[order]
    parts = np.stack([array[chosen] for array in (run_of, time_ms, step, kind, name_of)])
    starts = np.ones(len(chosen), dtype=bool)
    starts[1:] = (np.diff(parts, axis=1) != 0).any(axis=0)
    row_of = np.cumsum(starts) - 1
    run_of_row, time_of_row, step_of_row, kind_of_row, name_of_row = parts[:, starts]
    length = len(run_of_row)

    def column(name: str) -> pa.Array:
        here = column_of[chosen] == _COLUMNS.index(name)
        array, missing = np.zeros(length), np.ones(length, dtype=bool)
        array[row_of[here]], missing[row_of[here]] = values[chosen[here]], False
        return pa.array(array, mask=missing, from_pandas=False)

    def text(wanted: int) -> pa.Array:
        indices = pa.array(np.where(kind_of_row == wanted, name_of_row, 0), mask=kind_of_row != wanted)
        return pa.array(which or [""], pa.string()).take(indices)

    found: dict[str, pa.Array] = {name: column(name) for name in _COLUMNS}
    found |= {"run_id": pa.array(list(names) or [""], pa.string()).take(pa.array(run_of_row))}
    found |= {"kind": pa.array(_KINDS).take(pa.array(kind_of_row))}
    found |= {"step": pa.array(step_of_row), "time_unix": pa.array(time_of_row / 1000)}
    found |= {"variant": text(2), "probe": text(3)}
    for metric, name in _PROGRESS.items():
        here = key_of == known.get(metric, -1)
        # seconds pass between an update and its evaluation; tokens and FLOPs are those of the step
        exact = name == "elapsed_seconds"
        there = [run_of[here], step[here], time_ms[here]] if exact else [run_of[here], step[here]]
        asked = [run_of_row, step_of_row, time_of_row] if exact else [run_of_row, step_of_row]
        found[name] = _looked_up(there, values[here], asked).cast(ARROW_SCHEMA.field(name).type)
    nothing = pa.nulls(length)
    arrays = [found.get(field.name, nothing).cast(field.type) for field in ARROW_SCHEMA]
    table = pa.Table.from_arrays(arrays, schema=ARROW_SCHEMA)
    return table, np.bincount(run_of_row, minlength=len(runs)).astype(np.int64)


def _looked_up(there: list[NDArray[Any]], values: NDArray[np.float64], asked: list[NDArray[Any]]) -> pa.Array:
    """Return the value of the last equal key for each key that is asked for, null where there is none.

    Args:
        there: the fields of the keys that have a value.
        values: for each of them.
        asked: the fields of the keys that are asked for.
    """
    fields = np.stack([np.concatenate(pair) for pair in zip(there, asked, strict=True)])
    is_asked = np.arange(fields.shape[1]) >= len(values)
    order = np.lexsort((is_asked, *fields[::-1]))
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (np.diff(fields[:, order], axis=1) != 0).any(axis=0)
    position = np.arange(len(order))
    begin = np.maximum.accumulate(np.where(begins, position, 0))
    last = np.maximum.accumulate(np.where(is_asked[order], -1, position))
    source = np.empty(len(order), dtype=np.int64)
    source[order] = np.where(last >= begin, order[np.maximum(last, 0)], -1)
    source = source[len(values) :]
    if len(values) == 0:
        return pa.nulls(len(source), pa.float64())
    return pa.array(values[np.maximum(source, 0)], mask=source < 0, from_pandas=False)


def _config(run: Run) -> dict[str, Any]:
    """Return the run's parameters, nested; as they are where they don't nest (foreign `model` beside `model.depth`)."""
    params = {key: server.decode_value(text) for key, text in run.data.params.items()}
    try:
        return with_values({}, params)
    except UserError:
        return params


def _noted(run: Run) -> dict[str, Any] | None:
    """Return the summary that the projector left on the run, None without one that can be read."""
    names = {field.name for field in dataclasses.fields(RunSummary)} - {"run_id", "config"}
    try:
        content = json.loads(run.data.tags[server.SUMMARY])
        noted = {key: value for key, value in content.items() if key in names}
    except (KeyError, ValueError, AttributeError):
        return None
    return noted if {"status", "varied"} <= noted.keys() else None


def _summary(run: Run, name: str, rows: pa.Table) -> RunSummary:
    noted = _noted(run)
    if noted is not None:
        return RunSummary(run_id=name, config=_config(run), **noted)
    return summarize(rows, name, {"config": _config(run)})
