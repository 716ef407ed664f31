"""Prefetching changes when batches are made, never what they are."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from landscape_ray.data.dataset import Batch, Data
from landscape_ray.data.prefetch import Prefetcher
from landscape_ray.data.text import TextData
from landscape_ray.errors import UserError

CPU = torch.device("cpu")
TEXT = TextData(np.arange(50_000, dtype=np.uint32), np.arange(100, dtype=np.uint32), 50_000, 8)


class Watched(Data):
    """Text that notes in which thread each step was drawn, and misbehaves where it is told to."""

    def __init__(self, fails_at: int | None = None, seconds: float = 0.0) -> None:
        self.drawn: list[tuple[int, str]] = []
        self.fails_at = fails_at
        self.seconds = seconds

    signature = TEXT.signature  # type: ignore[assignment]
    corpus_id = ""  # type: ignore[assignment]

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        time.sleep(self.seconds)
        self.drawn.append((step, threading.current_thread().name))
        if step == self.fails_at:
            raise OSError(f"step {step} is on a broken disk")
        return TEXT.batch(seed, step, batch_size)

    def probe_batch(self, seed: int, batch_size: int) -> Batch:
        raise NotImplementedError

    def validation_batches(self, num_batches: int | None, batch_size: int) -> list[Batch]:
        raise NotImplementedError

    def steps(self) -> list[int]:
        return [step for step, _ in self.drawn]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert threads() == []


def equal(one: Batch, other: Batch) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


REQUESTS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple)),
        st.integers(0, 4),
        st.integers(1, 2),
        st.integers(1, 4),
    ),
    max_size=8,
)


@given(requests=REQUESTS, depth=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_batches_are_those_of_direct_loading_whatever_is_asked_for(
    requests: list[tuple[int | Sequence[int], int, int, int]], depth: int
) -> None:
    with Prefetcher(TEXT, CPU, depth) as loader:
        for seed, start, batch_size, length in requests:
            for step in range(start, start + length):
                drawn = TEXT.batch if isinstance(seed, int) else TEXT.batches
                assert equal(loader.get(seed, step, batch_size), drawn(seed, step, batch_size))  # type: ignore[arg-type]


def test_following_steps_are_drawn_once_in_order_in_one_thread() -> None:
    data = Watched()
    with Prefetcher(data, CPU, depth=2) as loader:
        for step in range(5, 15):
            loader.get(0, step, 4)
        loader.prepare()
        wait_until(lambda: len(data.drawn) == 12)
        time.sleep(0.01)
        assert data.steps() == list(range(5, 17))  # two ahead, not more
        assert {name for _, name in data.drawn} == {"prefetch"}


def test_the_thread_waits_for_a_good_moment_while_a_batch_is_left() -> None:
    data = Watched()
    with Prefetcher(data, CPU, depth=2) as loader:
        loader.get(0, 0, 4)
        loader.prepare()
        wait_until(lambda: data.steps() == [0, 1, 2])
        loader.get(0, 1, 4)
        time.sleep(0.05)
        assert data.steps() == [0, 1, 2]  # step 2 is ready, and the caller starts kernels now
        loader.prepare()
        wait_until(lambda: data.steps() == [0, 1, 2, 3])
        loader.get(0, 2, 4)
        loader.get(0, 3, 4)  # the last one that was ready
        wait_until(lambda: data.steps() == [0, 1, 2, 3, 4, 5])


def test_next_batch_is_made_while_the_caller_works() -> None:
    data = Watched()
    with Prefetcher(data, CPU, depth=1) as loader:
        loader.get(0, 0, 4)
        wait_until(lambda: data.steps() == [0, 1])  # nobody has asked for step 1 yet


def test_a_jump_discards_what_was_prepared() -> None:
    data = Watched()
    with Prefetcher(data, CPU, depth=2) as loader:
        loader.get(0, 0, 4)
        wait_until(lambda: len(data.drawn) == 3)
        assert equal(loader.get(0, 100, 4), TEXT.batch(0, 100, 4))
        assert equal(loader.get(0, 101, 4), TEXT.batch(0, 101, 4))
        assert data.steps()[:5] == [0, 1, 2, 100, 101]


def test_a_jump_away_from_a_batch_that_is_being_made() -> None:
    data = Watched(seconds=0.02)
    with Prefetcher(data, CPU, depth=2) as loader:
        loader.get(0, 0, 4)
        assert equal(loader.get(1, 1, 4), TEXT.batch(1, 1, 4))  # the same step, another seed
        assert equal(loader.get(1, 2, 3), TEXT.batch(1, 2, 3))  # another size


def test_without_depth_the_caller_draws() -> None:
    data = Watched()
    with Prefetcher(data, CPU, depth=0) as loader:
        loader.get(0, 0, 4)
        assert data.drawn == [(0, threading.current_thread().name)]
        assert threads() == []
    with Prefetcher(data, CPU) as loader:
        loader.get(0, 1, 4)
        assert threads() == []  # it does not pay on a CPU


def test_an_error_reaches_the_caller_at_its_step_and_can_be_tried_again() -> None:
    data = Watched(fails_at=2)
    with Prefetcher(data, CPU, depth=3) as loader:
        for step in range(2):
            assert equal(loader.get(0, step, 4), TEXT.batch(0, step, 4))
        for _ in range(2):
            with pytest.raises(OSError, match="step 2 is on a broken disk"):
                loader.get(0, 2, 4)
        data.fails_at = None
        assert equal(loader.get(0, 2, 4), TEXT.batch(0, 2, 4))
        assert equal(loader.get(0, 3, 4), TEXT.batch(0, 3, 4))


def test_an_error_of_a_batch_that_nobody_asks_for_is_no_error() -> None:
    data = Watched(fails_at=2)
    with Prefetcher(data, CPU, depth=3) as loader:
        loader.get(0, 0, 4)
        wait_until(lambda: 2 in data.steps())
        assert equal(loader.get(0, 7, 4), TEXT.batch(0, 7, 4))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_in_the_loop_ends_the_thread(error: type[BaseException]) -> None:
    def train() -> None:
        with Prefetcher(TEXT, CPU, depth=2) as loader:
            loader.get(0, 0, 4)
            assert threads() == ["prefetch"]
            raise error

    with pytest.raises(error):
        train()
    assert threads() == []


def test_closing_twice_and_closing_unused() -> None:
    loader = Prefetcher(Watched(seconds=0.02), CPU, depth=2)
    loader.get(0, 0, 4)
    loader.close()  # in the middle of a batch
    assert threads() == []
    loader.close()
    unused = Prefetcher(TEXT, CPU, depth=2)
    unused.close()
    for closed in (loader, unused):
        with pytest.raises(RuntimeError, match="the loader is closed; make another Prefetcher"):
            closed.get(0, 0, 4)


def closing_at(step: int) -> tuple[Watched, Prefetcher]:
    """A loader that its own thread closes: the garbage collector may run there."""
    data = Watched()
    loader = Prefetcher(data, CPU, depth=1)
    real = data.batch

    def batch(seed: int, at: int, batch_size: int) -> Batch:
        if at == step:
            loader.close()
        return real(seed, at, batch_size)

    data.batch = batch  # type: ignore[method-assign]
    return data, loader


def test_closing_from_its_own_thread() -> None:
    data, loader = closing_at(2)
    assert equal(loader.get(0, 0, 4), TEXT.batch(0, 0, 4))
    assert equal(loader.get(0, 1, 4), TEXT.batch(0, 1, 4))
    wait_until(lambda: threads() == [])
    assert data.steps() == [0, 1, 2]


def test_closing_while_the_caller_waits() -> None:
    _, loader = closing_at(0)
    with pytest.raises(RuntimeError, match="the loader is closed"):
        loader.get(0, 0, 4)
    wait_until(lambda: threads() == [])


def test_a_forgotten_loader_ends_when_it_is_collected() -> None:
    loader = Prefetcher(TEXT, CPU, depth=2)
    loader.get(0, 0, 4)
    assert threads() == ["prefetch"]
    del loader
    gc.collect()
    assert threads() == []


def test_a_forgotten_loader_does_not_hold_up_the_interpreter() -> None:
    code = (
        "import numpy as np, torch; from landscape_ray.data.prefetch import Prefetcher;"
        "from landscape_ray.data.text import TextData; tokens = np.arange(200, dtype=np.uint8);"
        "loader = Prefetcher(TextData(tokens, tokens, 256, 8), torch.device('cpu'), 2); loader.get(0, 0, 4)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_negative_depth() -> None:
    with pytest.raises(UserError, match="depth must be at least 0, got -1; 0 draws batches when they are asked for"):
        Prefetcher(TEXT, CPU, depth=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("depth", [None, 0, 1, 4])
def test_cuda_batches_are_those_of_direct_loading(depth: int | None) -> None:
    """The loop's stream is kept busy and drops its batches at once: a missing wait or a reused block would show."""
    device = torch.device("cuda")
    data = TextData(np.arange(5_000_000, dtype=np.uint32), np.arange(5000, dtype=np.uint32), 5_000_000, 1024)
    busy = torch.randn(2048, 2048, device=device)
    kept: list[tuple[int | tuple[int, ...], int, Batch]] = []
    with Prefetcher(data, device, depth) as loader:
        for step in range(60):
            seed: int | tuple[int, ...] = 0 if step < 30 else (1, 2) if step < 45 else (3, 3)
            inputs, targets = loader.get(seed, step, 64)
            assert inputs.device.type == targets.device.type == "cuda"
            for _ in range(5):
                busy = torch.tanh(busy @ busy)
            kept.append((seed, step, (inputs + 0 * busy[0, 0].long(), targets.clone())))
            del inputs, targets
    for seed, step, found in kept:
        drawn = data.batch(seed, step, 64) if isinstance(seed, int) else data.batches(seed, step, 64)
        assert equal((found[0].cpu(), found[1].cpu()), drawn)
