"""Programs side by side on several threads are the same programs one after the other, to the bit."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from landscape_ray.training.cohort import Cohort, plan
from landscape_ray.training.cohort.plan import Plan
from landscape_ray.training.cohort.workers import Workers

from .conftest import Configs, memory

Threads = Callable[[int], None]


@pytest.fixture
def threads() -> Iterator[Threads]:
    """A function that sets the number of torch's threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def in_new_thread() -> int:
    """Return the number of threads that kernels of a new thread take."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize(("total", "count", "share"), [(4, 2, 2), (3, 2, 1), (2, 2, 1), (1, 2, 1)])
def test_workers_share_the_threads_and_nobody_else_has_fewer(
    threads: Threads, total: int, count: int, share: int
) -> None:
    threads(total)
    workers = Workers(count)
    assert workers.run([torch.get_num_threads] * count) == [share] * count
    assert torch.get_num_threads() == total
    assert in_new_thread() == total


def test_each_function_has_its_thread() -> None:
    workers = Workers(2)
    first, second = (workers.run([threading.get_ident] * 2) for _ in range(2))
    assert first == second
    assert len({*first, threading.get_ident()}) == 3
    assert workers.run([threading.get_ident]) == first[:1]


def test_workers_are_at_work_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=30)
    assert sorted(Workers(2).run([meeting.wait] * 2)) == [0, 1]


def test_an_error_is_raised_when_nothing_goes_on_any_more() -> None:
    failed, ended = threading.Event(), threading.Event()

    def fail() -> None:
        failed.set()
        raise ValueError("no such kernel")

    def go_on() -> None:
        assert failed.wait(30)
        ended.set()

    with pytest.raises(ValueError, match="no such kernel"):
        Workers(2).run([fail, go_on])
    assert ended.is_set()


def test_threads_end_with_their_cohort(configs: Configs, threads: Threads) -> None:
    threads(2)
    before = set(threading.enumerate())
    cohort = Cohort.create(configs(), route="recorded", chunk=2)
    list(cohort.train(1))
    own = [thread for thread in threading.enumerate() if thread not in before and thread.name.startswith("cohort")]
    assert len(own) == 2
    del cohort
    gc.collect()
    for thread in own:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("shared", [{}, {"accumulation_steps": 2}, {"clipping__name": "auto"}], ids=str)
def test_threads_change_no_bit(configs: Configs, threads: Threads, chunk: int, shared: dict[str, Any]) -> None:
    found = []
    for number in (1, 2):
        threads(number)
        cohort = Cohort.create(configs(**shared), route="recorded", chunk=chunk)
        list(cohort.train())
        assert cohort._plan is not None
        assert len(cohort._plan.lanes) == number
        found.append([memory(cohort, k) for k in range(3)])
    for one, other in zip(*found, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.acceptance
def test_five_updates_saved_and_five_more_are_ten_side_by_side(
    configs: Configs, threads: Threads, tmp_path: Path
) -> None:
    threads(2)
    whole, first = (Cohort.create(configs(), route="recorded", chunk=2) for _ in range(2))
    list(whole.train(10))
    list(first.train(5))
    first.save(tmp_path)
    second, _ = Cohort.load(tmp_path)
    list(second.train(10))
    assert second._plan is not None
    assert len(second._plan.lanes) == 2
    for k in range(3):
        assert all(map(torch.equal, memory(whole, k), memory(second, k)))


@pytest.mark.parametrize(
    ("route", "chunk", "number", "lanes"),
    [
        ("recorded", 1, 2, [[0, 1], [2]]),
        ("recorded", 2, 2, [[0], [2]]),
        ("recorded", 1, 8, [[0], [1], [2]]),
        ("recorded", 3, 2, [[0]]),
        ("recorded", 1, 1, [[0, 1, 2]]),
        ("single", 1, 2, [[0, 1, 2]]),
        ("stacked", 1, 2, [[0, 1, 2]]),
    ],
)
def test_recorded_programs_are_shared_out(
    configs: Configs, threads: Threads, route: str, chunk: int, number: int, lanes: list[list[int]]
) -> None:
    threads(number)
    cohort = Cohort.create(configs(), route=route)
    assert cohort._buffers is not None
    for place in (None, torch.zeros_like(cohort._buffers.weights)):
        made = Plan(cohort._buffers, cohort.members, route, chunk, place)
        assert [[program.rows.start for program, _ in lane] for lane in made.lanes] == lanes
        memories = [{program.gradients.data_ptr() for program, _ in lane} for lane in made.lanes]
        assert all(len(own) == 1 for own in memories)
        assert len(set.union(*memories)) == len(lanes)
        assert made.each(lambda program, _: program.rows.start) == [start for lane in lanes for start in lane]


def test_the_share_of_each_thread_is_tried() -> None:
    assert plan._chunks(6, 1) == [2, 4, 6]
    assert plan._chunks(6, 2) == [2, 3, 4, 6]
    assert plan._chunks(2, 2) == [1, 2]
    assert plan._chunks(32, 2) == [2, 4, 8, 16, 32]
    assert plan._chunks(2, 16) == [1, 2]


def test_a_choice_on_two_threads_changes_nothing(configs: Configs, threads: Threads) -> None:
    threads(2)
    cohort = Cohort.create(configs())
    assert cohort._buffers is not None
    before = [memory(cohort, k) for k in range(3)]
    choice = plan.choose(cohort._buffers, cohort.members, cohort._batch())
    assert choice.seconds.keys() == {"single", "recorded/2", "recorded/3"}
    for k in range(3):
        assert all(map(torch.equal, before[k], memory(cohort, k)))
