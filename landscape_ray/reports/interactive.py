"""A figure as a plotly specification whose colours are names, so that the page can paint it light or dark.

The specification is plain JSON data: `"@c0"` and `"@c0/0.2"` stand for a colour and a transparent colour of the theme;
the page's script replaces them before it calls `Plotly.react`. The legend is HTML (it wraps, and it can be reached
by keyboard), made from :func:`legend`.
"""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from landscape_ray.reports.figures import (
    NUM_SEQUENTIAL,
    Axis,
    Figure,
    Floats,
    Panel,
    Series,
    extent,
    log_ticks,
    visible,
)
from landscape_ray.text import number

WIDTH = {"main": 3.0, "normal": 1.8, "muted": 1.1}
OPACITY = {"main": 1.0, "normal": 1.0, "muted": 0.75}
SYMBOL = {"cross": "x"}
"""Where plotly's name is another one."""

UNIFIED_LIMIT = 6
"""Up to this many answering curves, one hover box shows them all; above, only the nearest answers."""


def plotly_js() -> str:
    """Return the source of plotly.js, to be embedded once in a page."""
    source: str = get_plotlyjs()
    return source


def specification(figure: Figure) -> dict[str, Any]:
    """Return `{data, layout}` of a figure, with colour names for colours."""
    everything = [item for panel in figure.panels for item in panel.series]
    curves = not figure.x.categories and any(item.role in ("line", "step") for item in everything)
    unified = curves and 0 < sum(bool(item.hover) for item in everything) <= UNIFIED_LIMIT
    data = [
        _trace(figure, panel, item, "y" if index == 0 else f"y{index + 1}", unified)
        for index, panel in enumerate(figure.panels)
        for item in panel.series
    ]
    if figure.colorbar is not None:
        data.append(_colorbar(figure))
    return {"data": data, "layout": _layout(figure, unified)}


def legend(figure: Figure) -> list[dict[str, str]]:
    """Return the legend entries of a figure: name, colour name, and how the mark looks."""
    entries = []
    for item in figure.legend:
        mark = {"points": item.symbol, "band": "band", "bar": "bar", "arrow": "arrow"}.get(item.role, item.dash)
        entries.append({"name": item.name, "color": item.color, "mark": mark, "weight": item.weight})
    return entries


def _trace(figure: Figure, panel: Panel, item: Series, yaxis: str, unified: bool) -> dict[str, Any]:
    base: dict[str, Any] = {
        "type": "scatter",
        "yaxis": yaxis,
        "legendgroup": item.name or None,
        "name": html.escape(item.name),
        "showlegend": False,
        "hoverinfo": "skip",
    }
    colour = f"@{item.color}"
    match item.role:
        case "line" | "step":
            base |= {"mode": "lines", "x": _plain(item.x), "y": _plain(item.y), "opacity": OPACITY[item.weight]}
            base["line"] = {"color": colour, "width": WIDTH[item.weight], "dash": item.dash}
            if item.role == "step":
                base["line"]["shape"] = "hv"
        case "points":
            base |= {"mode": "markers", "x": _plain(item.x), "y": _plain(item.y), "opacity": OPACITY[item.weight]}
            edge = {"color": "@ground", "width": 1}
            base["marker"] = {"color": colour, "size": item.size, "line": edge, "symbol": _symbol(item.symbol)}
        case "band":
            base |= {"mode": "lines", "fill": "toself", "fillcolor": f"{colour}/0.2", "line": {"width": 0}}
            assert item.low is not None
            assert item.high is not None
            base["x"] = _plain(np.concatenate([item.x, item.x[::-1]]))
            base["y"] = _plain(np.concatenate([item.low, item.high[::-1]]))
        case "hline":
            low, high = visible(figure.x, extent(figure))
            base |= {"mode": "lines", "x": _plain(np.array([low, high])), "y": _plain(np.repeat(item.y[:1], 2))}
            base["line"] = {"color": colour, "width": WIDTH[item.weight], "dash": item.dash}
        case "bar":
            base |= {"type": "bar", "orientation": "h", "x": _plain(item.x), "y": _plain(item.y), "width": 0.55}
            base["textposition"] = "none"  # what pointing at a bar says is not written into it
            base["marker"] = {"color": colour, "line": {"color": "@ground", "width": 1}}
        case "arrow":
            base |= {"mode": "lines+markers", "x": _plain(item.x), "y": _plain(item.y)}
            base["line"] = {"color": colour, "width": WIDTH[item.weight]}
            base["marker"] = {"symbol": "arrow", "angleref": "previous", "size": [0, item.size], "color": colour}
    if item.role in ("line", "step", "points") and item.low is not None and item.high is not None:
        base["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": _plain(item.high - item.y),
            "arrayminus": _plain(item.y - item.low),
            "color": colour,
            "thickness": 1.2,
            "width": 3,
        }
    if item.hover:
        base |= _hover(figure.x, panel.y, item, unified)
    return {key: value for key, value in base.items() if value is not None}


def _hover(x: Axis, y: Axis, item: Series, unified: bool) -> dict[str, Any]:
    """Return the hover text: what it is, then its value with the unit; where it is too, unless a shared box says so."""
    per_point = not isinstance(item.hover, str)
    said = "%{text}" if per_point else html.escape(str(item.hover)).replace("%{", "%&#123;")
    if item.role == "bar":
        value = "%{x:.4~g}" + (f" {x.unit}" if x.unit else "")
    elif y.categories:
        value = ""
    else:
        value = "%{y:.5~g}" + (f" {y.unit}" if y.unit else "")
    if value and item.role in ("line", "step") and not unified:
        said += f"<br>{html.escape(x.label)} %{{x:,.6~g}}"
    shown = {"hovertemplate": f"{said}{': ' if value else ''}{value}<extra></extra>", "hoverinfo": None}
    return shown | ({"text": [html.escape(text) for text in item.hover]} if per_point else {})


def _layout(figure: Figure, unified: bool) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "autosize": True,
        "showlegend": False,
        "barmode": "stack",
        "paper_bgcolor": "@ground",
        "plot_bgcolor": "@ground",
        "font": {"color": "@faint", "size": 13, "family": "system-ui, sans-serif"},
        "margin": {"l": 12, "r": 22, "t": 10, "b": 12},
        "hovermode": "x unified" if unified else "closest",
        "hoversubplots": "axis",
        "hoverlabel": {
            "bgcolor": "@ground",
            "bordercolor": "@grid",
            "font": {"color": "@text", "size": 13},
            "align": "left",
        },
        "uirevision": "kept",
        "xaxis": _axis(figure.x, extent(figure)),
    }
    shares = [panel.share for panel in figure.panels]
    gap = 0.07
    usable = 1.0 - gap * (len(shares) - 1)
    top = 1.0
    for index, panel in enumerate(figure.panels):
        bottom = max(0.0, top - usable * shares[index] / sum(shares))
        axis = _axis(panel.y, extent(figure, panel)) | {"domain": [round(bottom, 6), round(top, 6)]}
        if panel.y.categories:
            axis["autorange"] = "reversed"
            axis.pop("range", None)
        layout["yaxis" if index == 0 else f"yaxis{index + 1}"] = axis
        top = bottom - gap
    last = len(figure.panels)
    layout["xaxis"] |= {"spikecolor": "@faint", "spikethickness": 1}
    if unified:
        layout["xaxis"]["unifiedhovertitle"] = {"text": f"{html.escape(figure.x.label)} %{{x:,.6~g}}"}
    layout["xaxis"]["anchor"] = "y" if last == 1 else f"y{last}"
    return layout


def _axis(axis: Axis, drawn: tuple[float, float]) -> dict[str, Any]:
    low, high = visible(axis, drawn)
    out: dict[str, Any] = {
        "title": {"text": html.escape(axis.title), "standoff": 10, "font": {"color": "@text", "size": 13}},
        "automargin": True,
        "gridcolor": "@grid",
        "linecolor": "@faint",
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "@faint",
    }
    if axis.categories:
        count = len(axis.categories)
        out |= {"tickvals": list(range(count)), "ticktext": [html.escape(name) for name in axis.categories]}
        out["showgrid"] = False
    elif axis.scale == "log":
        out["type"] = "log"
        out["range"] = [round(math.log10(low), 6), round(math.log10(high), 6)]
        ticks = log_ticks(low, high)
        out |= {"tickvals": list(ticks), "ticktext": [number(tick, 3) for tick in ticks]}
    else:
        out |= {"nticks": 7, "tickformat": ",~s" if high >= 1e5 else ",~g", "range": [low, high]}
    return out


def _colorbar(figure: Figure) -> dict[str, Any]:
    """Return an invisible point that carries the sequential scale."""
    bar = figure.colorbar
    assert bar is not None
    last = NUM_SEQUENTIAL - 1
    scale: list[list[Any]] = [[level / last, f"@seq:{level}"] for level in range(NUM_SEQUENTIAL)]
    best, worst = bar.best, bar.worst
    return {
        "type": "scatter",
        "x": [None],
        "y": [None],
        "mode": "markers",
        "showlegend": False,
        "hoverinfo": "skip",
        "marker": {
            "color": [best],
            "cmin": best,
            "cmax": worst,
            "colorscale": scale,
            "showscale": True,
            "colorbar": {
                "title": {"text": html.escape(bar.label), "side": "right", "font": {"size": 12, "color": "@text"}},
                "thickness": 10,
                "outlinewidth": 0,
                "len": 1,
                "xpad": 6,
                "nticks": 6,
                "tickformat": ".4~g",
            },
        },
    }


def _symbol(name: str) -> str:
    return SYMBOL.get(name, name)


def _plain(values: Floats) -> list[float | int | None]:
    """Return values as JSON numbers with seven significant digits; what is not finite becomes null.

    >>> _plain(np.array([1.0, np.nan, 0.123456789]))
    [1, None, 0.1234568]
    """
    rounded = (float(f"{value:.7g}") if math.isfinite(value) else None for value in values.tolist())
    return [int(v) if v is not None and v.is_integer() and abs(v) < 1e15 else v for v in rounded]
