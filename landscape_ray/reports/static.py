"""A figure as PNG or SVG bytes, drawn by matplotlib without a display, for documents and tracking servers."""

from __future__ import annotations

import io
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from landscape_ray.reports.figures import (
    NUM_SEQUENTIAL,
    Axis,
    Figure,
    Series,
    Theme,
    extent,
    log_ticks,
    palette,
    visible,
)
from landscape_ray.text import number

WIDTH_INCHES = 8.0
DPI = 160
LEGEND_CHARACTERS = 115
"""How many fit side by side, the marks and gaps counted as eight each."""
LINEWIDTH = {"main": 2.4, "normal": 1.5, "muted": 0.9}
ALPHA = {"main": 1.0, "normal": 1.0, "muted": 0.7}
DASH = {"solid": "-", "dash": "--", "dot": ":"}
MARKER = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "cross": "X",
    "star": "*",
}


def height_inches(figure: Figure) -> float:
    """Return the height that a figure is drawn at: one panel 4.6 in, further panels add in proportion, bars less."""
    first = figure.panels[0].share
    if any(item.role == "bar" for item in figure.panels[0].series):
        return 1.9 + 0.6 * len(figure.panels[0].y.categories)
    return 4.6 + sum(3.4 * panel.share / first for panel in figure.panels[1:])


def render(figure: Figure, kind: Literal["png", "svg"] = "png", theme: Theme = "light") -> bytes:
    """Return the figure as an image file, with its title and its takeaway above the axes.

    Args:
        figure: what to draw.
        kind: png (1280 px wide) or svg.
        theme: colours for a light or a dark ground.
    """
    colors = palette(theme)
    canvas = Canvas(
        figsize=(WIDTH_INCHES, height_inches(figure)), dpi=DPI, layout="constrained", facecolor=colors["ground"]
    )
    FigureCanvasAgg(canvas)
    canvas.get_layout_engine().set(w_pad=0.12, h_pad=0.06)  # type: ignore[union-attr, call-arg]
    shares = [panel.share for panel in figure.panels]
    grid = canvas.subplots(len(shares), 1, sharex=True, squeeze=False, height_ratios=shares)
    axes: list[Axes] = [row[0] for row in grid]
    for ax, panel in zip(axes, figure.panels, strict=True):
        ax.set_facecolor(colors["ground"])
        for item in panel.series:
            _draw(ax, item, colors)
        _style(ax, colors)
        _scale(ax, panel.y, extent(figure, panel), "y", colors)
    _scale(axes[-1], figure.x, extent(figure), "x", colors)
    if figure.colorbar is not None:
        _colorbar(canvas, axes, figure, colors)
    _legend(canvas, figure, colors)
    canvas.suptitle(_literal(figure.title), x=0.012, ha="left", fontsize=13, fontweight="bold", color=colors["text"])
    axes[0].set_title(
        _literal(_wrapped(figure.takeaway, _characters(figure))), loc="left", fontsize=9.5, color=colors["faint"], pad=8
    )
    out = io.BytesIO()
    # no date and no random identifiers: equal figures are equal bytes
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": figure.key}):
        canvas.savefig(out, format=kind, facecolor=colors["ground"], metadata=metadata)
    return out.getvalue()


def _draw(ax: Axes, item: Series, colors: dict[str, str]) -> None:
    color, width, alpha = colors[item.color], LINEWIDTH[item.weight], ALPHA[item.weight]
    order = {"muted": 2.0, "normal": 3.0, "main": 4.0}[item.weight]
    match item.role:
        case "line":
            ax.plot(item.x, item.y, DASH[item.dash], color=color, lw=width, alpha=alpha, zorder=order)
        case "step":
            style: dict[str, Any] = {
                "ls": DASH[item.dash],
                "color": color,
                "lw": width,
                "alpha": alpha,
                "zorder": order,
            }
            ax.step(item.x, item.y, where="post", **style)
        case "points":
            style = {"marker": MARKER[item.symbol], "color": color, "alpha": alpha, "zorder": order + 0.5}
            ax.scatter(
                item.x,
                item.y,
                s=item.size**2 * (1.1 if item.symbol == "star" else 0.6),
                edgecolors=colors["ground"],
                linewidths=0.6,
                **style,
            )
        case "band":
            assert item.low is not None
            assert item.high is not None
            ax.fill_between(item.x, item.low, item.high, color=color, alpha=0.2, lw=0, zorder=1.5)
        case "hline":
            ax.axhline(float(item.y[0]), ls=DASH[item.dash], color=color, lw=width, zorder=order)
        case "bar":
            reached: dict[int, float] = {}  # by row: a series need not have a bar in each
            for patch in ax.patches:
                row = round(patch.get_y() + patch.get_height() / 2)  # type: ignore[attr-defined]
                reached[row] = reached.get(row, 0.0) + patch.get_width()  # type: ignore[attr-defined]
            left = [reached.get(round(row), 0.0) for row in item.y]
            ax.barh(item.y, item.x, left=left, height=0.55, color=color, edgecolor=colors["ground"], zorder=order)
        case "arrow":
            arrow: dict[str, Any] = {
                "arrowstyle": "-|>",
                "color": color,
                "lw": width,
                "shrinkA": 0,
                "shrinkB": 0,
                "mutation_scale": 11,
            }
            ends: dict[str, Any] = {"xy": (item.x[1], item.y[1]), "xytext": (item.x[0], item.y[0])}
            ax.annotate("", arrowprops=arrow, zorder=order, **ends)
            ax.plot(item.x, item.y, alpha=0)  # annotations do not move the limits
    if item.role in ("line", "step", "points") and item.low is not None and item.high is not None:
        error = np.abs(np.stack([item.y - item.low, item.high - item.y]))
        ax.errorbar(item.x, item.y, yerr=error, fmt="none", ecolor=color, elinewidth=1, capsize=2, alpha=alpha)


def _style(ax: Axes, colors: dict[str, str]) -> None:
    ax.grid(color=colors["grid"], lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=colors["faint"], labelsize=9)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colors["faint"])


def _scale(ax: Axes, axis: Axis, drawn: tuple[float, float], which: Literal["x", "y"], colors: dict[str, str]) -> None:
    target = ax.xaxis if which == "x" else ax.yaxis
    target.set_label_text(_literal(axis.title), color=colors["text"], fontsize=10)
    set_limits = ax.set_xlim if which == "x" else ax.set_ylim
    if axis.categories:
        target.set_major_locator(FixedLocator(range(len(axis.categories))))
        target.set_major_formatter(FixedFormatter([_literal(name) for name in axis.categories]))
        target.grid(False)
        set_limits(len(axis.categories) - 0.4, -0.6)
        return
    low, high = visible(axis, drawn)
    if axis.scale == "log":
        (ax.set_xscale if which == "x" else ax.set_yscale)("log")
        set_limits(low, high)
        ticks = log_ticks(low, high)
        target.set_major_locator(FixedLocator(ticks))
        target.set_major_formatter(FixedFormatter([number(tick, 3) for tick in ticks]))
        target.set_minor_locator(NullLocator())
        return
    set_limits(low, high)
    if which == "x":
        target.set_major_formatter(FuncFormatter(lambda value, _: number(value, 6)))


def _colorbar(canvas: Canvas, axes: list[Axes], figure: Figure, colors: dict[str, str]) -> None:
    bar = figure.colorbar
    assert bar is not None
    stops = [colors[f"seq:{level}"] for level in range(NUM_SEQUENTIAL)]
    levels = LinearSegmentedColormap.from_list("sequential", stops)
    drawn = canvas.colorbar(ScalarMappable(Normalize(bar.best, bar.worst), levels), ax=axes, pad=0.015, aspect=40)
    drawn.set_label(_literal(bar.label), color=colors["text"], fontsize=9)
    drawn.ax.tick_params(colors=colors["faint"], labelsize=8)
    drawn.outline.set_visible(False)


def _legend(canvas: Canvas, figure: Figure, colors: dict[str, str]) -> None:
    handles: list[Line2D | Patch] = []
    for item in figure.legend:
        color, label = colors[item.color], _literal(item.name)
        if item.role in ("band", "bar"):
            handles.append(Patch(color=color, alpha=0.2 if item.role == "band" else 1.0, label=label))
        elif item.role == "points":
            handles.append(Line2D([], [], ls="", marker=MARKER[item.symbol], color=color, label=label, ms=6))
        else:
            width = LINEWIDTH[item.weight]
            handles.append(Line2D([], [], ls=DASH[item.dash], lw=width, color=color, label=label))
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = max(1, min(len(handles), LEGEND_CHARACTERS // (longest + 8)))
        where: dict[str, Any] = {"loc": "outside lower left", "ncols": columns, "frameon": False, "fontsize": 9}
        canvas.legend(handles=handles, labelcolor=colors["text"], **where)


def _characters(figure: Figure) -> int:
    """Return how many characters fit above the axes: names at the vertical axis take room from about 20 on."""
    longest = max(len(name) for panel in figure.panels for name in (*panel.y.categories, ""))
    return max(40, min(100, 118 - longest))


def _wrapped(text: str, width: int = 100) -> str:
    words: list[str] = []
    for word in text.split():
        # what stands in parentheses is a formula or an interval, and stays on one line unless it is long
        inside = bool(words) and len(words[-1]) < 30 and words[-1].count("(") > words[-1].count(")")
        if inside or (words and word.startswith("%")):
            words[-1] += f" {word}"
        else:
            words.append(word)
    lines, line = [], ""
    for word in words:
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def _literal(text: str) -> str:
    """Return text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")
