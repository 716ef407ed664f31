"""What the configurations of runs say of how they were trained, as lines of the record of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from landscape_ray.laws.trust.checklist import Item

Array: TypeAlias = NDArray[np.float64]


def setup_items(configs: Sequence[dict[str, Any]], columns: Mapping[str, Array]) -> list[Item]:
    """Return what the configurations of the runs say of how they were trained."""
    found = []
    for title, keys in (
        ("optimizer", ("optimizer.name",)),
        ("schedule", ("schedule.name",)),
        ("batch size", ("batch_size",)),
        ("weight decay", ("optimizer.weight_decay",)),
        ("data", ("data.name", "data.source")),
        ("tokenizer", ("data.tokenizer",)),
        ("context length", ("data.context_length",)),
        ("precision", ("precision",)),
        ("parametrisation", ("model.parametrisation", "model.parametrization")),
    ):
        values = {str(config[key]) for config in configs for key in keys if key in config}
        if values:
            found.append(Item("B", title, ", ".join(sorted(values))))
    fractions = {
        round(float(config["schedule.warmup_steps"]) / float(config["num_steps"]), 4)
        for config in configs
        if config.get("num_steps") and "schedule.warmup_steps" in config
    }
    if fractions:
        several = len(fractions) > 1
        found.append(
            Item(
                "B",
                "warm-up",
                f"{min(fractions):.1%} of the updates"
                if not several
                else f"{min(fractions):.1%} to {max(fractions):.1%}",
                "warning" if several else "ok",
                "its share differs between runs, which bends the law over D" if several else "",
            )
        )
    seeds: dict[str, set[Any]] = {}
    for config in configs:
        key = str(sorted((k, str(v)) for k, v in config.items() if k != "seed"))
        seeds.setdefault(key, set()).add(config.get("seed"))
    repeated = max((len(each) for each in seeds.values()), default=1)
    found.append(
        Item("B", "seeds", f"up to {repeated} for one setting")
        if repeated > 1
        else Item(
            "B", "seeds", "one for every setting", "warning", "the noise between seeds is not known: repeat one run"
        )
    )
    found += _tuning_items(columns)
    return found


def mutated_items(mutated: int, count: int) -> list[Item]:
    """Return whether weights or values changed during training, in how many of the runs."""
    if not mutated:
        return []
    remark = "weights were copied or the learning rate changed on the way (a population): no setting describes them"
    return [Item("B", "changed during training", f"{mutated} of {count} runs", "warning", remark)]


def _tuning_items(columns: Mapping[str, Array]) -> list[Item]:
    """Return whether the learning rate was tuned for every size, and whether a best one lies at the edge."""
    if "lr" not in columns or not np.isfinite(columns["N"]).any():
        return []
    sizes = np.unique(columns["N"][np.isfinite(columns["N"])])
    if len(sizes) < 2:
        return []
    untuned, edges = [], []
    for size in sizes:
        here = columns["N"] == size
        rates = np.unique(columns["lr"][here])
        if len(rates) < 3:
            untuned.append(f"{size:.3g}")
        elif columns["lr"][here][np.argmin(columns["loss"][here])] in (rates[0], rates[-1]):
            edges.append(f"{size:.3g}")
    if untuned:
        remark = f"fewer than three rates at N = {', '.join(untuned)}: a size with a bad rate bends the law over N"
        return [Item("B", "learning rate tuned for every size", "no", "warning", remark)]
    if edges:
        remark = f"the best rate is at the edge of the sweep at N = {', '.join(edges)}: widen it"
        return [Item("B", "learning rate tuned for every size", "yes, but", "warning", remark)]
    return [Item("B", "learning rate tuned for every size", "yes, the best lies inside")]
