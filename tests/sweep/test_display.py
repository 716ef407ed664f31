import io
import math
from typing import Any

from rich.console import Console

from landscape_ray.records import RunSummary
from landscape_ray.sweep.display import MAX_ROWS, Dashboard


def console(terminal: bool, width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)


def drawn(dashboard: Dashboard) -> str:
    screen = console(False, 120)
    screen.print(dashboard)
    out: Any = screen.file
    return str(out.getvalue())


def test_the_table_shows_what_each_trial_does() -> None:
    dashboard = Dashboard(console(True), "mine", 3, 100)
    dashboard.update("t0000", {"schedule.peak_lr": 0.003}, "running", {"step": 50, "loss_nats": 2.5, "lr": 0.001})
    dashboard.update("t0001", {"schedule.name": "wsd"}, "finished", {"step": 100, "loss_nats": 2.0})
    text = drawn(dashboard)
    assert "mine: 1/3 trials ended" in text
    assert "best 2.0000 nats/token" in text
    assert "50/100" in text
    assert "peak_lr=0.003" in text
    assert text.index("t0000") < text.index("t0001"), "running trials come first"


def test_the_end_is_estimated_from_this_drivers_speed(monkeypatch: Any) -> None:
    now = [0.0]
    monkeypatch.setattr("landscape_ray.sweep.display.time.monotonic", lambda: now[0])
    dashboard = Dashboard(console(True), "mine", 4, 100)
    assert math.isnan(dashboard.remaining_seconds())
    old = RunSummary(run_id="t0000", status="finished", config={}, varied={}, step=100, num_steps=100)
    half = RunSummary(run_id="t0001", status="running", config={}, varied={}, step=40, num_steps=100)
    dashboard.known(old)
    dashboard.known(half)
    now[0] = 10.0  # starting up took ten seconds; they say nothing about the speed
    dashboard.update("t0001", {}, "running", {})
    now[0] = 15.0
    dashboard.update("t0001", {}, "running", {"step": 50})
    # 10 steps in 5 s; 50 of this trial and 200 of two others are left
    assert dashboard.remaining_seconds() == 125.0


def test_without_a_terminal_the_news_are_lines() -> None:
    screen = console(False, 60)
    with Dashboard(screen, "mine", 2, 10) as dashboard:
        dashboard.update("t0000", {"schedule.peak_lr": 0.003}, "running", {"step": 5, "loss_nats": 2.5})
        dashboard.update("t0000", {"schedule.peak_lr": 0.003}, "finished", {"step": 10, "loss_nats": 2.25})
    out: Any = screen.file
    lines = out.getvalue().splitlines()
    assert "t0000 finished: 2.2500 nats/token  peak_lr=0.003" in lines
    assert any(line.startswith("mine: 1/2 trials ended") for line in lines)


def test_a_long_table_is_cut_and_says_so() -> None:
    dashboard = Dashboard(console(True), "mine", 100, 10)
    for number in range(100):
        dashboard.update(f"t{number:04d}", {}, "finished", {"step": 10, "loss_nats": 3.0 - number / 100})
    text = drawn(dashboard)
    assert f"... and {100 - MAX_ROWS} more" in text
    assert "t0099" in text, "the best are shown"
    assert dashboard.counts() == {"finished": 100}


def test_divergence_and_failure_are_counted_in_the_headline() -> None:
    dashboard = Dashboard(console(True), "mine", 3, 10)
    dashboard.update("t0000", {}, "diverged", {"step": 3, "loss_nats": math.nan})
    dashboard.update("t0001", {}, "failed", {})
    assert "1 diverged" in dashboard.headline()
    assert "1 failed" in dashboard.headline()
    assert "best - nats/token" in dashboard.headline()


def test_of_thousands_of_trials_the_whole_is_told_rarely(monkeypatch: Any) -> None:
    """Counting them takes a while, and would take it every second."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.01
        return now[0]

    monkeypatch.setattr("landscape_ray.sweep.display.time.monotonic", clock)
    told = Dashboard(console(False), "mine", 500, 1)
    headline = told.headline

    def slow() -> str:
        now[0] += 0.5
        return headline()

    monkeypatch.setattr(told, "headline", slow)
    with told:
        for number in range(300):
            now[0] += 0.1
            told.update(f"t{number:04d}", {}, "finished", {"step": 1, "loss_nats": 1.0})
    out: Any = told.console.file
    lines = out.getvalue().splitlines()
    assert sum(line.startswith("t0") for line in lines) == 300
    assert 2 <= sum(line.startswith("mine: ") for line in lines) <= 4
    assert "300/500" in lines[-1]

    monkeypatch.setattr("landscape_ray.sweep.display.MANY_ROWS", 2)
    shown = Dashboard(console(True), "mine", 3, 1)
    shown.update("t0", {}, "running", {})
    assert shown.__rich__() is not shown.__rich__(), "of few trials it is as it is now"
    shown.update("t1", {}, "running", {})
    drawn_once = shown.__rich__()
    assert shown.__rich__() is drawn_once
    now[0] += 60.0
    again = shown.__rich__()
    assert again is not drawn_once
    shown.__exit__(None, None, None)
    assert shown.__rich__() is not again, "the end is shown as it is"
