"""Scaling laws in a terminal: a fit, a recommendation, the list of laws."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from landscape_ray.analysis.annealing import SweepFit
from landscape_ray.analysis.recommend import Recommendation
from landscape_ray.analysis.scaling import ScalingFit
from landscape_ray.laws import LAWS, BestSchedule
from landscape_ray.laws.decisions import Quantity
from landscape_ray.laws.optima.batch import CRITICAL_BATCH_TOKENS
from landscape_ray.laws.optima.surface import FORMULA as STEP_FORMULA
from landscape_ray.laws.optima.surface import NAME as STEP_LAW
from landscape_ray.laws.optima.surface import REFERENCE as STEP_REFERENCE
from landscape_ray.laws.optima.surface import TITLE as STEP_TITLE
from landscape_ray.reports import step_tables
from landscape_ray.reports.terminal import STATUS_STYLE, left_out_text
from landscape_ray.tables import TextTable
from landscape_ray.text import duration, lr, number, percent


def scaling_tables(found: ScalingFit) -> RenderableType:
    """Return a fit as its parameters, its forecasts beyond the fitted range, and what to know before use."""
    fit = found.fit
    if found.law_path == STEP_LAW:
        head, body = step_tables.opening(found)
        return Group(*head, body, *_remarks(found))
    headline = Text.assemble(
        (f"{found.law.name} law of {found.source}: ", "bold"),
        (fit.status, STATUS_STYLE[fit.status]),
        f", {fit.data['num_points']} points of {len(fit.data['runs'])} runs, R² {fit.residuals['r2']:.5f}",
    )
    formula = Text(found.law.formula, style="italic")
    parameters = TextTable(("parameter", "value", f"{fit.confidence:.0%} interval", "meaning"), flexible=("meaning",))
    for name, value in fit.parameters.items():
        between = fit.intervals.get(name)
        text = f"{number(between[0])} to {number(between[1])}" if between else "given" if name in fit.fixed else ""
        parameters.add_row(name, number(value, 5), text, found.law.parameter(name).meaning)
    return Group(headline, formula, parameters, *_remarks(found))


def _remarks(found: ScalingFit) -> list[Text]:
    """Return the forecasts beyond what was fitted, and what to know before use."""
    fit = found.fit
    beyond = [Text(f"held out: {one}") for one in found.rollouts]
    notes = [Text(f"not certified: {reason}", style="yellow") for reason in fit.reasons]
    notes += [Text(f"warning: {warning}", style="yellow") for warning in fit.warnings]
    notes += [
        Text(f"{item.name}: {item.remark}", style="yellow")
        for item in found.record
        if item.verdict in ("warning", "refusal") and item.section in "BCDE" and item.name != "optimum" and item.remark
    ]
    left = [Text(left_out_text(found.excluded), style="dim")] if found.excluded else []
    return [*beyond, *notes, *left]


def recommendation_text(found: Recommendation) -> str:
    """Return a recommendation in sentences."""
    best = found.allocation
    level = f"{best.confidence:.0%}"
    time = f", about {duration(found.seconds)} at the speed of the fitted runs" if found.seconds else ""
    ratio = number(best.num_tokens.value / best.num_params.value, 3)
    lines = [
        f"[bold]{number(best.flops, 3)} FLOPs[/bold]{time}:",
        f"  size    [bold]{_quantity(best.num_params)}[/bold] parameters",
        f"  data    [bold]{_quantity(best.num_tokens)}[/bold] tokens, {ratio} a parameter",
        f"  loss    [bold]{_quantity(best.loss, 5)}[/bold]; a measured one {number(best.measured[0], 5)} to "
        f"{number(best.measured[1], 5)}",
        f"  regret  {number(best.regret.value, 2)} on average, {number(best.regret.high, 2)} at worst, over what the "
        "law leaves open",
        f"  growth  the best size grows with the compute to the power {_quantity(best.exponent, 3)}",
        f"  Intervals are at {level}.",
    ]
    if found.next_runs:
        lines.append("the next run, to be surer of the size:")
        lines += [
            f"  N = {number(run.variables['N'], 3)}, D = {number(run.variables['D'], 3)} ({number(run.cost, 2)} FLOPs, "
            f"{percent(run.cost / best.flops)} of the budget): the interval shrinks by {percent(1 - run.width_ratio)}"
            for run in found.next_runs
        ]
    return "\n".join(lines)


def schedule_text(best: BestSchedule, fitted: SweepFit) -> str:
    """Return a schedule chosen by a law: what is expected of it, and the TOML that trains it."""
    end = best.prediction
    low, value, high = (number(float(part[-1]), 5) for part in (end.low, end.loss_nats, end.high))
    return "\n".join(
        [
            f"# {best.description}; peak LR {lr(best.peak_lr)}, {best.num_steps} updates",
            f"# expected: {value} {fitted.loss_unit}, {end.confidence:.0%} interval {low} to {high}",
            f"# gain over the best fitted schedule ({best.compared_with}): {number(best.gain_nats, 2)} "
            f"({number(best.gain_low, 2)} to {number(best.gain_high, 2)})",
            "# put this into the sweep file:",
            best.toml(),
        ]
    )


def law_table() -> TextTable:
    """Return the laws that can be fitted."""
    table = TextTable(
        ("law", "formula", "what it is for", "reference"), flexible=("formula", "what it is for", "reference")
    )
    for law in LAWS.values():
        table.add_row(law.name, law.formula, law.title, law.reference)
        if law is CRITICAL_BATCH_TOKENS:
            table.add_row(STEP_LAW, STEP_FORMULA, STEP_TITLE, STEP_REFERENCE)
    return table


def _quantity(value: Quantity, digits: int = 3) -> str:
    return f"{number(value.value, digits)} ({number(value.low, digits)} to {number(value.high, digits)})"
