"""Fits of published runs beside what their authors published: ours, published, difference; one table a comparison.

Usage:
    python scripts/bench_published_laws.py [step_law] [loss_to_loss] [ladder] [--data FOLDER] [--bootstrap 200]

FOLDER holds `step_law`, `loss_to_loss` and `olmo_ladder`; what is missing is left out. The procedures of the authors
are written anew here, with scipy, so that a difference is one of method and not of data.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import curve_fit, minimize

from landscape_ray.errors import UserError
from landscape_ray.laws import (
    BATCH_POWER,
    LR_POWER,
    Points,
    Sweep,
    fit_ladder,
    fit_loss_to_loss,
    fit_optima,
    fit_step_law,
    group_optima,
    leave_one_group_out,
    match_runs,
    regret,
    smooth_checkpoints,
)


def read(path: Path) -> dict[str, list[str]]:
    """Return the columns of a CSV file."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


# ---------------------------------------------------------------- learning rate and batch over size and horizon

CONTEXT_LENGTH = 2048


def step_law_runs(folder: Path) -> Sweep:
    """Return the dense runs, their smoothed final losses, the batch in tokens."""
    names = {"loss": "smooth loss", "batch": "bs", "steps": "ti", "run_ids": "exp_name"}
    table: dict[str, Any] = read(folder / "step_law" / "dense_lr_bs_loss.csv")
    numeric = {name: np.array(table[name], dtype=float) for name in ("lr", "N", "D", "smooth loss", "bs", "ti")}
    return Sweep.from_table(numeric | {"exp_name": table["exp_name"]}, names, batch=CONTEXT_LENGTH)


def published_rule(N: float, D: float) -> tuple[float, float]:
    """Return the rule of Li et al. 2025."""
    return 1.79 * N**-0.713 * D**0.307, 0.58 * D**0.571


def near_best_rule(sweep: Sweep, threshold: float = 0.0025) -> Any:
    """Return the rule by the authors' procedure: least squares of logarithms over the runs within .25 % of the best."""
    kept = sweep.take(sweep.excess < threshold)
    ones, size, horizon = np.ones(len(kept)), np.log(kept.sizes), np.log(kept.horizons)
    lr = np.linalg.lstsq(np.stack([ones, size, horizon], 1), np.log(np.asarray(kept.lr)), rcond=None)[0]
    batch = np.linalg.lstsq(np.stack([ones, horizon], 1), np.log(np.asarray(kept.batch)), rcond=None)[0]
    return lambda N, D: (
        float(np.exp(lr @ [1, np.log(N), np.log(D)])),
        float(np.exp(batch @ [1, np.log(D)])),
    )


def two_stage_rule(sweep: Sweep) -> Any:
    """Return the rule from the parabolas of the groups."""
    optima = group_optima(sweep, window=0.01, num_samples=2)
    lr = fit_optima(LR_POWER, optima, num_bootstrap=0).parameters
    batch = fit_optima(BATCH_POWER, optima, num_bootstrap=0).parameters
    return lambda N, D: (
        lr["c"] * N ** -lr["p"] * D ** lr["q"],
        batch["k"] * N ** -batch["r"] * D ** batch["s"],
    )


def joint_rule(sweep: Sweep, **options: Any) -> Any:
    """Return the rule from the joint surface."""
    return fit_step_law(sweep, num_bootstrap=0, **options).rule


WINDOWS = (0.005, 0.0075, 0.01, 0.015, 0.02)


def chosen_rule(sweep: Sweep) -> Any:
    """Return the joint rule whose window has the least regret on the groups it is fitted to."""
    rules = [joint_rule(sweep, window=window) for window in WINDOWS]
    return min(rules, key=lambda rule: regret(sweep, rule).mean)


def compare_step_law(folder: Path, num_bootstrap: int, nested: bool) -> None:
    sweep = step_law_runs(folder)
    print(f"\nRegret, mean (worst) over {len(sweep.groups)} groups of {len(sweep)} dense runs, %")
    print(f"{'rule':<44}{'all groups':>17}{'group left out':>17}{'size left out':>17}")
    fitters: dict[str, Any] = {
        "published constants": lambda runs: published_rule,
        "published procedure, refitted": near_best_rule,
        "ours: two stages": two_stage_rule,
        "ours: joint, second order": lambda runs: joint_rule(runs, order=2),
        "ours: joint, batch by D only": lambda runs: joint_rule(runs, batch_by_size=False),
        "ours: joint (default)": joint_rule,
    }
    if nested:
        fitters["ours: joint, window chosen inside"] = chosen_rule
    for name, fitter in fitters.items():
        found = [regret(sweep, fitter(sweep)), *(leave_one_group_out(sweep, fitter, by=by) for by in ("group", "size"))]
        print(f"{name:<44}" + "".join(f"{100 * r.mean:>9.4f} ({100 * r.worst:.3f})" for r in found))

    print("\nWindow (runs within it of the best of their group are fitted)")
    print(f"{'window':>8}{'runs':>7}{'regret %':>10}   law")
    for window in (*WINDOWS, 0.03):
        law = fit_step_law(sweep, window=window, num_bootstrap=0)
        print(
            f"{window:>8}{law.fit.data['num_points']:>7}{100 * law.regret(sweep).mean:>10.4f}   "
            f"lr {law.lr}, batch {law.batch}"
        )

    rows = {name: np.array(v, dtype=float) for name, v in read(next((folder / "step_law").glob("1004*.csv"))).items()}
    named = {
        "lr N": ("lr_coefN", "lr", "by_size", -1),
        "lr D": ("lr_coefD", "lr", "by_horizon", 1),
        "batch N": (None, "batch", "by_size", -1),
        "batch D": ("bs_coefD", "batch", "by_horizon", 1),
    }
    laws = {
        "joint, batch by D": fit_step_law(sweep, batch_by_size=False, num_bootstrap=num_bootstrap, confidence=0.95),
        "joint (default)": fit_step_law(sweep, num_bootstrap=num_bootstrap, confidence=0.95),
        "default, runs drawn": fit_step_law(sweep, num_bootstrap=num_bootstrap, confidence=0.95, resample="runs"),
    }
    print("\nExponents, 95 % intervals; published: quantiles of the 1,000 released bootstrap rows")
    print(f"{'exponent':<10}{'published':>26}" + "".join(f"{name:>28}" for name in laws))
    for name, (column, part, field, sign) in named.items():
        line = f"{name:<10}"
        if column is None:
            line += f"{'0 by assumption':>26}"
        else:
            low, high = np.quantile(rows[column], [0.025, 0.975])
            line += f"{rows[column].mean():>10.3f} [{low:.3f}, {high:.3f}]"
        for law in laws.values():
            product = getattr(law, part)
            ends = sorted(sign * end for end in product.intervals[field])
            line += f"{sign * getattr(product, field):>12.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"
        print(line)


# ---------------------------------------------------------------------------------------------- loss to loss

DISPLAYED = {
    "FineWeb": "fineweb-100b",
    "FineWeb-Edu": "fineweb-edu-100b",
    "ProofPile 2": "proof-pile-2",
    "SlimPajama": "slimpajama-chunk1",
    "SmolLM Corpus": "smollm-corpus",
    "StarCoder": "starcoder",
}


@dataclasses.dataclass(frozen=True)
class TransferData:
    """Runs by training set: tokens and loss, the losses of the large runs, E of every set, and the published pairs."""

    tokens: dict[str, np.ndarray]
    loss: dict[str, np.ndarray]
    large: dict[str, float]
    irreducible: dict[str, float]
    published: dict[tuple[str, str], tuple[float, float]]


def transfer_data(folder: Path) -> TransferData:
    """Return the released runs and fits."""
    folder = folder / "loss_to_loss"
    runs, large, fits = (read(folder / f"{name}.csv") for name in ("sweep", "extrapolation", "opt_params_data"))
    tokens, loss = {}, {}
    for key in DISPLAYED.values():
        rows = [i for i, data in enumerate(runs["data"]) if data == key]
        tokens[key], loss[key] = (np.array([float(runs[name][i]) for i in rows]) for name in ("tokens", "val_loss"))
    irreducible = {
        data: float(end)
        for data, name, kaplan, end in zip(fits["data"], fits["loss_name"], fits["kaplan"], fits["E"], strict=True)
        if name == "val_loss" and kaplan == "True"
    }
    published = {}
    for line in (folder / "published_train_to_train.txt").read_text().splitlines():
        first, second, kappa, factor = (part.strip() for part in line.rstrip("\\ ").split("&"))
        published[DISPLAYED[first], DISPLAYED[second]] = float(kappa), float(factor)
    return TransferData(
        tokens, loss, dict(zip(large["data"], map(float, large["val_loss"]), strict=True)), irreducible, published
    )


def transfer_fit(data: TransferData, first: str, second: str, *, both: bool, e0: bool = True, **options: Any) -> Any:
    """Return our fit of a pair with the published E's (both), with E0 only, or with neither."""
    rows, others = match_runs({"tokens": data.tokens[first]}, {"tokens": data.tokens[second]})
    ends = data.irreducible[first] if e0 else None, data.irreducible[second] if both else None
    return fit_loss_to_loss(data.loss[first][rows], data.loss[second][others], irreducible=ends, **options)


def compare_loss_to_loss(folder: Path, num_bootstrap: int, nested: bool) -> None:
    del nested
    data = transfer_data(folder)
    print("\nTrain-to-train: (kappa, K) with the published E's, and the large run (3.3B, 1e21 FLOPs) predicted")
    print(
        f"{'from -> to':<38}{'kappa':>9}{'published':>11}{'diff':>9}{'K':>9}{'published':>11}{'diff':>9} |"
        f"{'error %: E0, E1 given':>22}{'E0 given':>10}{'fitted':>9}  status of the three"
    )
    errors: list[list[float]] = []
    for pair, (kappa, factor) in data.published.items():
        laws = [
            transfer_fit(data, *pair, both=both, e0=e0, num_bootstrap=num_bootstrap)
            for both, e0 in ((True, True), (False, True), (False, False))
        ]
        given = laws[0]
        errors.append([np.nan, np.nan, np.nan])
        for i, law in enumerate(laws):
            if data.large[pair[0]] > law.E0:  # else the fit says that this loss is impossible
                predicted = law.predict(data.large[pair[0]], allow_extrapolation=True).value[0]
                errors[-1][i] = 100 * float(predicted / data.large[pair[1]] - 1)
        print(
            f"{' -> '.join(pair):<38}{given.kappa:>9.4f}{kappa:>11.4f}{given.kappa - kappa:>9.0e}{given.factor:>9.4f}"
            f"{factor:>11.4f}{given.factor - factor:>9.0e} |{errors[-1][0]:>22.2f}{errors[-1][1]:>10.2f}"
            f"{errors[-1][2]:>9.2f}  {', '.join(law.fit.status for law in laws)}"
        )
    for name, column in zip(("E0 and E1 given", "E0 given", "both fitted"), np.abs(errors).T, strict=True):
        known = np.isfinite(column)
        print(
            f"mean |error| of the large run, {name}: {column[known].mean():.3f} % of {known.sum()} pairs; "
            "the others impossible"
        )


# ---------------------------------------------------------------------------------------------- task ladder

SIZES = {"190M": 190_354_176, "370M": 371_262_464, "760M": 758_220_288, "1B": 1_279_395_840}
TARGET = ("peteish13_eval_final", 13_202_396_160)
MMLU = {
    "mmlu_stem_test": 0.215,
    "mmlu_humanities_test": 0.335,
    "mmlu_social_sciences_test": 0.219,
    "mmlu_other_test": 0.231,
}
TASKS: dict[str, dict[str, float]] = {
    "MMLU": MMLU,
    "HellaSwag": {"hellaswag_val": 1},
    "ARC-C": {"arc_challenge_test": 1},
    "ARC-E": {"arc_easy_test": 1},
    "PIQA": {"piqa_val": 1},
    "CSQA": {"csqa_val": 1},
    "SIQA": {"socialiqa_val": 1},
    "OBQA": {"openbookqa_test": 1},
}
GUESSING = {"PIQA": 1 / 2, "SIQA": 1 / 3, "CSQA": 1 / 5}
"""Accuracy of guessing where it is not 1/4."""

PUBLISHED_STEP_1 = dict(zip(TASKS, (0.18, -1.17, 9.44, 15.98, -2.67, -18.46, 3.63, 0.93), strict=True))
PUBLISHED_CHAIN = dict(zip(TASKS, (0.0067, 0.0254, 0.1745, 0.1139, 0.0106, 0.0473, 0.0268, 0.0776), strict=True))


@dataclasses.dataclass(frozen=True)
class LadderData:
    """Of every task: ends of the runs, smoothed checkpoints, and loss and accuracy of the large model."""

    runs: dict[str, Points]
    checkpoints: dict[str, Points]
    target: dict[str, tuple[float, float]]
    target_tokens: float


def ladder_data(folder: Path) -> LadderData:
    """Return the 16 runs of the ladder and the 13B-5T target, prepared as published."""
    names = [(size, length) for size in SIZES for length in ("1xC", "2xC", "5xC", "10xC")]
    tables = {name: read(folder / "olmo_ladder" / f"{'-'.join(name)}.csv") for name in names}
    large = read(folder / "olmo_ladder" / f"{TARGET[0]}.csv")

    def series(table: dict[str, list[str]], task: str, of: str) -> np.ndarray:
        column = {"loss": "eval/downstream_bpb/{}_rc_5shot_bpb", "accuracy": "eval/downstream/{}_rc_5shot_len_norm"}[of]
        parts = [np.array(table[column.format(part)], dtype=float) for part in TASKS[task]]
        return np.average(parts, axis=0, weights=list(TASKS[task].values()))

    def tokens(table: dict[str, list[str]]) -> float:
        if "throughput/total_tokens" in table:
            return float(table["throughput/total_tokens"][-1])
        return float(table["_step"][-1]) * float(table["batch_size_in_tokens"][-1])

    size = [float(SIZES[name[0]]) for name in names]
    horizon = [tokens(table) for table in tables.values()]
    ids = ["-".join(name) for name in names]
    runs, checkpoints, target = {}, {}, {}
    for task in TASKS:
        ends = [series(table, task, "loss")[-5:].mean() for table in tables.values()]
        runs[task] = Points({"N": size, "D": horizon}, ends, ids)
        loss, accuracy = (
            [smooth_checkpoints(series(table, task, of), skip=0.1, window=5) for table in tables.values()]
            for of in ("loss", "accuracy")
        )
        run_of = [name for name, part in zip(ids, loss, strict=True) for _ in part]
        checkpoints[task] = Points({"task_loss": np.concatenate(loss)}, np.concatenate(accuracy), run_of)
        target[task] = series(large, task, "loss")[-5:].mean(), series(large, task, "accuracy")[-5:].mean()
    return LadderData(runs, checkpoints, target, tokens(large))


def single_start_loss(points: Points) -> tuple[np.ndarray, float]:
    """Return (log A, log B, alpha, beta, E) and the objective of step 1 from the published single start and bounds."""
    size, horizon = (np.log(np.asarray(points.variables[name])) for name in ("N", "D"))
    log_loss, delta = np.log(np.asarray(points.response)), 1e-3

    def objective(p: np.ndarray) -> tuple[float, np.ndarray]:
        by_size, by_horizon = np.exp(p[0] - p[2] * size), np.exp(p[1] - p[3] * horizon)
        predicted = by_size + by_horizon + p[4]
        off = np.log(predicted) - log_loss
        inner = np.clip(off, -delta, delta)
        pull = inner / predicted
        gradient = [
            pull @ by_size,
            pull @ by_horizon,
            -pull @ (by_size * size),
            -pull @ (by_horizon * horizon),
            pull.sum(),
        ]
        return float((inner * (off - inner / 2)).sum()), np.array(gradient)

    options: Any = {"ftol": 0.0, "gtol": 1e-10, "maxiter": 1_000_000}
    start = [3.0, 6.0, 0.1, 0.2, 1.0]
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * 5, options=options)
    return found.x, float(found.fun)


def single_start_accuracy(points: Points, guessing: float) -> np.ndarray:
    """Return (a, L0, k, b) of step 2 from the published single start and bounds, with their helper point (0, 1)."""

    def sigmoid(loss: np.ndarray, a: float, middle: float, k: float, b: float) -> np.ndarray:
        return a / (1 + np.exp(-k * (loss - middle))) + b

    loss = np.append(np.asarray(points.variables["task_loss"]), 0.0)
    accuracy = np.append(np.asarray(points.response), 1.0)
    bounds = ([-1.0, 0.0, 0.0, 0.0], [0.0, np.inf, np.inf, 1.0])
    return curve_fit(sigmoid, loss, accuracy, p0=[guessing - 1, 0.9, 3.0, 1.0], bounds=bounds, maxfev=500_000)[0]


def published_ladder(data: LadderData, task: str) -> dict[str, Any]:
    """Return relative errors of the published procedure on the target, and what its optimum is."""
    p, objective = single_start_loss(data.runs[task])
    a, middle, k, b = single_start_accuracy(data.checkpoints[task], GUESSING.get(task, 0.25))
    loss = np.exp(p[0] - p[2] * np.log(TARGET[1])) + np.exp(p[1] - p[3] * np.log(data.target_tokens)) + p[4]
    accuracy = a / (1 + np.exp(-k * (loss - middle))) + b
    return {
        "step_1": loss / data.target[task][0] - 1,
        "chain": accuracy / data.target[task][1] - 1,
        "objective": objective,
        "A": float(np.exp(p[0])),
        "E": p[4],
    }


def compare_ladder(folder: Path, num_bootstrap: int, nested: bool) -> None:
    del nested
    data = ladder_data(folder)
    print(
        "\nTask ladder, 16 runs to 1.3B -> 13B on 5T tokens: relative errors in %, and 90 % intervals of the accuracy"
    )
    print(
        f"{'':<10}|{'step 1: loss':^23} |{'chain: |accuracy|':^23} |{'accuracy':^35} |{'objective of step 1':^27}"
        f"{'agree':>7}{'cond.':>9}"
    )
    print(
        f"{'task':<10}|{'paper':>7}{'again':>8}{'ours':>8} |{'paper':>7}{'again':>8}{'ours':>8} |{'measured':>9}"
        f"{'ours':>7}{'expected between':>19} |{'again':>16}{'ours':>11}{'':>16}  status of step 1; step 2"
    )
    for task in TASKS:
        again = published_ladder(data, task)
        ladder = fit_ladder(data.runs[task], data.checkpoints[task], num_bootstrap=num_bootstrap)
        try:
            ours = ladder.predict(TARGET[1], data.target_tokens)
        except UserError as error:
            print(f"{task:<10}| refused: {error}")
            continue
        loss, accuracy = data.target[task]
        certificate = ladder.step_1.certificate
        between = f"[{ours.measured_low:.3f}, {ours.measured_high:.3f}]"
        hit = " " if ours.measured_low <= accuracy <= ours.measured_high else "!"
        step_1 = PUBLISHED_STEP_1[task], 100 * again["step_1"], 100 * (ours.loss.value[0] / loss - 1)
        chain = 100 * PUBLISHED_CHAIN[task], 100 * abs(again["chain"]), 100 * abs(ours.accuracy / accuracy - 1)
        print(
            f"{task:<10}|{step_1[0]:>7.2f}{step_1[1]:>8.2f}{step_1[2]:>8.2f} |{chain[0]:>7.2f}{chain[1]:>8.2f}"
            f"{chain[2]:>8.2f} |{accuracy:>9.3f}{ours.accuracy:>7.3f}{between:>18}{hit} |{again['objective']:>16.4e}"
            f"{ladder.step_1.objective['value']:>11.4e}{certificate['agree_share']:>7.0%}"
            f"{certificate['condition_number']:>9.1e}  {ladder.step_1.status}; {ladder.step_2.status}"
        )
        for step in (ladder.step_1, ladder.step_2):
            if step.reasons:
                print(f"{'':<12}{step.law}: {'; '.join(step.reasons)}")


COMPARISONS = {"step_law": compare_step_law, "loss_to_loss": compare_loss_to_loss, "ladder": compare_ladder}
FOLDERS = {"step_law": "step_law", "loss_to_loss": "loss_to_loss", "ladder": "olmo_ladder"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", nargs="*", help=f"of {', '.join(COMPARISONS)}; all if none is named")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the published runs")
    parser.add_argument("--bootstrap", type=int, default=200, help="bootstrap samples of every interval")
    parser.add_argument(
        "--nested", action="store_true", help="step law: also choose the window without a held-out group"
    )
    options = parser.parse_args()
    for name in options.comparison or COMPARISONS:
        if name not in COMPARISONS:
            parser.error(f"comparison must be one of {', '.join(COMPARISONS)}, got {name}")
        if (options.data / FOLDERS[name]).is_dir():
            COMPARISONS[name](options.data, options.bootstrap, options.nested)
        else:
            print(f"{name}: {options.data / FOLDERS[name]} is not here")


if __name__ == "__main__":
    main()
