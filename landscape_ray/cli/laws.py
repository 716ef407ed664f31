"""The verbs of the laws: fit, predict, recommend."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from landscape_ray.cli.shared import (
    DEFAULT_RESULTS,
    OneSweep,
    Results,
    new_console,
    open_all,
    open_sweep,
    shown,
)
from landscape_ray.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from landscape_ray.analysis.table import RunTable

FILES = (".csv", ".gz", ".parquet", ".tsv")
"""Endings of foreign tables."""

Sources = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SOURCE]...", help="Sweeps, or a CSV or Parquet file; default: the newest sweep."),
]
LawName = Annotated[
    str | None,
    typer.Option("--law", help="Name of a law, or package.module:NAME of yours; default: annealing. `list --laws`."),
]
Column = Annotated[
    list[str] | None,
    typer.Option("--column", "-c", metavar="OURS=THEIRS", help="Column of a file, with a factor: N='Params (M)*1e6'."),
]
Where = Annotated[
    list[str] | None, typer.Option("--where", metavar="CONDITION", help="Keep lines that meet it: 'loss<4'.")
]
Experiment = Annotated[
    str | None,
    typer.Option("--experiment", help="MLflow experiment to read, from --tracking-uri, in place of a sweep."),
]
TrackingUri = Annotated[str | None, typer.Option("--tracking-uri", help="MLflow store or server of --experiment.")]
Fix = Annotated[list[str] | None, typer.Option("--fix", metavar="NAME=VALUE", help="A parameter that is given.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A variable of the law: N=1e9; C gives the one of N, D left out."),
]
Extrapolate = Annotated[
    bool, typer.Option("--extrapolate", help="Answer even at more than 100 times the fitted range.")
]


def fit(
    sources: Sources = None,
    law: LawName = None,
    column: Column = None,
    where: Where = None,
    experiment: Experiment = None,
    tracking_uri: TrackingUri = None,
    objective: Annotated[
        str, typer.Option("--objective", help="huber | least_absolute | least_squares, of the log loss.")
    ] = "huber",
    delta: Annotated[float, typer.Option("--delta", help="Threshold of huber.")] = 1e-3,
    fix: Fix = None,
    compare: Annotated[
        list[str] | None, typer.Option("--compare", metavar="LAW", help="Another law, to be compared on runs left out.")
    ] = None,
    non_embedding: Annotated[
        bool, typer.Option("--non-embedding", help="Count N of a sweep without embeddings and head.")
    ] = False,
    num_bootstrap: Annotated[int, typer.Option(min=0, help="Resamples behind the intervals.")] = 400,
    confidence: Annotated[float, typer.Option(min=0.01, max=0.999, help="Level of the intervals.")] = 0.9,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    results: Results = DEFAULT_RESULTS,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the fit; default: fits/ of the sweep, or beside you.")
    ] = None,
) -> None:
    """Fit a law to a sweep, an MLflow experiment or a table, and test it on what it has not seen."""
    console = new_console()
    if law in (None, "annealing") and not column and not where and not experiment and not _is_file(sources):
        _fit_annealing(sources, results, num_bootstrap, console)
        return
    if law is None:
        raise UserError("--law must name a law for a table or an experiment; `landscape-ray list --laws` shows them")
    from landscape_ray.analysis.scaling import fit_table, save
    from landscape_ray.laws import Objective
    from landscape_ray.reports.fit_page import write_page
    from landscape_ray.reports.law_tables import scaling_tables

    with _working(console, "reading the runs") as say:
        table, folder = _table(sources, experiment, tracking_uri, column, where, results, non_embedding)
        found = fit_table(
            law,
            table,
            objective=Objective.of(objective, delta),
            fix=_numbers("--fix", fix),
            candidates=compare or (),
            num_bootstrap=num_bootstrap,
            confidence=confidence,
            seed=seed,
            command=_command(),
            progress=say,
        )
        target = out if out is not None else folder / law.replace(":", ".")
        save(found, table, target)
        say("drawing the page")
        page = write_page(found, target)
    console.print(scaling_tables(found), highlight=False)
    console.print(f"saved in {shown(target)}; page: {shown(page)}", highlight=False, soft_wrap=True)
    console.print(f"next: landscape-ray predict {shown(target)} --set ...", highlight=False, soft_wrap=True)


def predict(
    source: Annotated[
        str | None, typer.Argument(metavar="[FIT]", help="A fit's folder, or a sweep; default: the newest sweep.")
    ] = None,
    values: Set = None,
    schedule: Annotated[str, typer.Option(help="constant | linear | cosine | wsd")] = "wsd",
    num_steps: Annotated[int | None, typer.Option(min=1, help="Updates; default: as in the fitted runs.")] = None,
    peak_lr: Annotated[float | None, typer.Option(min=0, help="Default: the peak that the law was fitted at.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(min=0, help="Default: as in the fitted runs.")] = None,
    final_ratio: Annotated[float, typer.Option(min=0, max=1)] = 0.0,
    cooldown_fraction: Annotated[float, typer.Option(min=0, max=1)] = 0.2,
    cooldown_shape: Annotated[str, typer.Option(help="linear | sqrt | cosine")] = "linear",
    extrapolate: Extrapolate = False,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Forecast with an interval: from a fit at --set N=.. D=.., or from a law of a sweep the end of a --schedule."""
    console = new_console()
    path = _fit_path(source, results)
    if path is None:
        if values:
            raise UserError(
                f"--set needs a fit of a table, got the sweep '{source or 'newest'}'; fit it with --law first"
            )
        shape = {
            "num_steps": num_steps,
            "peak_lr": peak_lr,
            "warmup_steps": warmup_steps,
            "final_ratio": final_ratio,
            "cooldown_fraction": cooldown_fraction,
            "cooldown_shape": cooldown_shape,
        }
        _predict_schedule(source, results, schedule, shape, console)
        return
    from landscape_ray.analysis.scaling import load, query
    from landscape_ray.laws import predict_points
    from landscape_ray.text import number

    found = load(path)
    law = found.law
    x = query(law, _numbers("--set", values))
    expected = predict_points(law, found.fit, {k: [v] for k, v in x.items()}, allow_extrapolation=extrapolate)
    at = ", ".join(f"{name} = {number(value)}" for name, value in x.items())
    ends = [number(float(end[0]), 5) for end in (expected.value, expected.low, expected.high)]
    measured = [number(float(end[0]), 5) for end in (expected.measured_low, expected.measured_high)]
    level = f"{expected.confidence:.0%}"
    console.print(
        f"{law.response.meaning or law.response.name} at {at}: [bold]{ends[0]}[/bold] {law.response.unit}, {level} "
        f"interval {ends[1]} to {ends[2]}; a measured one {measured[0]} to {measured[1]}",
        highlight=False,
        soft_wrap=True,
    )
    _warn(console, expected.warnings)


def recommend(
    source: Annotated[str, typer.Argument(metavar="FIT", help="Folder of a fit of a law over N and D.")],
    flops: Annotated[float | None, typer.Option(help="Budget of training FLOPs.")] = None,
    hours: Annotated[float | None, typer.Option(help="Budget of time, with --flops-per-second.")] = None,
    flops_per_second: Annotated[
        float | None, typer.Option(help="Training speed of all devices; default: as the fitted runs had it.")
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens that there are.")] = None,
    extrapolate: Extrapolate = False,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Say how large a model to train on how many tokens for a budget, with intervals, regret, and the next run."""
    from landscape_ray.analysis.recommend import recommend_size
    from landscape_ray.analysis.scaling import load
    from landscape_ray.reports.law_tables import recommendation_text

    path = _fit_path(source, results)
    if path is None:
        raise UserError(
            f"recommend needs a fit over N and D, got '{source}'; `landscape-ray fit {source} --law chinchilla`"
        )
    found = recommend_size(
        load(path),
        flops=flops,
        seconds=None if hours is None else 3600 * hours,
        flops_per_second=flops_per_second,
        tokens=tokens,
        allow_extrapolation=extrapolate,
    )
    console = new_console()
    console.print(recommendation_text(found), highlight=False, soft_wrap=True)
    _warn(console, found.allocation.warnings)


def _fit_annealing(sources: list[str] | None, results: Path, num_bootstrap: int, console: Console) -> None:
    from landscape_ray.analysis.annealing import fit_sweep
    from landscape_ray.reports.terminal import fit_tables

    for folder in open_all(sources, results):
        with console.status(f"fitting {folder.path.name} ..."):
            result = fit_sweep(folder, num_bootstrap=num_bootstrap)
        console.print(fit_tables(folder.path.name, result))
        console.print(f"saved in {shown(folder.fits_path)}", highlight=False, soft_wrap=True)


def _predict_schedule(
    sweep: OneSweep, results: Path, schedule: str, shape: Mapping[str, Any], console: Console
) -> None:
    from landscape_ray.analysis.annealing import load_fit
    from landscape_ray.analysis.forecast import forecast_schedule

    folder = open_sweep(sweep, results)
    fitted = load_fit(folder)
    if fitted is None:
        raise UserError(
            f"sweep '{folder.path.name}' has no fitted law; run `landscape-ray fit {folder.path.name}` first"
        )
    forecast = forecast_schedule(folder, fitted, schedule=schedule, **shape)
    console.print(forecast.sentence, highlight=False, soft_wrap=True)
    _warn(console, forecast.warnings)


def _table(
    sources: list[str] | None,
    experiment: str | None,
    tracking_uri: str | None,
    column: list[str] | None,
    where: list[str] | None,
    results: Path,
    non_embedding: bool,
) -> tuple[RunTable, Path]:
    """Return the runs of the sources, and the folder that fits to them go to."""
    from landscape_ray.analysis.table import read_table, table_of

    count: Literal["all", "non_embedding"] = "non_embedding" if non_embedding else "all"
    if experiment is not None:
        from landscape_ray.tracking.collect import collect_mlflow
        from landscape_ray.tracking.uris import resolve_tracking_uri

        if sources:
            raise UserError(f"--experiment takes the place of sources, got '{sources[0]}' too; give one of them")
        uri = resolve_tracking_uri(tracking_uri, results, None)
        collected = collect_mlflow(uri, experiment)
        return table_of(collected, f"experiment {experiment}", count=count), results / "fits" / experiment
    if _is_file(sources):
        assert sources is not None
        if len(sources) > 1:
            raise UserError(f"a table must come alone, got {len(sources)} sources; join the files first")
        path = Path(sources[0])
        return read_table(path, _mapping(column), where or ()), Path("fits") / path.name.split(".")[0]
    if column or where:
        raise UserError("--column and --where are for files; a sweep's columns are known: fit it with --law alone")
    from landscape_ray.analysis.table import joined
    from landscape_ray.tracking.collect import collect

    folders = open_all(sources, results)
    names = [folder.path.name for folder in folders]
    tables = [
        table_of(collect(folder.path), f"sweep {name}", count=count)
        for folder, name in zip(folders, names, strict=True)
    ]
    return joined(tables, names), Path(folders[0].fits_path)


def _fit_path(source: str | None, results: Path) -> Path | None:
    """Return where a saved fit of a table is, None if the source is a sweep."""
    if source is None:
        return None
    for candidate in (Path(source), results / source):
        if (candidate / "fit.json").is_file() or (candidate.is_file() and candidate.suffix == ".json"):
            return candidate
    return None


def _is_file(sources: list[str] | None) -> bool:
    return bool(sources) and any(Path(source).suffix.lower() in FILES for source in sources or ())


def _mapping(pairs: list[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or ():
        name, separator, value = pair.partition("=")
        if not separator or not name.strip() or not value.strip():
            raise UserError(f"--column must be OURS=THEIRS, got '{pair}'; for example N='Model Size'")
        found[name.strip()] = value.strip()
    return found


def _numbers(option: str, pairs: list[str] | None) -> dict[str, float]:
    found = {}
    for pair in pairs or ():
        name, _, value = pair.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"{option} must be NAME=NUMBER, got '{pair}'; for example N=1e9") from None
    return found


def _command() -> str:
    """Return the command line as a person would type it again."""
    return shlex.join(["landscape-ray", *sys.argv[1:]])


@contextlib.contextmanager
def _working(console: Console, first: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done."""
    with console.status(f"{first} ...") as status:
        yield lambda news: status.update(f"{news} ...")


def _warn(console: Console, warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False, soft_wrap=True)
