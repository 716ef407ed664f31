"""The verbs of the laws: fit, predict, recommend."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from landscape_ray.cli.optima import load_step, predict_step, recommend_step, refuse_options
from landscape_ray.cli.shared import (
    DEFAULT_RESULTS,
    Results,
    new_console,
    open_all,
    open_sweep,
    shown,
    warn,
)
from landscape_ray.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from landscape_ray.analysis.annealing import SweepFit
    from landscape_ray.analysis.table import RunTable
    from landscape_ray.tracking.folder import SweepFolder

STEP_LAW = "step_law"

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
    from landscape_ray.analysis.scaling import find_law, fit_table, save

    console = new_console()
    if law is None and (column or where or experiment or _is_file(sources)):
        raise UserError("--law must name a law for a table or an experiment; `landscape-ray list --laws` shows them")
    law = law or "annealing"
    if law != STEP_LAW and find_law(law).of == "curves":
        given = _Curves(sources, experiment, tracking_uri, column, where, results, out)
        _fit_curves(given, law, num_bootstrap, confidence, console)
        return
    if law == STEP_LAW:
        refuse_options(objective, delta, compare)
    from landscape_ray.analysis.optima import fit_step_table
    from landscape_ray.laws import Objective
    from landscape_ray.reports.fit_page import write_page
    from landscape_ray.reports.law_tables import scaling_tables

    with _working(console, "reading the runs") as say:
        table, folder = _table(sources, experiment, tracking_uri, column, where, results, non_embedding)
        options: dict[str, Any] = {
            "fix": _numbers("--fix", fix),
            "num_bootstrap": num_bootstrap,
            "confidence": confidence,
            "seed": seed,
            "command": _command(),
            "progress": say,
        }
        if law == STEP_LAW:
            found = fit_step_table(table, **options)
        else:
            chosen = Objective.of(objective, delta)
            found = fit_table(law, table, objective=chosen, candidates=compare or (), **options)
        target = out if out is not None else folder / law.replace(":", ".")
        save(found, table, target)
        say("drawing the page")
        page = write_page(found, target)
    console.print(scaling_tables(found), highlight=False, crop=False)
    console.print(f"saved in {shown(target)}; page: {shown(page)}", highlight=False, soft_wrap=True)
    verb = "recommend" if law == STEP_LAW else "predict"
    console.print(f"next: landscape-ray {verb} {shown(target)} --set ...", highlight=False, soft_wrap=True)


def predict(
    source: Annotated[
        str | None, typer.Argument(metavar="[FIT]", help="A fit's folder, or a sweep; default: the newest sweep.")
    ] = None,
    values: Set = None,
    law: Annotated[str, typer.Option("--law", help="Law of a sweep's curves.")] = "annealing",
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
        _predict_schedule(source, law, results, schedule, shape, console)
        return
    from landscape_ray.analysis.scaling import load, query
    from landscape_ray.laws import predict_points
    from landscape_ray.text import number

    found = load(path)
    if found.law_path == STEP_LAW:
        predict_step(found, _numbers("--set", values), extrapolate)
        return
    fitted = found.law
    x = query(fitted, _numbers("--set", values))
    expected = predict_points(fitted, found.fit, {k: [v] for k, v in x.items()}, allow_extrapolation=extrapolate)
    at = ", ".join(f"{name} = {number(value)}" for name, value in x.items())
    ends = [number(float(end[0]), 5) for end in (expected.value, expected.low, expected.high)]
    measured = [number(float(end[0]), 5) for end in (expected.measured_low, expected.measured_high)]
    level = f"{expected.confidence:.0%}"
    console.print(
        f"{fitted.response.meaning or fitted.response.name} at {at}: [bold]{ends[0]}[/bold] {fitted.response.unit}, "
        f"{level} interval {ends[1]} to {ends[2]}; a measured one {measured[0]} to {measured[1]}",
        highlight=False,
        soft_wrap=True,
    )
    warn(console, expected.warnings)


def recommend(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[FIT]", help="Fit over N and D, or of step_law; or a sweep: then the best schedule."),
    ] = None,
    values: Set = None,
    step_law: Annotated[
        Path | None, typer.Option("--with", metavar="FIT", help="Fit of step_law: also learning rate and batch.")
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Budget of training FLOPs.")] = None,
    hours: Annotated[float | None, typer.Option(help="Budget of time, with --flops-per-second.")] = None,
    flops_per_second: Annotated[
        float | None, typer.Option(help="Training speed of all devices; default: as the fitted runs had it.")
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens that there are.")] = None,
    law: Annotated[str, typer.Option("--law", help="Law of a sweep's curves.")] = "annealing",
    num_steps: Annotated[int | None, typer.Option(min=2, help="Updates of the schedule; default: as fitted.")] = None,
    family: Annotated[str, typer.Option("--family", help="wsd | free: what schedules to choose from.")] = "wsd",
    extrapolate: Extrapolate = False,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Say what to train: size and tokens for a budget, learning rate and batch for --set N=.. D=.., or a schedule."""
    from landscape_ray.analysis.recommend import recommend_size
    from landscape_ray.analysis.scaling import load
    from landscape_ray.reports.law_tables import recommendation_text

    path = _fit_path(source, results)
    if path is None:
        if values or step_law:
            raise UserError(
                f"--set and --with need a saved fit, got the sweep '{source or 'newest'}'; make one with "
                "`landscape-ray fit SOURCE --law step_law`"
            )
        if flops or hours or tokens:
            raise UserError(
                f"a budget needs a fit over N and D, got '{source or 'newest sweep'}'; make one with "
                "`landscape-ray fit SOURCE --law chinchilla`"
            )
        _recommend_schedule(source, law, num_steps, family, results)
        return
    fitted = load(path)
    if fitted.law_path == STEP_LAW:
        if flops or hours or tokens or step_law:
            raise UserError(
                "a budget needs a fit over N and D, with that of step_law as --with; for one N and D take --set N=.. "
                "--set D=.."
            )
        recommend_step(fitted, _numbers("--set", values), extrapolate)
        return
    if values:
        raise UserError(f"--set is for fits of step_law, got one of '{fitted.law_path}'; give --flops, or predict")
    beside = None if step_law is None else load_step(step_law)
    found = recommend_size(
        fitted,
        flops=flops,
        seconds=None if hours is None else 3600 * hours,
        flops_per_second=flops_per_second,
        tokens=tokens,
        allow_extrapolation=extrapolate,
    )
    console = new_console()
    console.print(recommendation_text(found), highlight=False, soft_wrap=True)
    warn(console, found.allocation.warnings)
    if beside is not None:
        best = found.allocation
        recommend_step(beside, {"N": best.num_params.value, "D": best.num_tokens.value}, extrapolate)


class _Curves(NamedTuple):
    """Where loss curves come from, as the options say."""

    sources: list[str] | None
    experiment: str | None
    tracking_uri: str | None
    column: list[str] | None
    where: list[str] | None
    results: Path
    out: Path | None


def _fit_curves(given: _Curves, law: str, num_bootstrap: int, confidence: float, console: Console) -> None:
    """Fit a law of loss curves to each sweep, or to the curves of an experiment or a file."""
    from landscape_ray.analysis.annealing import FILE_NAME, annealing_curves, fit_collected, fit_sweep
    from landscape_ray.analysis.scaling import find_law
    from landscape_ray.files import write_atomic
    from landscape_ray.reports.curves_page import write_curves_page
    from landscape_ray.reports.terminal import fit_tables
    from landscape_ray.tracking.collect import collect_csv, collect_mlflow
    from landscape_ray.tracking.uris import resolve_tracking_uri

    chosen = find_law(law)
    options: dict[str, Any] = {"law": chosen, "num_bootstrap": num_bootstrap, "confidence": confidence}
    if given.where:
        raise UserError("--where is for laws of tables; take the runs out of the file of curves")
    if given.experiment is None and not _is_file(given.sources):
        if given.column:
            raise UserError("--column is for files; a sweep's columns are known: leave it out")
        for folder in open_all(given.sources, given.results):
            with console.status(f"fitting {folder.path.name} ..."):
                result = fit_sweep(folder, **options)
            console.print(fit_tables(folder.path.name, result), crop=False)
            console.print(f"saved in {shown(folder.fits_path)}", highlight=False, soft_wrap=True)
        return
    if given.experiment is not None:
        uri = resolve_tracking_uri(given.tracking_uri, given.results, None)
        name, collected = given.experiment, collect_mlflow(uri, given.experiment)
        target = given.out if given.out is not None else given.results / "fits" / name
    else:
        assert given.sources is not None
        path = Path(given.sources[0])
        name, collected = path.name, collect_csv(path, _mapping(given.column) or None)
        target = given.out if given.out is not None else Path("fits") / path.name.split(".")[0]
    with console.status(f"fitting {name} ..."):
        result = fit_collected(collected, **options)
    write_atomic(target / FILE_NAME.format(law=chosen.name), result.to_json())
    curves = annealing_curves(collected).groups[0].curves
    page = write_curves_page(result, chosen, curves, name, target / f"{chosen.name}.html")
    console.print(fit_tables(name, result), crop=False)
    console.print(f"saved in {shown(target)}; page: {shown(page)}", highlight=False, soft_wrap=True)


def _predict_schedule(
    sweep: str | None, law: str, results: Path, schedule: str, shape: Mapping[str, Any], console: Console
) -> None:
    from landscape_ray.analysis.forecast import forecast_schedule

    forecast = forecast_schedule(_curve_fit(sweep, law, results)[1], schedule=schedule, **shape)
    console.print(forecast.sentence, highlight=False, soft_wrap=True)
    warn(console, forecast.warnings)


def _recommend_schedule(sweep: str | None, law: str, num_steps: int | None, family: str, results: Path) -> None:
    """Print the schedule that a sweep's law considers best, as TOML for the next sweep file."""
    from landscape_ray.analysis.annealing import annealing_curves
    from landscape_ray.laws import best_schedule
    from landscape_ray.reports.law_tables import schedule_text
    from landscape_ray.tracking.collect import collect

    folder, fitted = _curve_fit(sweep, law, results)
    curves = [c for c in annealing_curves(collect(folder.path)).groups[0].curves if c.run_id in fitted.run_ids]
    best = best_schedule(
        fitted.fit,
        curves,
        num_steps or fitted.num_steps,
        warmup_steps=fitted.warmup_steps,
        family=family,  # type: ignore[arg-type]  # checked there
    )
    console = new_console()
    console.print(schedule_text(best, fitted), highlight=False, markup=False, soft_wrap=True)
    warn(console, best.warnings)


def _curve_fit(sweep: str | None, law: str, results: Path) -> tuple[SweepFolder, SweepFit]:
    """Return a sweep and the law of its curves."""
    from landscape_ray.analysis.annealing import load_fit

    folder = open_sweep(sweep, results)
    fitted = load_fit(folder, law)
    if fitted is None:
        named = "" if law == "annealing" else f" --law {law}"
        raise UserError(
            f"sweep '{folder.path.name}' has no fitted law; run `landscape-ray fit {folder.path.name}{named}` first"
        )
    return folder, fitted


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
