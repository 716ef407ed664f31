"""What the sweep's own run shows, all of it made from the sweep folder, so that any machine can make it again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from landscape_ray.errors import UserError
from landscape_ray.records import TERMINAL_STATUSES, RunSummary
from landscape_ray.tracking import server
from landscape_ray.tracking.folder import Commit, SweepFolder
from landscape_ray.tracking.parts import ARROW_SCHEMA, WRITE_OPTIONS, read_part
from landscape_ray.tracking.pieces import Kept, Pieces
from landscape_ray.tracking.points import EVENT_COLUMNS, to_event
from landscape_ray.tracking.uris import mask_secrets, masked

RECORDS = "records.parquet"
"""Artifact with all rows of a sweep that has ended, and its summaries in the metadata."""

MAX_RECORDS_BYTES = 2**30
"""Parts larger than this together stay in the sweep folder: copying them would take longer than it is worth."""

_SUMMARIES_KEY = b"landscape_ray.summaries"
_PARTS_KEY = b"landscape_ray.num_parts"
_ROW_GROUP = 100_000
_EVENT_COLUMNS = ["run_id", "kind", *EVENT_COLUMNS]
_SETTLED = ("finished", "incomplete")
"""Statuses of a sweep whose driver has ended by itself."""


@dataclasses.dataclass(frozen=True, slots=True)
class Artifact:
    """A file of the sweep's run."""

    name: str
    made_of: str
    """Changes when the content would."""
    write: Callable[[Path], None]
    """Writes the file."""


def environment(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return where and how the sweep was launched, from sweep.json: versions, machine, git state, seed, budget."""
    names = ("sweep_id", "name", "created_unix", "seed", "num_trials", "spec_id", "corpus_id")
    known = {name: meta[name] for name in names if name in meta}
    return known | {name: meta[name] for name in ("versions", "hardware", "git", "packages") if name in meta}


def spec_params(folder: SweepFolder) -> dict[str, str]:
    """Return the specification as parameters; none where it isn't TOML, which is not ours to judge here."""
    with contextlib.suppress(tomllib.TOMLDecodeError):
        return server.to_params(tomllib.loads(folder.spec_text))
    return {}


def data_table(folder: SweepFolder) -> dict[str, Any]:
    """Return the table [train.data] of the specification; empty where there is none."""
    with contextlib.suppress(tomllib.TOMLDecodeError, AttributeError):
        return dict(tomllib.loads(folder.spec_text).get("train", {}).get("data", {}))
    return {}


def commits_of(folder: SweepFolder) -> dict[str, Commit]:
    """Return what trials have committed, by identifier, as far as it can be read."""
    found = {}
    for trial in folder.trials():
        with contextlib.suppress(UserError):  # damaged: named where its rows are sent
            if (commit := trial.read()) is not None:
                found[trial.trial_id] = commit
    return found


def sweep_metrics(commits: Mapping[str, Commit]) -> dict[str, float]:
    """Return what a sweep's trials came to: how they ended, what they cost, the lowest loss."""
    ended = [commit.summary for commit in commits.values()]
    values: dict[str, float] = {f"sweep/num_{status}": 0.0 for status in sorted(TERMINAL_STATUSES)}
    for summary in ended:
        if summary.status in TERMINAL_STATUSES:
            values[f"sweep/num_{summary.status}"] += 1
    losses = [s.final_loss_nats for s in ended if s.status == "finished" and math.isfinite(s.final_loss_nats)]
    values["sweep/best_loss_nats"] = min(losses, default=math.nan)
    for name in ("num_tokens", "flops", "elapsed_seconds", "eval_seconds", "probe_seconds"):
        values[f"sweep/{name}"] = float(sum(getattr(summary, name) for summary in ended))
    spent = values["sweep/elapsed_seconds"]
    values["sweep/probe_share"] = values["sweep/probe_seconds"] / spent if spent > 0 else math.nan
    return {key: value for key, value in values.items() if math.isfinite(value)}


def artifacts(
    folder: SweepFolder, commits: Mapping[str, Commit] | None = None, pieces: Pieces | None = None
) -> Iterator[Artifact]:
    """Yield the files that the sweep's run should have now.

    Args:
        folder: the sweep.
        commits: of all trials, at the end of the sweep: then also the files that are made of the whole of it.
        pieces: rows that were read already.
    """
    yield _copy(folder.spec_path, mask=True)
    made = environment(folder.meta)
    text = json.dumps(made, sort_keys=True, default=str)
    yield Artifact("environment.json", _hash(text), lambda path: _write_json(path, made))
    if folder.report_path.is_file():
        yield _copy(folder.report_path)
    if commits is None:
        return
    state = _hash(json.dumps([(name, commit.num_parts, commit.num_rewinds) for name, commit in commits.items()]))
    sizes = [path.stat().st_size for path in folder.trials_path.glob("*/records/part-*.parquet")]
    if sizes and folder.meta.get("status") in _SETTLED and sum(sizes) <= MAX_RECORDS_BYTES:
        yield Artifact(RECORDS, state, lambda path: write_records(folder, commits, path, pieces))
    # all rows in one file are read in a fraction of the time that the parts take
    yield Artifact(
        "events.json", state, lambda path: _write_json(path, list(_events(folder, commits, path.parent / RECORDS)))
    )
    yield Artifact("checkpoints.json", state, lambda path: _write_json(path, checkpoints(folder, commits)))


def checkpoints(folder: SweepFolder, commits: Mapping[str, Commit]) -> list[dict[str, Any]]:
    """Return the last checkpoint of each trial, by reference: where it is, how large, and of which update."""
    found = []
    for name, commit in commits.items():
        for path in sorted(folder.trial(name).checkpoint_path.glob("*")):
            if path.is_file() and not path.name.startswith("."):
                place = {"path": str(path.relative_to(folder.path)), "uri": path.as_uri()}
                found.append({"run_id": name, "step": commit.summary.step, **place, "bytes": path.stat().st_size})
    return found


def write_records(folder: SweepFolder, commits: Mapping[str, Commit], path: Path, pieces: Pieces | None = None) -> None:
    """Write all committed rows of a sweep as one Parquet file, in memory for a few row groups; summaries beside them.

    Damaged parts are left out, as everywhere.
    """
    names = [field.name for field in dataclasses.fields(RunSummary)]
    rows = [{name: getattr(commit.summary, name) for name in names} for commit in commits.values()]
    counts = {name: commit.num_parts for name, commit in commits.items()}
    metadata = {**(ARROW_SCHEMA.metadata or {}), _SUMMARIES_KEY: json.dumps(masked(rows), default=str).encode()}
    metadata[_PARTS_KEY] = json.dumps(counts).encode()
    with pq.ParquetWriter(path, ARROW_SCHEMA.with_metadata(metadata), **WRITE_OPTIONS) as writer:
        waiting: list[pa.Table] = []
        num_rows = 0
        for table in _parts(folder, commits, pieces.take() if pieces is not None else {}):
            waiting.append(table)
            num_rows += len(table)
            if num_rows >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting).replace_schema_metadata(metadata))
                waiting, num_rows = [], 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting).replace_schema_metadata(metadata))


def read_records(path: Path) -> tuple[pa.Table, list[RunSummary], dict[str, int]]:
    """Return what :func:`write_records` wrote: rows, summaries, and the number of parts of each trial.

    Raises:
        ValueError: another kind of file.
    """
    table = pq.read_table(path)
    metadata = table.schema.metadata or {}
    if _SUMMARIES_KEY not in metadata or _PARTS_KEY not in metadata:
        raise ValueError(f"{RECORDS} must hold the summaries of its runs; it was not written by a projector")
    names = {field.name for field in dataclasses.fields(RunSummary)}
    runs = [
        RunSummary(**{key: value for key, value in each.items() if key in names})
        for each in json.loads(metadata[_SUMMARIES_KEY])
    ]
    return table.replace_schema_metadata(ARROW_SCHEMA.metadata), runs, json.loads(metadata[_PARTS_KEY])


def _parts(
    folder: SweepFolder, commits: Mapping[str, Commit], kept: Mapping[str, Kept] = MappingProxyType({})
) -> Iterator[pa.Table]:
    """Yield the rows of trials; what is kept of their first parts is not read again."""
    for name, commit in commits.items():
        known, begin = kept.get(name), 0
        if known is not None and known.num_rewinds == commit.num_rewinds and known.num_parts <= commit.num_parts:
            yield known.read()
            begin = known.num_parts
        trial = folder.trial(name)
        for index in range(begin, commit.num_parts):
            with contextlib.suppress(UserError, OSError):
                yield read_part(trial.part_path(index))


def _events(folder: SweepFolder, commits: Mapping[str, Commit], records: Path) -> Iterator[dict[str, Any]]:
    """Yield every event of every trial: who copied whom, when, and what changed - the lineage of the sweep.

    Args:
        folder: the sweep.
        commits: of its trials.
        records: the file with all rows; where there is none, the parts are read.
    """
    if records.exists():
        with pq.ParquetFile(records) as file:
            for batch in file.iter_batches(columns=_EVENT_COLUMNS, use_threads=False):
                yield from _events_in(pa.Table.from_batches([batch]))
        return
    for table in _parts(folder, commits):
        yield from _events_in(table)


def _events_in(table: pa.Table) -> Iterator[dict[str, Any]]:
    for row in table.filter(pc.equal(table["kind"], "event")).to_pylist():
        yield {"run_id": row["run_id"], **to_event(row)}


def _copy(path: Path, mask: bool = False) -> Artifact:
    """Return a file as it is, or with the passwords inside addresses masked."""

    def write(to: Path) -> None:
        if mask:
            to.write_text(mask_secrets(path.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            to.write_bytes(path.read_bytes())

    return Artifact(path.name, stamp(path), write)


def stamp(path: Path) -> str:
    """Return what changes when a file is written anew."""
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_json(path: Path, content: Any) -> None:
    """Write a JSON file with the secrets in its texts masked."""
    path.write_text(json.dumps(masked(content), indent=1, default=str), encoding="utf-8")
