"""A table of runs over learning rates and batches, in groups of one model size and one horizon.

Legend: N parameters, D training tokens, lr peak learning rate, B batch in tokens. A group is all runs of one (N, D):
what is compared within it differs in lr and B only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from landscape_ray.errors import UserError
from landscape_ray.laws.core.points import Points

Array: TypeAlias = NDArray[np.float64]

MAX_UNIT_MISMATCH = 0.05
"""B * steps and D may differ by this, relative: a last batch, a warm-up that is not counted."""

NEAR_SIZES = 0.1
"""Two sizes closer than this, relative, are probably one size that was counted in two ways."""

MAX_LR = 1e2
"""A peak learning rate above this is the logarithm of one, or another column."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """Runs with their model size, horizon, learning rate, batch and final loss.

    Attributes:
        lr: (n,) peak learning rates, > 0.
        loss: (n,) final losses, > 0, all measured alike.
        N: (n,) parameters; None for one size that does not matter.
        D: (n,) training tokens (images, examples); None for one horizon that does not matter.
        batch: (n,) batch in the unit of D; None where it was not swept.
        steps: (n,) updates, to check that batch * steps is D; None leaves the units unchecked.
        run_ids: names of the runs; None numbers them.

    Raises:
        UserError: lengths differ, values are missing, not finite, or not > 0, or batch * steps is not D.

    >>> lr = [1e-3, 2e-3, 4e-3]
    >>> sweep = Sweep(lr, [2.1, 2.0, 2.2], N=[1e8] * 3, D=[2e9] * 3)
    >>> [(float(n), float(d), int(rows.sum())) for (n, d), rows in sweep.groups.items()]
    [(100000000.0, 2000000000.0, 3)]
    """

    lr: ArrayLike
    loss: ArrayLike
    N: ArrayLike | None = None
    D: ArrayLike | None = None
    batch: ArrayLike | None = None
    steps: ArrayLike | None = None
    run_ids: Sequence[str] | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("lr", "N", "D", "batch", "steps")}
        points = Points({name: v for name, v in given.items() if v is not None}, self.loss, self.run_ids)
        for name, values in (*points.variables.items(), ("loss", points.response)):
            column = np.asarray(values)
            if not (column > 0).all():
                raise UserError(
                    f"{name} must be > 0, got {column[~(column > 0)][0]:g}; drop runs that diverged, and say so"
                )
            object.__setattr__(self, name, column)
        if len(set(points.run_of or ())) < len(points):
            raise UserError("run_ids must be distinct, got one twice; a row is a whole run, not a checkpoint")
        object.__setattr__(self, "run_ids", points.run_of)
        if float(np.max(self.lr)) > MAX_LR:
            raise UserError(f"lr must be a learning rate <= {MAX_LR:g}, got {np.max(self.lr):g}; is it another column?")
        self._check_units()

    def _check_units(self) -> None:
        if self.steps is None or self.batch is None or self.D is None:
            return
        ratio = np.asarray(self.D) / (np.asarray(self.batch) * np.asarray(self.steps))
        typical = float(np.median(ratio))
        if abs(typical - 1) > MAX_UNIT_MISMATCH:
            raise UserError(
                f"batch must be in the unit of D, but D is {typical:.6g} times batch * steps; multiply the batch by "
                "that (the context length, if it counts sequences)"
            )
        off = np.abs(ratio - 1) > MAX_UNIT_MISMATCH
        if off.any():
            raise UserError(
                f"batch must be in one unit in all runs, but D is {ratio[off][0]:.6g} times batch * steps in "
                f"{off.sum()} of {len(ratio)}; convert these runs"
            )

    @classmethod
    def from_table(
        cls, table: Mapping[str, ArrayLike], columns: Mapping[str, str] | None = None, **units: float
    ) -> Sweep:
        """Return the sweep of a table.

        Args:
            table: arrays (n,) by column name.
            columns: name in the table by name here (lr, loss, N, D, batch, steps, run_ids), for those that differ.
            units: factor by name here, for columns in another unit: `batch=2048` for a batch counted in sequences.

        Raises:
            UserError: lr or loss are missing, a named column is, or see :class:`Sweep`.

        >>> table = {"eta": [1e-3, 2e-3], "loss": [2.1, 2.0], "batch": [64, 64]}
        >>> Sweep.from_table(table, {"lr": "eta"}, batch=2048).batch.tolist()
        [131072.0, 131072.0]
        """
        columns = dict(columns or {})
        fields = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in (*columns, *units) if name not in fields]
        if unknown:
            raise UserError(f"columns must be named for {', '.join(fields)}, got '{unknown[0]}'; rename it")
        missing = [
            columns.get(name, name)
            for name in fields
            if columns.get(name, name) not in table and (name in columns or name in ("lr", "loss"))
        ]
        if missing:
            raise UserError(f"table must have the columns {', '.join(missing)}, got {', '.join(table)}; map them")
        given: dict[str, Any] = {
            name: table[columns.get(name, name)] for name in fields if columns.get(name, name) in table
        }
        for name, factor in units.items():
            given[name] = np.asarray(given[name], dtype=np.float64) * factor
        return cls(**given)

    def __len__(self) -> int:
        return len(np.asarray(self.lr))

    @property
    def sizes(self) -> Array:
        """N of every run (n,); 1 where it was not given."""
        return np.ones(len(self)) if self.N is None else np.asarray(self.N)

    @property
    def horizons(self) -> Array:
        """D of every run (n,); 1 where it was not given."""
        return np.ones(len(self)) if self.D is None else np.asarray(self.D)

    @property
    def groups(self) -> dict[tuple[float, float], NDArray[np.bool_]]:
        """Masks (n,) of the runs by (N, D), in ascending order."""
        pairs = list(zip(self.sizes.tolist(), self.horizons.tolist(), strict=True))
        return {pair: np.array([other == pair for other in pairs], dtype=bool) for pair in sorted(set(pairs))}

    @property
    def excess(self) -> Array:
        """Loss over the best of its group, minus 1 (n,)."""
        loss = np.asarray(self.loss)
        best = np.empty(len(self))
        for rows in self.groups.values():
            best[rows] = loss[rows].min()
        return np.asarray(loss / best - 1)

    def take(self, kept: ArrayLike) -> Sweep:
        """Return some of the runs, by a mask or by their numbers."""
        index = np.arange(len(self))[np.asarray(kept)]

        def some(values: ArrayLike | None) -> Array | None:
            return None if values is None else np.asarray(values)[index]

        names = [(self.run_ids or ())[i] for i in index]
        return Sweep(
            np.asarray(self.lr)[index],
            np.asarray(self.loss)[index],
            some(self.N),
            some(self.D),
            some(self.batch),
            some(self.steps),
            names,
        )

    def warnings(self) -> tuple[str, ...]:
        """Return what looks wrong about the table as a whole."""
        found = []
        sizes = np.unique(self.sizes)
        near = np.flatnonzero(np.diff(np.log(sizes)) < NEAR_SIZES)
        if len(near):
            found.append(
                f"near_sizes: N {sizes[near[0]]:.6g} and {sizes[near[0] + 1]:.6g} differ by less than "
                f"{NEAR_SIZES:.0%}; are parameters (embeddings, head) counted alike in all runs?"
            )
        for (n, d), rows in self.groups.items():
            tried = [np.asarray(self.lr)[rows]] + ([] if self.batch is None else [np.asarray(self.batch)[rows]])
            best = int(np.argmin(np.asarray(self.loss)[rows]))
            for name, values in zip(("lr", "batch"), tried, strict=False):
                distinct = np.unique(values)
                if len(distinct) > 1 and values[best] in (distinct[0], distinct[-1]):
                    found.append(f"edge: the best {name} of N {n:g}, D {d:g} is the last one tried, {values[best]:g}")
        return tuple(found)
