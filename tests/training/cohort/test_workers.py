"""Programs side by side on several threads are the same programs one after the other, to the bit."""

from __future__ import annotations

import gc
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from landscape_ray.training.cohort import Cohort
from landscape_ray.training.cohort.plan import Plan
from landscape_ray.training.cohort.workers import Workers

from .conftest import Configs, Threads, memory, weights


@pytest.mark.parametrize(("total", "count", "share"), [(4, 2, 2), (3, 2, 1), (2, 2, 1), (1, 2, 1)])
def test_workers_share_the_threads_and_the_caller_gets_its_own_back(
    threads: Threads, total: int, count: int, share: int
) -> None:
    threads(total)
    workers, found = Workers(count), [0] * count

    def ask(number: int) -> None:
        found[number] = torch.get_num_threads()

    with workers.sharing():
        workers.run([lambda i=i: ask(i) for i in range(count)])  # type: ignore[misc]
    assert found == [share] * count
    assert torch.get_num_threads() == total


def test_each_function_has_its_thread_and_they_work_at_the_same_time() -> None:
    workers, meeting = Workers(2), threading.Barrier(2, timeout=30)
    found: list[list[int]] = [[], []]

    def meet(number: int) -> None:
        meeting.wait()
        found[number].append(threading.get_ident())

    for _ in range(2):
        workers.run([lambda: meet(0), lambda: meet(1)])
    assert found[0] == [threading.get_ident()] * 2
    assert found[1][0] == found[1][1] != threading.get_ident()


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_is_raised_when_nothing_goes_on_any_more(failing: int) -> None:
    failed, ended = threading.Event(), threading.Event()

    def fail() -> None:
        failed.set()
        raise ValueError("no such kernel")

    def go_on() -> None:
        assert failed.wait(30)
        ended.set()

    workers = Workers(2)
    with pytest.raises(ValueError, match="no such kernel"):
        workers.run([fail, go_on] if failing == 0 else [go_on, fail])
    assert ended.is_set()
    workers.run([lambda: None] * 2)  # they are not stuck


def test_threads_end_with_their_cohort(configs: Configs, threads: Threads) -> None:
    threads(2)
    before = set(threading.enumerate())
    cohort = Cohort.create(configs(), route="abreast", chunk=2)
    list(cohort.train(1))
    own = [thread for thread in threading.enumerate() if thread not in before and thread.name == "cohort"]
    assert len(own) == 1
    del cohort
    gc.collect()
    own[0].join(30)
    assert not own[0].is_alive()


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("shared", [{}, {"accumulation_steps": 2}, {"clipping__name": "auto"}], ids=str)
def test_threads_change_no_bit(configs: Configs, threads: Threads, chunk: int, shared: dict[str, Any]) -> None:
    found = []
    for number in (1, 2):
        threads(number)
        cohort = Cohort.create(configs(**shared), route="abreast", chunk=chunk)
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
    whole, first = (Cohort.create(configs(), route="abreast", chunk=1) for _ in range(2))
    list(whole.train(10))
    list(first.train(5))
    first.save(tmp_path)
    second, _ = Cohort.load(tmp_path)
    list(second.train(10))
    assert second._plan is not None
    assert len(second._plan.lanes) == 2
    for k in range(3):
        assert all(map(torch.equal, memory(whole, k), memory(second, k)))


def test_a_member_that_diverges_on_one_thread_touches_none_on_another(configs: Configs, threads: Threads) -> None:
    threads(2)
    calm, broken = (Cohort.create(configs(), route="abreast", chunk=1) for _ in range(2))
    for cohort in (calm, broken):
        list(cohort.train(3))
    with torch.no_grad():
        next(broken.members[2].module.parameters())[0, 0] = math.nan
    kept = weights(broken.members[2])
    list(calm.train(6))
    list(broken.train(6))
    assert broken.members[2].diverged is not None
    assert torch.equal(kept.nan_to_num(), weights(broken.members[2]).nan_to_num())
    for k in (0, 1):
        assert all(map(torch.equal, memory(calm, k), memory(broken, k)))


@pytest.mark.parametrize(
    ("route", "chunk", "number", "lanes"),
    [
        ("abreast", 1, 2, [[0], [1, 2]]),
        ("abreast", 2, 2, [[0], [2]]),
        ("abreast", 1, 8, [[0], [1], [2]]),
        ("abreast", 3, 2, [[0]]),
        ("abreast", 1, 1, [[0, 1, 2]]),
        ("recorded", 1, 2, [[0, 1, 2]]),
        ("single", 1, 2, [[0, 1, 2]]),
    ],
)
def test_programs_are_shared_out(
    configs: Configs, threads: Threads, route: str, chunk: int, number: int, lanes: list[list[int]]
) -> None:
    threads(number)
    cohort = Cohort.create(configs(), route=route)
    assert cohort._buffers is not None
    made = Plan(cohort._buffers, cohort.members, route, chunk)
    assert [[program.rows.start for program, _ in lane] for lane in made.lanes] == lanes
    memories = [{program.gradients.data_ptr() for program, _ in lane} for lane in made.lanes]
    assert all(len(own) == 1 for own in memories)
    assert len(set.union(*memories)) == len(lanes)
    for backwards in (False, True):
        seen: list[int] = []
        made.each(lambda program, _: seen.append(program.rows.start), backwards=backwards)  # noqa: B023
        assert sorted(seen) == sorted(start for lane in lanes for start in lane)
