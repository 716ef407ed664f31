"""The narrow waist: the rows that training produces and law fitting reads, their columns and their units.

Every run is one stream of records. A record is a small frozen dataclass; a row is the same thing as a flat
dictionary; a table is rows under :data:`COLUMNS`. Nothing else passes between training and the laws, and foreign
logs (a CSV file, another tracking server) enter by being mapped to the same columns.

Conventions:
    step: the number of optimizer updates completed when the record was made. The first update gives step 1; an
        evaluation before any update has step 0.
    loss_nats: mean cross-entropy per token (image, example) in nats; for a task with real-valued targets its mean loss.
    num_tokens: training tokens seen; images or examples, where these are what is trained on.
    elapsed_seconds: wall-clock seconds of the run so far, evaluations and probes included, summed over resumes.
    cost_seconds: wall-clock seconds that this one record took to produce.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

SCHEMA_VERSION = 3

Dtype: TypeAlias = Literal["int64", "float64", "string"]


class Column(NamedTuple):
    """One column of the record table."""

    name: str
    dtype: Dtype
    unit: str
    meaning: str


COLUMNS: tuple[Column, ...] = (
    Column("run_id", "string", "", "identifier of the run inside its sweep"),
    Column("kind", "string", "", "step | eval | variant | probe | event | system"),
    Column("step", "int64", "updates", "optimizer updates completed"),
    Column("num_tokens", "int64", "tokens", "training tokens (images, examples) seen"),
    Column("flops", "float64", "FLOPs", "training FLOPs spent, probes and evaluations excluded"),
    Column("elapsed_seconds", "float64", "s", "wall-clock time of the run so far, summed over resumes"),
    Column("cost_seconds", "float64", "s", "wall-clock time this record took"),
    Column("time_unix", "float64", "s", "wall-clock time stamp (Unix epoch)"),
    Column("loss_nats", "float64", "nats/token", "training loss (step) or held-out loss (eval, variant)"),
    Column("accuracy", "float64", "", "share of held-out targets predicted right (eval, variant; classes only)"),
    Column("variant", "string", "", "what was changed: averaged weights, or a shifted held-out set (variant)"),
    Column("grad_norm", "float64", "", "L2 norm of the gradient before clipping (step)"),
    Column("lr", "float64", "", "learning rate applied in this update (step)"),
    Column("weight_decay", "float64", "", "weight decay applied in this update (step)"),
    Column("momentum", "float64", "", "momentum or Adam's beta1 applied in this update (step)"),
    Column("probe", "string", "", "name of the probe (probe) or of the quantity (system)"),
    Column("value", "float64", "probe's own", "estimate of the probe (probe), or the quantity (system)"),
    Column("standard_error", "float64", "probe's own", "standard error or error bound of the value (probe)"),
    Column("num_matvecs", "int64", "products", "Hessian-vector products spent (probe)"),
    Column("price_gradients", "float64", "gradients", "cost in gradients on the probe batch (probe)"),
    Column("converged", "int64", "", "1 where the accuracy that was asked for was reached, else 0 (probe)"),
    Column("event", "string", "", "exploit | mutate | diverged | resume | branch | clamp | fallback (event)"),
    Column("donor", "string", "", "run whose weights were copied (event: exploit, branch)"),
    Column("donor_step", "int64", "updates", "step of the copied weights (event: exploit, branch)"),
    Column("detail", "string", "", "JSON object with what changed (event)"),
)

COLUMN_NAMES: tuple[str, ...] = tuple(column.name for column in COLUMNS)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands; the fields that every record shares."""

    step: int
    num_tokens: int
    flops: float
    elapsed_seconds: float
    time_unix: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord(Progress):
    """One optimizer update, with the hyperparameter values that were actually applied."""

    kind: ClassVar[str] = "step"
    cost_seconds: float
    loss_nats: float
    grad_norm: float
    lr: float
    weight_decay: float
    momentum: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord(Progress):
    """Held-out loss of the current weights."""

    kind: ClassVar[str] = "eval"
    cost_seconds: float
    loss_nats: float
    accuracy: float | None = None
    """Share of the targets predicted right; None where targets are not classes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VariantRecord(Progress):
    """Held-out loss with something changed: averaged weights (`ema`, `swa`), or shifted data (`noise_3`).

    A kind of its own, so that nobody takes it for the held-out loss of the run.
    """

    kind: ClassVar[str] = "variant"
    cost_seconds: float
    variant: str
    loss_nats: float
    accuracy: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRecord(Progress):
    """One probe: its estimate, how far it can be trusted, and what it cost."""

    kind: ClassVar[str] = "probe"
    cost_seconds: float
    probe: str
    value: float
    standard_error: float
    num_matvecs: int
    price_gradients: float = 0.0
    """What was spent, in gradients on the batch of the probe; of several estimates of one measurement the first bears
    it all."""
    converged: int = 1
    """1 where the accuracy that was asked for was reached; 0 where the value is rougher, cut short or unknown."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord(Progress):
    """Something that changed the course of a run: exploit, mutation, divergence, resume, branch off a trunk, clamp."""

    kind: ClassVar[str] = "event"
    event: str
    donor: str | None = None
    donor_step: int | None = None
    detail: str = "{}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SystemRecord(Progress):
    """One quantity of a sample of what the run's process and its machine were doing."""

    kind: ClassVar[str] = "system"
    probe: str
    """Name of the quantity, such as `process_memory_bytes`."""
    value: float


Record: TypeAlias = StepRecord | EvalRecord | VariantRecord | ProbeRecord | EventRecord | SystemRecord

RunStatus: TypeAlias = Literal["pending", "running", "finished", "stopped", "diverged", "failed"]
"""What became of a run. `stopped`: ended early by a decision; `diverged`: a non-finite loss, which is a result."""

TERMINAL_STATUSES: frozenset[str] = frozenset({"finished", "stopped", "diverged", "failed"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One row a run: what was asked, what came out, and what it cost."""

    run_id: str
    status: RunStatus
    config: dict[str, Any]
    """The training configuration, nested as in the TOML file; of a population's member, the present one."""
    varied: dict[str, Any]
    """The searched values only, under their dotted names."""
    step: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    flops: float = 0.0
    num_params: int = 0
    num_params_non_embedding: int = 0
    final_loss_nats: float = math.nan
    """Held-out loss of the last evaluation."""
    final_accuracy: float | None = None
    """Held-out accuracy of the last evaluation; None where targets are not classes."""
    unit: str = "token"
    """What is counted as num_tokens: token, image or example."""
    loss_unit: str = "nats/token"
    """Unit of the losses; for other losses than cross-entropy its name."""
    bytes_per_token: float | None = None
    """Held-out bytes of text per held-out token: losses in nats/token over it are nats/byte, which compare across
    tokenizers. None where it is not known or means nothing."""
    best_loss_nats: float = math.nan
    elapsed_seconds: float = 0.0
    probe_seconds: float = 0.0
    eval_seconds: float = 0.0
    tracking_seconds: float = 0.0
    """Time spent on writing records down, beside elapsed_seconds; that of the last commit is not in it yet."""
    peak_memory_bytes: float = math.nan
    """Most memory that the run has used: of the device, or without one of its process; nan where it is not known."""
    message: str = ""
    """For a run that failed or diverged: one sentence that says how."""


def to_row(run_id: str, record: Record) -> dict[str, Any]:
    """Return the record as a row: every column of :data:`COLUMNS`, None where it does not apply."""
    row: dict[str, Any] = dict.fromkeys(COLUMN_NAMES)
    row.update((field.name, getattr(record, field.name)) for field in dataclasses.fields(record))
    row["run_id"] = run_id
    row["kind"] = record.kind
    return row


def progress(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a tracking server can draw curves over instead of steps: tokens, FLOPs, seconds."""
    return {f"progress/{name}": row[name] for name in ("num_tokens", "flops", "elapsed_seconds")}


def metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Return what a tracking server should chart for this row, under `group/name_unit` keys.

    Non-finite values are left out: servers disagree on how to store them, and the Parquet copy keeps them.
    """
    match row["kind"]:
        case "step":
            named = {
                "train/loss_nats": row["loss_nats"],
                "train/lr": row["lr"],
                "train/grad_norm": row["grad_norm"],
                **progress(row),
            }
        case "eval":
            named = {"eval/loss_nats": row["loss_nats"], "eval/accuracy": row["accuracy"]}
        case "variant":
            group = f"eval_{row['variant']}"
            named = {f"{group}/loss_nats": row["loss_nats"], f"{group}/accuracy": row["accuracy"]}
        case "probe":
            probe = row["probe"]
            named = {f"probe/{probe}": row["value"], f"probe/{probe}_standard_error": row["standard_error"]}
        case "system":
            named = {f"system/{row['probe']}": row["value"]}
        case _:
            named = {}
    return {key: float(value) for key, value in named.items() if value is not None and math.isfinite(value)}
