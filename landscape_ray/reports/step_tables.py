"""The step law in words: its power products, what a choice costs, and the lines of a sweep file to train with."""

from __future__ import annotations

from rich.text import Text

from landscape_ray import text
from landscape_ray.analysis.optima import Plan
from landscape_ray.analysis.scaling import ScalingFit
from landscape_ray.laws import Excess, StepLaw
from landscape_ray.reports.terminal import STATUS_STYLE
from landscape_ray.tables import TextTable
from landscape_ray.text import lr, percent, plural


def number(value: float, digits: int = 3) -> str:
    """Return a number with so many digits that mean something, also where it is large.

    >>> number(321_057.8), number(0.00109473)
    ('321,000', '0.00109')
    """
    return text.number(float(f"{value:.{digits}g}"), digits)


def opening(found: ScalingFit) -> tuple[list[Text], TextTable]:
    """Return the headline of a fit with its law in one line, and the table of its power products."""
    fit, law = found.fit, StepLaw(found.fit)
    data = fit.data
    headline = Text.assemble(
        (f"step_law of {found.source}: ", "bold"),
        (fit.status, STATUS_STYLE[fit.status]),
        f", {plural(data['num_points'], 'run')} within {percent(data['window'])} of the best of their "
        f"{plural(len(law.groups), 'group')} (N, D); {plural(data['num_left_out'], 'worse one')} left out",
    )
    formula = Text(in_one_line(law), style="italic")
    head, rows = products(found)
    table = TextTable(head)
    for row in rows:
        table.add_row(*row)
    return [headline, formula], table


def in_one_line(law: StepLaw) -> str:
    """Return the best learning rate and batch as formulas."""
    parts = [("lr*", law.lr, "")] + ([] if law.batch is None else [("batch*", law.batch, " tokens")])
    found = []
    for name, product, unit in parts:
        powers = "".join(
            f" {axis}^{number(value, 3)}"
            for axis, value in (("N", -product.by_size), ("D", product.by_horizon))
            if value
        )
        found.append(f"{name} = {number(product.factor)}{powers}{unit}")
    return ", ".join(found)


def products(found: ScalingFit) -> tuple[list[str], list[list[str]]]:
    """Return the power products with their intervals as a table: headings and rows."""
    law = StepLaw(found.fit)
    rows = []
    for name, what, product, unit in (
        ("lr*", "best peak learning rate", law.lr, ""),
        ("batch*", "best batch", law.batch, " in tokens"),
    ):
        if product is None:
            continue
        ends = dict(product.intervals)
        if "by_size" in ends:  # N^-p: shown as the exponent that stands there
            ends["by_size"] = (-ends["by_size"][1], -ends["by_size"][0])
        parts = (
            ("factor", product.factor, f"{what}{unit}" + ("" if len(law.groups) == 1 else " at N = D = 1")),
            ("by_size", -product.by_size, f"{what}: exponent of N"),
            ("by_horizon", product.by_horizon, f"{what}: exponent of D"),
        )
        for part, value, meaning in parts:
            if part != "factor" and not value:  # one size or horizon, or held at 0
                continue
            between = ends.get(part)
            shown = "" if between is None else f"{number(between[0])} to {number(between[1])}"
            rows.append([name, number(value, 4), shown, meaning])
    return ["", "value", f"{found.fit.confidence:.0%} interval".replace("%", " %"), "meaning"], rows


def plan_text(plan: Plan) -> str:
    """Return a plan as a piece of a sweep file, with what is known about it in comments above."""
    choice, region = plan.choice, plan.region
    if plan.given_cost is None:
        lines = [f"{_place(plan)}:", f"lr       {_between(choice.lr, choice.lr_interval, 3)}; {_flat_lr(plan)}"]
    else:
        lines = [f"{_place(plan)}:", f"lr       {_between(choice.lr, choice.lr_interval, 3)}, the best for that batch"]
    if choice.batch is not None and plan.given_cost is not None:
        more = "more than " if plan.given_cost.beyond else ""
        lines.append(
            f"batch    {number(choice.batch)} tokens, as given: {more}{percent(plan.given_cost.value)} above the "
            f"lowest loss; {_flat_batch(plan)}"
        )
    elif choice.batch is not None:
        lines.append(f"batch    {_between(choice.batch, choice.batch_interval, 3)} tokens; {_flat_batch(plan)}")
        ends, rates = region.batch, region.lr_at_batch
        if ends and rates and "batch high" not in region.open_ends and plan.D != 1:
            lines.append(
                f"fastest  batch {number(ends[1])} at lr {lr(rates[1])}: {number(plan.D / ends[1])} updates, for "
                f"{percent(region.within)} more loss"
            )
    seen = "" if plan.held_out is None else f"; {percent(plan.held_out)} on groups left out of the fit"
    lines.append(f"regret   {percent(choice.expected_regret)} of the loss by what the law leaves open{seen}")
    lines.append(f"Intervals are at {plan.confidence:.0%}.".replace("%", " %"))
    return "\n".join([*(f"# {line}" for line in lines), "# put this into the sweep file:", *_toml(plan)])


def prediction_text(plan: Plan, cost: Excess | None, asked: dict[str, float]) -> str:
    """Return the best learning rate and batch in a sentence, and what the ones that were asked about cost."""
    choice, level = plan.choice, f"{plan.confidence:.0%}"
    said = f"{_place(plan)}: best lr {_best(choice.lr, choice.lr_interval, level)}"
    if choice.batch is not None:
        said += (
            f" for batch {number(choice.batch)}"
            if choice.batch_interval is None
            else f", batch {_best(choice.batch, choice.batch_interval, level)} tokens"
        )
    if cost is None:
        return said
    at = ", ".join(f"{name} = {number(asked[name], 3)}" for name in ("lr", "batch") if name in asked)
    if "batch" not in asked and plan.choice.batch is not None:
        at += " at the best batch"
    if cost.beyond:
        return f"{said}\n{at}: more than {percent(cost.value)} above the lowest loss, beyond what the law describes"
    between = f", {level} interval {percent(cost.low)} to {percent(cost.high)}" if cost.high > cost.low else ""
    return f"{said}\n{at}: {percent(cost.value)} above the lowest loss{between}"


def _place(plan: Plan) -> str:
    known = [(name, value) for name, value in (("N", plan.N), ("D", plan.D)) if value != 1]
    return ", ".join(f"{name} = {number(value, 3)}" for name, value in known) or "as the fitted runs"


def _flat_lr(plan: Plan) -> str:
    region = plan.region
    low, high = (lr(end) for end in region.lr)
    at = "" if plan.choice.batch is None else " at the best batch"
    return f"within {percent(region.within)} of the lowest loss from {_open(region.open_ends, 'lr', low, high)}{at}"


def _flat_batch(plan: Plan) -> str:
    region = plan.region
    assert region.batch is not None
    low, high = (number(end, 3) for end in region.batch)
    said = _open(region.open_ends, "batch", low, high)
    return f"within {percent(region.within)} from {said}, each with its best lr"


def _open(ends: tuple[str, ...], name: str, low: str, high: str) -> str:
    below = " or below" if f"{name} low" in ends else ""
    above = " or above (the end of what was tried)" if f"{name} high" in ends else ""
    return f"{low}{below} to {high}{above}"


def _toml(plan: Plan) -> list[str]:
    """Return the lines of [train]; what is not known is said in a comment."""
    lines = ["[train]"]
    if plan.num_steps is not None:
        lines.append(f"num_steps = {plan.num_steps}")
    per = plan.tokens_per_example
    if plan.batch_size is not None and per is not None:
        unit = "examples" if per == 1 else f"sequences of {per:,g} tokens, {plan.batch_size * per:,.0f} an update"
        lines.append(f"batch_size = {plan.batch_size}  # {unit}")
    elif plan.batch is not None:
        lines.append(f"# batch_size: {number(plan.batch, 3)} tokens over the context length")
    return [*lines, "", "[train.schedule]", f"peak_lr = {plan.choice.lr:.3g}"]


def _between(value: float, ends: tuple[float, float] | None, digits: int) -> str:
    shown = number(value, digits)
    return (
        shown
        if ends is None or ends[0] == ends[1]
        else f"{shown} ({number(ends[0], digits)} to {number(ends[1], digits)})"
    )


def _best(value: float, ends: tuple[float, float] | None, level: str) -> str:
    shown = f"[bold]{number(value, 3)}[/bold]"
    if ends is None or ends[0] == ends[1]:
        return shown
    return f"{shown}, {level} interval {number(ends[0], 3)} to {number(ends[1], 3)}"
