"""Numbers as people write them: short, with units, never more digits than are meant."""

from __future__ import annotations

import json
import math
from typing import Any

_SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float, digits: int = 4) -> str:
    """Return `value` with `digits` significant digits and no exponent where that stays readable.

    >>> number(2.04567), number(0.0030000001), number(12345.6), number(float("nan"))
    ('2.046', '0.003', '12,346', '–')
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 10**digits:
        text = f"{value:,.0f}" if magnitude < 1e7 else f"{value:.{digits - 1}e}"
    elif magnitude < 1e-4:
        text = f"{value:.{digits - 1}e}"
    else:
        text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def loss(value: float) -> str:
    """Return a loss with four decimals, the precision at which schedules differ.

    >>> loss(2.0456789)
    '2.0457'
    """
    return f"{value:.4f}" if math.isfinite(value) else "–"


def signed(value: float, digits: int = 4) -> str:
    """Return a difference with its sign.

    >>> signed(0.01234), signed(-0.5)
    ('+0.0123', '−0.5000')
    """
    if not math.isfinite(value):
        return "–"
    return f"{'−' if value < 0 else '+'}{abs(value):.{digits}f}"


def lr(value: float) -> str:
    """Return a learning rate: decimal where short, else with a power of ten.

    >>> lr(0.003), lr(0.0012345), lr(2.5e-5)
    ('0.003', '0.00123', '2.5e-5')
    """
    return number(value, 3)


def percent(fraction: float, digits: int = 2) -> str:
    """Return a fraction as per cent with `digits` significant digits.

    >>> percent(0.01234), percent(0.5), percent(0.00001)
    ('1.2 %', '50 %', '< 0.01 %')
    """
    if not math.isfinite(fraction):
        return "–"
    hundred = 100 * fraction
    if 0 < abs(hundred) < 0.01:
        return "< 0.01 %"
    if abs(hundred) >= 10**digits:
        return f"{hundred:,.0f} %"
    return f"{hundred:.{digits}g} %"


def si(value: float, unit: str = "") -> str:
    """Return a count with a metric prefix.

    >>> si(1_234_567), si(950), si(3.2e15, "FLOP")
    ('1.23 M', '950', '3.2 PFLOP')
    """
    if not math.isfinite(value):
        return "–"
    for scale, prefix in _SI:
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def duration(seconds: float) -> str:
    """Return a time span in its two largest units.

    >>> duration(3725), duration(59.6), duration(0.25), duration(90000)
    ('1 h 2 min', '1 min', '0.25 s', '1 d 1 h')
    """
    if not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.2g} s"
    rest = round(seconds)
    if rest < 60:
        return f"{rest} s"
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for index, (size, name) in enumerate(units):
        if rest >= size:
            whole, rest = divmod(rest, size)
            smaller = units[index + 1]
            second = rest // smaller[0]
            return f"{whole} {name} {second} {smaller[1]}" if second else f"{whole} {name}"
    return f"{rest} s"


def value(item: Any) -> str:
    """Return any configuration value in one short piece of text.

    >>> value(0.003), value(True), value("cosine"), value([1, 2]), value(None)
    ('0.003', 'yes', 'cosine', '[1, 2]', '–')
    """
    match item:
        case None:
            return "–"
        case bool():
            return "yes" if item else "no"
        case int():
            return f"{item:,}" if abs(item) >= 10_000 else str(item)
        case float():
            return number(item)
        case str():
            return item
        case _:
            return json.dumps(item, sort_keys=True, default=str)


def plural(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> plural(1, "run"), plural(3, "run"), plural(2, "copy"), plural(2, "class")
    ('1 run', '3 runs', '2 copies', '2 classes')
    """
    if count == 1:
        return f"{count:,} {noun}"
    if noun.endswith("ss"):
        return f"{count:,} {noun}es"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("y") else f"{count:,} {noun}s"


def ordinal(place: int) -> str:
    """Return a place in an order, counted from 1.

    >>> ordinal(2), ordinal(3), ordinal(11), ordinal(21)
    ('2nd', '3rd', '11th', '21st')
    """
    ending = "th" if 10 <= place % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"


def listing(items: list[str]) -> str:
    """Return items as an English list.

    >>> listing(["a", "b", "c"]), listing(["a"])
    ('a, b and c', 'a')
    """
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "none"
