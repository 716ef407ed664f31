"""One row a run: the table that scaling laws are fitted to, from a sweep, an MLflow experiment, or a foreign file.

Columns bear the names of the laws: N parameters, D training tokens, C training FLOPs, lr peak learning rate, batch
tokens an update, steps updates, loss final held-out loss. Any two of N, D and C give the third (C = 6 N D); where all
three are there, they are held against each other. What is left out is named with its reason.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.analysis.setup_facts import mutated_items, setup_items
from landscape_ray.config import flatten
from landscape_ray.errors import UserError
from landscape_ray.laws.core.law import Law
from landscape_ray.laws.core.points import Points
from landscape_ray.laws.trust.checklist import Item
from landscape_ray.registry import suggest
from landscape_ray.text import listing

if TYPE_CHECKING:
    from landscape_ray.tracking.collect import Collected

Array: TypeAlias = NDArray[np.float64]

Count: TypeAlias = Literal["all", "non_embedding"]

MEANINGS = {
    "N": "parameters",
    "D": "training tokens",
    "C": "training FLOPs",
    "lr": "peak learning rate",
    "batch": "tokens an update",
    "batch_size": "examples (sequences) an update",
    "steps": "updates",
    "loss": "final held-out loss",
    "run": "name of the run",
}

MAX_MISMATCH = 0.02
"""Relative difference between C and 6 N D from which on they count as counted differently."""

_MAP = re.compile(r"(?P<column>.+?)(\*(?P<factor>[0-9.]+(e[+-]?[0-9]+)?))?")
_CONDITION = re.compile(r"\s*(?P<column>.+?)\s*(?P<operator><=|>=|==|!=|<|>)\s*(?P<value>\S+)\s*")
_FEW = 3


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RunTable:
    """Runs and their numbers.

    Attributes:
        run_ids: (n,) name of every run.
        columns: (n,) by name; nan where a run has no such number.
        dropped: run to the reason why it is not in the table.
        facts: what is known of how the runs were made, for the record of a fit.
        source: where they come from, as a person would say it.
        configs: configuration of every run, flat; none for a foreign table.
    """

    run_ids: tuple[str, ...]
    columns: dict[str, Array]
    dropped: dict[str, str]
    facts: tuple[Item, ...]
    source: str
    configs: tuple[dict[str, Any], ...] = ()

    @property
    def varied(self) -> tuple[str, ...]:
        """Names of what differs between the configurations of the runs, sorted; none for a foreign table."""
        names = {name for config in self.configs for name in config}
        return tuple(sorted(n for n in names if len({str(config.get(n)) for config in self.configs}) > 1))

    def column(self, name: str, law: str, meaning: str = "") -> Array:
        """Return a column that a law needs; `meaning` is what it stands for there, where that is not the usual.

        Raises:
            UserError: there is none.
        """
        if name not in self.columns:
            raise UserError(
                f"column '{name}' ({meaning or MEANINGS[name]}) must be there for law '{law}'; map it with "
                f"--column {name}=NAME; there: {', '.join(self.columns) or 'none'}"
            )
        return self.columns[name]

    def points(self, law: Law) -> tuple[Points, dict[str, str]]:
        """Return the points of a law, and the runs without one with the reason.

        Raises:
            UserError: a column that the law needs is missing, or no run has all of them.
        """
        needed = [*(variable.name for variable in law.variables), law.response.name]
        complete = np.all([np.isfinite(self.column(name, law.name, _meaning(law, name))) for name in needed], axis=0)
        without = {
            run: f"{next(n for n in needed if not np.isfinite(self.columns[n][i]))} is missing or not finite"
            for i, run in enumerate(self.run_ids)
            if not complete[i]
        }
        if not complete.any():
            raise UserError(f"no run has all of {', '.join(needed)}; {listing(list(without.values())[:_FEW])}")
        index = np.flatnonzero(complete)
        variables = {name: values[index] for name, values in self.columns.items() if np.isfinite(values[index]).all()}
        variables.pop(law.response.name, None)
        names = [self.run_ids[i] for i in index]
        return Points(variables, self.columns[law.response.name][index], names), without

    def to_csv(self) -> str:
        """Return the table as CSV text with every digit, so that it can travel with a fit."""
        names = list(self.columns)
        lines = [",".join(["run", *names])]
        for i, run in enumerate(self.run_ids):
            quoted = '"' + run.replace('"', '""') + '"' if any(c in run for c in ',"\n') else run
            lines.append(",".join([quoted, *(repr(float(self.columns[name][i])) for name in names)]))
        return "\n".join(lines) + "\n"


def read_table(path: Path | str, columns: Mapping[str, str] | None = None, where: Sequence[str] = ()) -> RunTable:
    """Return a foreign CSV (also .csv.gz) or Parquet file, one line a run or point, as a table of runs.

    Args:
        path: the file.
        columns: our name -> the file's column, perhaps times a factor for its unit: {"N": "params_m*1e6"}. Columns of
            the file that bear our names need no entry. Other names than ours are variables of laws.
        where: conditions `column operator number` on columns of the file or ours, all of which a line has to meet;
            what does not is dropped, and said.

    Raises:
        UserError: no such file, not a table, or a column, factor or condition that cannot be read.
    """
    from landscape_ray.tracking.foreign import read_columns  # pyarrow is needed here only

    path = Path(path)
    available = read_columns(path)
    mapping = {name: name for name in MEANINGS if name in available} | dict(columns or {})
    found: dict[str, Array] = {}
    names: list[str] | None = None
    units = []
    for name, expression in mapping.items():
        column, factor = _mapped(expression, available, path, name)
        if name == "run":
            names = [str(value) for value in available[column]]
            continue
        found[name] = factor * _numbers(available[column], column, path)
        units.append(f"{name} from '{column}'{f' times {factor:g}' if factor != 1 else ''}")
    if not found:
        raise UserError(f"columns must map a number, got none; {path} has: {', '.join(available)}; use N=NAME")
    count = len(next(iter(found.values())))
    runs = names if names is not None else [str(i + 1) for i in range(count)]
    kept = np.ones(count, dtype=bool)
    dropped: dict[str, str] = {}
    for condition in where:
        met = _meets(condition, available, found, path)
        for i in np.flatnonzero(kept & ~met):
            dropped[runs[i]] = f"does not meet {condition.strip()}"
        kept &= met
    index = np.flatnonzero(kept)
    if not len(index):
        raise UserError(f"where must leave a line of {path}, got none that meets {' and '.join(where)}; relax it")
    facts = [
        Item("B", "columns", "; ".join(units)),
        Item(
            "B",
            "training set-up",
            "unknown",
            "unknown",
            "a table does not say how its runs were made: optimizer, schedule, batch, tokenizer, seeds",
        ),
        _dropped_item(dropped, count),
    ]
    columns_found = {name: values[index] for name, values in found.items()}
    facts += complete_compute(columns_found)
    run_ids = tuple(runs[i] for i in index)
    return RunTable(run_ids=run_ids, columns=columns_found, dropped=dropped, facts=tuple(facts), source=path.name)


def table_of(collected: Collected, source: str, *, count: Count = "all") -> RunTable:
    """Return the finished runs of a sweep or an experiment, one row each.

    Searched values are columns of their own, under their dotted names, as are probes' last values (`probe.sharpness`).

    Args:
        collected: what was read.
        source: where from, as a person would say it.
        count: which parameters N counts.

    Raises:
        UserError: no run finished.
    """
    from landscape_ray.analysis.runs import read_runs

    rows: list[dict[str, float]] = []
    names: list[str] = []
    dropped: dict[str, str] = {}
    configs: list[dict[str, Any]] = []
    mutated = 0
    for run in read_runs(collected):
        summary = run.summary
        if not run.has_result:
            dropped[run.run_id] = f"the run is {summary.status}" if summary.status != "finished" else "it has no loss"
            continue
        tokens_per_step = summary.num_tokens / summary.step if summary.step else math.nan
        row = {
            "N": float(summary.num_params if count == "all" else summary.num_params_non_embedding) or math.nan,
            "D": float(summary.num_tokens) or math.nan,
            "C": float(summary.flops) or math.nan,
            "lr": run.peak_lr,
            "batch": tokens_per_step,
            "batch_size": float(summary.config.get("batch_size", math.nan)),
            "steps": float(summary.step),
            "loss": run.loss,
            "seconds": summary.elapsed_seconds - summary.probe_seconds - summary.eval_seconds,
        }
        for key, value in summary.varied.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                row[key] = float(value)
        for probe in dict.fromkeys(str(name) for name in run.probes["probe"]):
            values = np.asarray(run.probe(probe)["value"], dtype=np.float64)
            row[f"probe.{probe}"] = float(values[-1])
        rows.append(row)
        names.append(run.run_id)
        configs.append(flatten(summary.config))
        mutated += run.mutated
    if not rows:
        why = listing([f"{run}: {reason}" for run, reason in list(dropped.items())[:_FEW]]) or "there are no runs"
        raise UserError(f"{source} must hold a finished run, got none ({why}); finish some runs first")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = {key: np.array([row.get(key, math.nan) for row in rows]) for key in keys}
    facts = [
        Item("B", "N counts", "all parameters" if count == "all" else "parameters without embeddings and head"),
        Item("B", "C counts", "exact training FLOPs of the model, evaluations and probes left out"),
        *setup_items(configs, columns),
        *mutated_items(mutated, len(rows)),
        _dropped_item(dropped, len(rows) + len(dropped)),
        Item("C", "points", "one a run: its last evaluation; nothing was smoothed"),
        *(Item("C", "could not be read", warning, "warning", "its rows are missing") for warning in collected.warnings),
        *complete_compute(columns),
    ]
    return RunTable(
        run_ids=tuple(names),
        columns=columns,
        dropped=dropped,
        facts=tuple(facts),
        source=source,
        configs=tuple(configs),
    )


def joined(tables: Sequence[RunTable], names: Sequence[str]) -> RunTable:
    """Return several tables as one; where there are several, runs bear the name of theirs in front.

    Args:
        tables: one or more.
        names: of the tables.
    """
    if len(tables) == 1:
        return tables[0]
    keys = list(dict.fromkeys(key for table in tables for key in table.columns))
    columns = {
        key: np.concatenate([t.columns.get(key, np.full(len(t.run_ids), math.nan)) for t in tables]) for key in keys
    }
    pairs = list(zip(tables, names, strict=True))
    return RunTable(
        run_ids=tuple(f"{name}/{run}" for table, name in pairs for run in table.run_ids),
        columns=columns,
        dropped={f"{name}/{run}": why for table, name in pairs for run, why in table.dropped.items()},
        facts=tuple(dataclasses.replace(item, name=f"{item.name} of {n}") for t, n in pairs for item in t.facts),
        source=listing([table.source for table in tables]),
        configs=tuple(config for table in tables for config in table.configs),
    )


def complete_compute(columns: dict[str, Array]) -> list[Item]:
    """Fill in the one of N, D and C that is missing, in place; return what was done or found, for the record."""
    have = [name for name in ("N", "D", "C") if name in columns]
    if len(have) == 2:
        if "C" not in columns:
            columns["C"] = 6 * columns["N"] * columns["D"]
        elif "D" not in columns:
            columns["D"] = columns["C"] / (6 * columns["N"])
        else:
            columns["N"] = columns["C"] / (6 * columns["D"])
        missing = next(name for name in ("N", "D", "C") if name not in have)
        return [Item("B", f"{missing} was computed", "C = 6 N D")]
    if len(have) == 3:
        ratio = columns["C"] / (6 * columns["N"] * columns["D"])
        known = ratio[np.isfinite(ratio)]
        if len(known):
            worst = float(known[np.argmax(np.abs(np.log(known)))])
            off = abs(worst - 1) > MAX_MISMATCH
            return [
                Item(
                    "B",
                    "C over 6 N D",
                    f"{known.min():.3f} to {known.max():.3f}",
                    "warning" if off else "ok",
                    f"more than {MAX_MISMATCH:.0%} apart: attention, embeddings or the head are counted in one and not "
                    "in the other; exponents of N depend on it"
                    if off
                    else "",
                )
            ]
    return []


def _dropped_item(dropped: Mapping[str, str], count: int) -> Item:
    if not dropped:
        return Item("C", "left out", f"none of {count}")
    reasons: dict[str, int] = {}
    for reason in dropped.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return Item("C", "left out", f"{len(dropped)} of {count}: " + "; ".join(f"{n} {why}" for why, n in reasons.items()))


def _mapped(expression: str, available: Mapping[str, Any], path: Path, name: str) -> tuple[str, float]:
    """Return the file's column and the factor of an expression such as `tokens_b*1e9`."""
    if expression in available:  # whatever it contains
        return expression, 1.0
    match = _MAP.fullmatch(expression.strip())
    column = match["column"].strip() if match else expression
    if match is None or column not in available:
        raise UserError(f"column {name}: {path} has no column '{column}'; {suggest(column, available)}")
    return column, float(match["factor"] or 1.0)


def _numbers(values: Any, column: str, path: Path) -> Array:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"column '{column}' of {path} must hold numbers, got {values[0]!r}; map another one") from None


def _meets(condition: str, available: Mapping[str, Any], found: Mapping[str, Array], path: Path) -> NDArray[np.bool_]:
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise UserError(f"where must be `column operator value` with <, <=, >, >=, == or !=, got '{condition}'")
    name, wanted = match["column"], match["value"]
    if name not in found and name not in available:
        raise UserError(f"where: no column '{name}' in {path}; {suggest(name, [*found, *available])}")
    column = found[name] if name in found else np.asarray(available[name])
    try:
        number: Any = float(wanted)
        column = np.asarray(column, dtype=np.float64)
    except ValueError:
        number, column = wanted.strip("'\""), np.asarray(column).astype(str)
        if match["operator"] not in ("==", "!="):
            raise UserError(
                f"where: '{condition}' must compare with a number, got '{wanted}'; or use == or !="
            ) from None
    operators: dict[str, Any] = {
        "<": np.less,
        "<=": np.less_equal,
        ">": np.greater,
        ">=": np.greater_equal,
        "==": np.equal,
        "!=": np.not_equal,
    }
    return np.asarray(operators[match["operator"]](column, number))


def _meaning(law: Law, name: str) -> str:
    known = {variable.name: variable.meaning for variable in (*law.variables, law.response)}
    return known.get(name) or MEANINGS.get(name, name)
