"""Everything a run is between two updates, and its checkpoint: saved atomically, loaded without running any code."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landscape_ray.config import parse
from landscape_ray.data import Batch, Data, open_data
from landscape_ray.data.prefetch import Prefetcher
from landscape_ray.errors import UserError
from landscape_ray.files import write_atomic_with
from landscape_ray.models import build_model
from landscape_ray.training.averaging import Averager
from landscape_ray.training.clipping import Clipper
from landscape_ray.training.config import TrainConfig
from landscape_ray.training.loss import Objective
from landscape_ray.training.manifest import check_version
from landscape_ray.training.optimizers import build_optimizer
from landscape_ray.training.parallel import Reducer, check_module, check_parts, world
from landscape_ray.training.precision import LossScaler
from landscape_ray.training.probing import build_monitor

CHECKPOINT_VERSION = 4

ABSOLUTE_FIELDS = ("model", "data", "optimizer.name")
"""What weights and optimizer state depend on: a checkpoint cannot continue under other values of it. Nor can averages
be continued as another kind, which `restore` refuses."""


class TrainState:
    """The state of one run. `train` advances it; `save` and `load` move it between processes.

    Attributes:
        config: what the run is; may differ from the one that the weights were trained under (see `load`).
        objective: the loss as a function of module and batch.
        loss: the mean training loss on a batch, compiled where the configuration says so.
        step: updates completed.
        observed_step: the last step whose evaluations and probes were made, -1 before any.
        elapsed_seconds: sum of the cost of all records so far.
        loss_nats: held-out loss of the last evaluation; nan before any.
        accuracy: held-out accuracy of the last evaluation; None where targets are not classes.
        best_loss_nats: the lowest held-out loss so far.
        last_update: what the last update added to the trainable parameters, where a probe asked for it.
        diverged: one sentence that says how, None while the run is sound.
        world: the processes that train this run, and which of them this is (`training/parallel.py`).
        num_restores: how often another state was taken over.
    """

    def __init__(self, config: TrainConfig, data: Data) -> None:
        self.config = config
        self.data = data
        self.device = select_device(config.device)
        self.world = world()
        check_parts(config, self.world.size)
        self.objective = Objective(config.loss, data.signature)
        generator = torch.Generator().manual_seed(config.seed)
        self.module = build_model(config.model, data.signature, generator).to(self.device)
        check_module(self.module, self.world.size)
        self.flops_per_unit = self.module.flops_per_unit()
        # the loss is compiled with the network: the logits of a vocabulary need not be written out then
        self.loss: Callable[[Batch], Tensor] = torch.compile(self._loss) if config.compile else self._loss
        self.optimizer = build_optimizer(self.module, config.optimizer, peak_lr=config.schedule.peak_lr)
        self.reduce = Reducer(self.optimizer.parameters)
        self.clipper = Clipper(config.clipping)
        self.scaler = LossScaler(self.optimizer, config.precision)
        self.averager = Averager(self.module, config.averaging, config.num_steps) if config.averaging else None
        self.monitor = build_monitor(config.probes, data, self.device, seed=config.seed, batch_size=config.batch_size)
        self.last_update: list[Tensor] | None = None
        self.loader = Prefetcher(data, self.device, part=self.world)
        self.validation = self._on_device(data.validation_batches(config.eval.limit, config.eval.batch_size))
        self.num_restores = 0
        self.step = 0
        self.observed_step = -1
        self.num_tokens = 0
        self.flops = 0.0
        self.elapsed_seconds = 0.0
        self.eval_seconds = 0.0
        self.probe_seconds = 0.0
        self.loss_nats = math.nan
        self.accuracy: float | None = None
        self.best_loss_nats = math.nan
        self.diverged: str | None = None

    def _loss(self, batch: Batch) -> Tensor:
        return self.objective.first_order(self.module, batch)

    def _on_device(self, batches: list[Batch]) -> list[Batch]:
        return [(inputs.to(self.device), targets.to(self.device)) for inputs, targets in self.world.part(batches)]

    def shift_batches(self, name: str) -> list[Batch]:
        """Return this process' batches of a shifted held-out set; not kept, since it is needed once."""
        evaluation = self.config.eval
        return self._on_device(self.data.shift_batches(name, evaluation.limit, evaluation.batch_size))

    @classmethod
    def create(cls, config: TrainConfig, data: Data | None = None) -> TrainState:
        """Return a run at step 0: data opened (unless it is given), weights drawn from the seed."""
        return cls(config, open_data(config.data) if data is None else data)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: all updates done and observed, or diverged."""
        return self.diverged is not None or self.observed_step >= self.config.num_steps

    COUNTERS = (
        "step",
        "observed_step",
        "num_tokens",
        "flops",
        "elapsed_seconds",
        "eval_seconds",
        "probe_seconds",
        "loss_nats",
        "accuracy",
        "best_loss_nats",
        "diverged",
    )

    def save(self, path: Path, **extra: str | int) -> None:
        """Write a checkpoint: all of it, or nothing.

        Args:
            path: file to write or replace.
            extra: small values that `load` hands back.

        Raises:
            UserError: no space left, or no permission.
        """
        payload = self.payload(**extra)
        write_atomic_with(path, lambda file: torch.save(payload, file))

    def payload(self, **extra: str | int) -> dict[str, Any]:
        """Return what `save` writes; tensors are not copied."""
        payload = {
            "version": CHECKPOINT_VERSION,
            "config": self.config.model_dump(mode="json"),
            "extra": extra,
            **self.content(),
        }
        return {**payload, "checksum": checksum(payload)}

    def content(self) -> dict[str, Any]:
        """Return what `restore` takes over: tensors (no copies) and plain values."""
        return {
            "corpus_id": self.data.corpus_id,
            "counters": {name: getattr(self, name) for name in self.COUNTERS},
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "clipper": self.clipper.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averager": self.averager.state_dict() if self.averager is not None else {},
            "probes": self.monitor.state_dict(),
        }

    @classmethod
    def load(
        cls, path: Path, config: TrainConfig | None = None, data: Data | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Return the run saved at `path` and the extra values saved with it.

        Args:
            path: a file written by `save`.
            config: continue under these values instead of the saved ones. Model, data and the kind of optimizer must
                be equal; every other value of `config` wins over the saved one, the learning rate in the optimizer's
                state included.
            data: what the configuration describes, where it is open already.

        Raises:
            UserError: missing, truncated or foreign file; unknown version; another model or other data.
        """
        payload = read_checkpoint(path)
        saved = parse(TrainConfig, payload["config"], f"checkpoint {path}")
        config = config or saved
        for field in ABSOLUTE_FIELDS:
            here, there = attrgetter(field)(config), attrgetter(field)(saved)
            if here != there:
                raise UserError(
                    f"checkpoint {path} was made with {field} = {there!r}, the run asks for {here!r}; "
                    f"keep {field} or start a new run"
                )
        state = cls.create(config, data)
        state.restore(payload)
        return state, payload["extra"]

    def restore(self, payload: Mapping[str, Any]) -> None:
        """Take over weights, optimizer, counters, averages and probes of a checkpoint; the configuration stays.

        Raises:
            UserError: the checkpoint was trained on other data, has another kind of averages, or holds something else
                than a run of this configuration.
        """
        try:
            self._restore(payload)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"the checkpoint does not fit the run ({type(error).__name__}: {reason}); delete it to start anew"
            ) from None

    def _restore(self, payload: Mapping[str, Any]) -> None:
        for name in ("counters", "module", "optimizer", "clipper", "scaler", "averager", "probes"):
            if not isinstance(payload[name], dict):  # a tensor would take a name for an index
                raise TypeError(f"{name} is a {type(payload[name]).__name__}")
        kind = self.config.averaging.name if self.config.averaging is not None else None
        if (saved := payload["averager"].get("name")) != kind:
            raise UserError(
                f"averaging.name must be {saved!r} to continue from this checkpoint, got {kind!r}; "
                "keep it or start a new run"
            )
        if payload["corpus_id"] != self.data.corpus_id:
            raise UserError(
                f"the data '{getattr(self.config.data, 'source', self.config.data.name)}' is not what the checkpoint "
                "was trained on; restore it, or start a new run"
            )
        self.module.load_state_dict(payload["module"])
        # Values of the configuration are written into the parameter groups at every update, so those of the
        # checkpoint's optimizer cannot win over a mutated one.
        self.optimizer.load_state_dict(payload["optimizer"])
        self.clipper.load_state_dict(payload["clipper"])
        self.scaler.load_state_dict(payload["scaler"])
        if self.averager is not None:
            self.averager.load_state_dict(payload["averager"])
        for name in self.COUNTERS:
            value = payload["counters"][name]
            wanted: tuple[type, ...] = (str,) if name == "diverged" else (int, float)
            if name in ("step", "observed_step", "num_tokens"):
                wanted = (int,)
            if not isinstance(value, wanted) and not (value is None and name in ("diverged", "accuracy")):
                raise TypeError(f"counters.{name} is a {type(value).__name__}")
            setattr(self, name, value)
        self.monitor.load_state_dict(payload["probes"])
        self.num_restores += 1


PARTS = ("config", "extra", "corpus_id", "counters", "module", "optimizer", "clipper", "scaler", "averager", "probes")
"""What a checkpoint consists of, beside its version and checksum."""


def checksum(payload: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything in a checkpoint: every byte of every tensor, every key and plain value."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        elif isinstance(value, Mapping):
            digest.update(f"{{{len(value)}".encode())
            for key, each in value.items():
                digest.update(repr(key).encode())
                add(each)
        elif isinstance(value, (list, tuple)):
            digest.update(f"[{len(value)}".encode())
            for each in value:
                add(each)
        else:
            digest.update(repr(value).encode())

    add({name: payload[name] for name in PARTS})
    return digest.hexdigest()


def read_checkpoint(path: Path, content: bytes | None = None) -> dict[str, Any]:
    """Return the content of a checkpoint, tensors and plain values only, after comparing its checksum.

    Args:
        path: the file.
        content: what is in the file, where it is known already.

    Raises:
        UserError: missing, truncated, changed or foreign file, or an unknown version.
    """
    try:
        source = path if content is None else io.BytesIO(content)
        payload = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as error:  # torch.load raises many types for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read ({reason}); delete it to start this run anew") from None
    if not isinstance(payload, dict) or "version" not in payload:
        raise UserError(f"{path} is not a checkpoint of landscape_ray; give a file that TrainState.save wrote")
    check_version(payload, path, CHECKPOINT_VERSION)
    try:
        sound = payload["checksum"] == checksum(payload)
    except Exception:  # a foreign file may hold anything under these names
        sound = False
    if not sound:
        raise UserError(f"checkpoint {path} is damaged: its checksum differs; delete it to start this run anew")
    return payload


def select_device(name: str) -> torch.device:
    """Return the device called `auto`, `cpu` or `cuda`.

    Raises:
        UserError: cuda asked for and not there.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("train.device must be available, got 'cuda' on a machine without a CUDA device; use 'auto'")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
