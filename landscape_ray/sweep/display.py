"""The live table of a running sweep: what each trial does, how far it is, and when the sweep will end."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from landscape_ray.records import RunSummary
from landscape_ray.tables import TextTable

STYLES = {"finished": "green", "running": "cyan", "diverged": "magenta", "failed": "red", "waiting": "dim"}
STYLES |= {"paused": "yellow", "stopped": "dim"}
ENDED = ("finished", "diverged", "stopped", "failed")
MAX_ROWS = 24
PLAIN_SECONDS = 30.0
"""Without a terminal, a line at most this often while nothing ends ..."""
NEWS_SECONDS = 1.0
"""... and this often while trials do, beside a line for each of them: it counts all of them ..."""
PAUSE_SHARE = 30.0
"""... which of thousands takes a while: then after so many times as long. The table likewise."""
MANY_ROWS = 1000
"""From so many trials on, a table that has just been drawn may stand."""


@dataclass(slots=True)
class Row:
    """What the table knows of one trial."""

    trial_id: str
    num_steps: int
    values: Mapping[str, Any] = field(default_factory=dict)
    status: str = "waiting"
    step: int = 0
    loss_nats: float = math.nan
    lr: float = math.nan
    first_step: int = 0
    """Where this driver found the trial; steps before it cost this driver no time."""


def short_values(values: Mapping[str, Any]) -> str:
    """Return searched values in one short line, by the last part of their names.

    >>> short_values({"schedule.peak_lr": 0.0031415, "schedule.name": "wsd"})
    'peak_lr=0.00314 name=wsd'
    """
    return " ".join(
        f"{name.rsplit('.', 1)[-1]}={value:.3g}" if isinstance(value, float) else f"{name.rsplit('.', 1)[-1]}={value}"
        for name, value in values.items()
    )


def duration(seconds: float) -> str:
    """Return a time span for people.

    >>> duration(42), duration(192), duration(7260)
    ('42 s', '3 min 12 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Halt(KeyboardInterrupt):
    """The sweep pauses as if the user had stopped it: everything up to the last commits is safe."""


class Dashboard:
    """Rows of trials as a rich table; also estimates the end of the sweep.

    Args:
        console: where to draw.
        name: of the sweep.
        num_trials: how many trials it has in all.
        num_steps: updates of a trial, for those not yet started.

    Attributes:
        halt: why the sweep pauses; empty while it does not.
    """

    def __init__(self, console: Console, name: str, num_trials: int, num_steps: int) -> None:
        self.console, self.name, self.num_trials, self.num_steps = console, name, num_trials, num_steps
        self.rows: dict[str, Row] = {}
        self.note = self.halt = ""
        self.loss_unit = "nats/token"
        self._started = time.monotonic()
        self._first_news: float | None = None
        self._last_plain = self._last_news = -math.inf
        self._counted_seconds = 0.0
        self._drawn: RenderableType | None = None
        self._stands_until = -math.inf
        self._unsaid = False
        self._live = Live(self, console=console, refresh_per_second=2, transient=False)

    def __enter__(self) -> Dashboard:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stands_until = -math.inf
        if self.console.is_terminal:
            self._live.stop()
        elif self._unsaid:
            self._say(self.headline())

    def known(self, summary: RunSummary) -> None:
        """Enter what an earlier driver left of a trial."""
        self.loss_unit = summary.loss_unit
        status = summary.status if summary.status in ("finished", "diverged", "stopped") else "waiting"
        row = Row(summary.run_id, summary.num_steps or self.num_steps, summary.varied, status, summary.step)
        row.loss_nats, row.first_step = summary.final_loss_nats, summary.step
        self.rows[summary.run_id] = row

    def update(self, trial_id: str, values: Mapping[str, Any], status: str, result: Mapping[str, Any]) -> None:
        """Take over the latest news of a trial."""
        if self._first_news is None:
            self._first_news = time.monotonic()
        row = self.rows.setdefault(trial_id, Row(trial_id, self.num_steps))
        news = status != row.status and status in ENDED
        row.values, row.status = values, status
        row.step = int(result.get("step", row.step))
        row.loss_nats = float(result.get("loss_nats", row.loss_nats))
        row.lr = float(result.get("lr", row.lr))
        self.loss_unit = str(result.get("loss_unit", self.loss_unit))
        if not self.console.is_terminal:
            now = time.monotonic()
            if news:
                self._say(f"{trial_id} {status}: {_number(row.loss_nats)} {self.loss_unit}  {short_values(values)}")
            pause = max(NEWS_SECONDS, PAUSE_SHARE * self._counted_seconds)
            if (news and now - self._last_news > pause) or now - self._last_plain > PLAIN_SECONDS:
                self._last_plain = now
                self._last_news = now if news else self._last_news
                self._unsaid = False
                self._say(self.headline())
                self._counted_seconds = time.monotonic() - now
            elif news:
                self._unsaid = True

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def heed(self, result: Mapping[str, Any], mirror: Any = None) -> None:
        """Show what a trial, or the storage, says is wrong; stop for what cannot go on.

        Args:
            result: of a trial.
            mirror: of the sweep's storage, with its `problem` and whether it is `superseded`; None without one.

        Raises:
            Halt: the disk is as full as it may be, or another driver has taken the sweep over.
        """
        if mirror is not None:
            self.warn(f"the storage is behind: {mirror.problem}" if mirror.problem else "")
            if mirror.superseded:
                raise self._halting("another driver has taken the sweep over")
        if full := result.get("disk_full"):
            raise self._halting(str(full))

    def _halting(self, reason: str) -> Halt:
        self.halt = reason
        return Halt(reason)

    def warn(self, note: str) -> None:
        """Show a note until there is another one; without a terminal once."""
        if note and note != self.note and not self.console.is_terminal:
            self.console.print(note, highlight=False, soft_wrap=True)
        self.note = note

    def counts(self) -> dict[str, int]:
        """Return how many trials have each status."""
        return dict(Counter(row.status for row in self.rows.values()))

    def remaining_seconds(self) -> float:
        """Return the estimated time to the end: steps to do over steps per second of this driver; nan before any.

        The clock starts when the first trial starts: what came before says nothing about the speed.
        """
        done = sum(row.step - row.first_step for row in self.rows.values())
        if done <= 0 or self._first_news is None:
            return math.nan
        return to_do_seconds(
            self.rows.values(), self.num_trials, self.num_steps, done, time.monotonic() - self._first_news
        )

    def headline(self) -> str:
        """Return one line: how many are done, best loss, time spent and left."""
        spent = time.monotonic() - self._started
        return headline(self.name, self.rows.values(), self.num_trials, self.loss_unit, spent, self.remaining_seconds())

    def __rich__(self) -> RenderableType:
        """Return the table as it stands, or as it stood just now where there are very many trials."""
        begun = time.monotonic()
        if self._drawn is None or len(self.rows) < MANY_ROWS or begun > self._stands_until:
            foot = [Text(self.note, style="yellow")] if self.note else []
            self._drawn = Group(Text(self.headline(), style="bold"), trial_table(self.rows.values()), *foot)
            now = time.monotonic()
            self._stands_until = now + PAUSE_SHARE * (now - begun)
        return self._drawn


def to_do_seconds(rows: Iterable[Row], num_trials: int, num_steps: int, done: int, seconds: float) -> float:
    """Return how long what is left takes at the speed so far.

    Args:
        rows: the trials that have begun.
        num_trials: how many there are to be.
        num_steps: updates of a trial that has not begun.
        done: updates made in `seconds`, at least one.
        seconds: how long they took.
    """
    rows = list(rows)
    to_do = sum(row.num_steps - row.step for row in rows if row.status not in ENDED)
    to_do += max(0, num_trials - len(rows)) * num_steps
    return to_do * seconds / done


def headline(name: str, rows: Iterable[Row], num_trials: int, loss_unit: str, spent: float, left: float) -> str:
    """Return a sweep in one line: how many trials have ended, the best loss, seconds spent and left (nan: unknown)."""
    rows = list(rows)
    counts = Counter(row.status for row in rows)
    ended = sum(counts[status] for status in ENDED)
    best = _best(rows)
    parts = [
        f"{name}: {ended}/{num_trials} trials ended",
        f"best {_number(best.loss_nats if best else math.nan)} {loss_unit}".rstrip(),
    ]
    if math.isfinite(spent):
        parts.append(f"{duration(spent)} spent")
    if math.isfinite(left) and ended < num_trials:
        end = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
        parts.append(f"about {duration(left)} left (until {end})")
    parts += [
        f"{number} {status}" for status in ("paused", "stopped", "diverged", "failed") if (number := counts[status])
    ]
    return " · ".join(parts)


def trial_table(rows: Iterable[Row]) -> RenderableType:
    """Return trials as a table: what runs first, then the best; the best of all in bold."""
    order = {"running": 0, "failed": 1, "waiting": 2}
    known = sorted(rows, key=lambda r: (order.get(r.status, 3), _nan_last(r.loss_nats), r.trial_id))
    rates = ("lr now",) if any(row.status == "running" for row in known[:MAX_ROWS]) else ()
    headings = ("trial", "status", "progress", "step", "held-out loss", *rates, "searched values")
    table = TextTable(headings, right=("step", "held-out loss", *rates), flexible=("searched values",))
    best = _best(known)
    for row in known[:MAX_ROWS]:
        table.add_row(
            row.trial_id,
            Text(row.status, style=STYLES.get(row.status, "")),
            ProgressBar(total=row.num_steps, completed=row.step, width=10),
            f"{row.step}/{row.num_steps}",
            _number(row.loss_nats),
            *(_number(row.lr, "{:.2e}") if row.status == "running" else "" for _ in rates),
            short_values(row.values),
            style="bold" if row is best else "",
        )
    more = [Text(f"... and {len(known) - MAX_ROWS} more", style="dim")] if len(known) > MAX_ROWS else []
    return Group(table, *more)


def _best(rows: Iterable[Row]) -> Row | None:
    """Return the trial with the lowest loss, of those that did not diverge."""
    sound = [row for row in rows if math.isfinite(row.loss_nats) and row.status != "diverged"]
    return min(sound, key=lambda row: row.loss_nats, default=None)


def _number(value: float, form: str = "{:.4f}") -> str:
    return form.format(value) if math.isfinite(value) else "-"


def _nan_last(value: float) -> float:
    return value if math.isfinite(value) else math.inf
