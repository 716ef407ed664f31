"""Batches prepared ahead of time: the next ones are drawn and copied to the device while this one is trained on.

A batch is a function of (seed, step), so that a thread can run ahead of the training loop and what it has prepared can
be thrown away when the loop goes elsewhere (a resume, an exploit): batches are the same with it and without.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from landscape_ray.data.dataset import Batch, Data
from landscape_ray.errors import UserError

CUDA_DEPTH = 2
"""Two batches, so that one of them may take long. More only take memory, as long as drawing is faster on average than
training."""


class Prefetcher:
    """Gives the batches of a training loop on its device.

    On CUDA a thread draws the next batches, puts them into pinned memory and copies them on a stream of its own, so
    that neither drawing nor copying holds the loop up. On the CPU the thread would take time from the loop's own
    threads, and batches are drawn when they are asked for.

    Use it as a context manager, or close it: its thread ends then, also after an exception. One that is forgotten ends
    with the interpreter, or when it is collected.

    >>> import numpy as np
    >>> from landscape_ray.data.text import TextData
    >>> data = TextData(np.arange(200, dtype=np.uint8), np.arange(100, dtype=np.uint8), 256, 8)
    >>> with Prefetcher(data, torch.device("cpu"), depth=2) as loader:
    ...     inputs, targets = loader.get(seed=0, step=3, batch_size=4)
    >>> bool((inputs == data.batch(0, 3, 4)[0]).all())
    True
    """

    def __init__(
        self, data: Data, device: torch.device, depth: int | None = None, part: tuple[int, int] = (0, 1)
    ) -> None:
        """Make a loader; its thread starts with the first batch.

        Args:
            data: what is drawn from.
            device: where batches are wanted.
            depth: batches prepared ahead; 0 draws them when they are asked for, without a thread. By default
                2 on CUDA and 0 elsewhere.
            part: number and count of the equal parts that batches are cut into, of which this loader gives one.

        Raises:
            UserError: a negative depth.
        """
        if depth is not None and depth < 0:
            raise UserError(f"depth must be at least 0, got {depth}; 0 draws batches when they are asked for")
        if device.type == "cuda" and device.index is None:  # which one that is, each thread answers for itself
            device = torch.device("cuda", torch.cuda.current_device())
        self._source = _Source(data, device, part)
        self._depth = depth if depth is not None else CUDA_DEPTH if device.type == "cuda" else 0
        self._worker: _Worker | None = None
        self._closed = False

    def get(self, seed: int | Sequence[int], step: int, batch_size: int) -> Batch:
        """Return the batch of one step on the device, and prepare those of the next steps.

        Any (seed, step, batch_size) may follow any other; only the step that follows this one has been prepared.

        Args:
            seed: seed of the run's data; or the seeds of K runs, for batches stacked as `Data.batches` stacks them.
            step: updates completed before this one, >= 0.
            batch_size: number of examples.

        Raises:
            RuntimeError: the loader is closed.
            Exception: whatever drawing this batch raises.
        """
        if self._closed:
            raise _closed()
        request = _Request(seed if isinstance(seed, int) else tuple(seed), step, batch_size)
        if self._depth == 0:
            return self._source.load(request)
        if self._worker is None:
            worker = _Worker(self._source, self._depth)
            self._stop = weakref.finalize(self, worker.stop)
            self._worker = worker
        return self._source.hand_over(self._worker.get(request))

    def prepare(self) -> None:
        """Draw the batches of the next steps now: for a moment when the caller is about to wait for the device.

        A thread that draws while its caller starts kernels takes the interpreter from it, and the device idles. Who
        never calls this gets the same batches: they are drawn when none is left.
        """
        if self._worker is not None:
            self._worker.wake()

    def close(self) -> None:
        """End the thread and drop what it has prepared; a second time does nothing."""
        self._closed = True
        if self._worker is not None:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _closed() -> RuntimeError:
    return RuntimeError("the loader is closed; make another Prefetcher")


class _Request(NamedTuple):
    seed: int | tuple[int, ...]
    step: int
    batch_size: int

    def following(self) -> _Request:
        return self._replace(step=self.step + 1)


class _Loaded(NamedTuple):
    """A batch on its way to the device."""

    request: _Request
    batch: Batch
    arrived: torch.cuda.Event | None = None
    """For a copy on another stream: what the reader has to wait for."""


class _Failed(NamedTuple):
    """Why there is no batch."""

    request: _Request
    error: BaseException


class _Source:
    """Draws batches and brings them to the device."""

    def __init__(self, data: Data, device: torch.device, part: tuple[int, int]) -> None:
        self._data = data
        self._part = part
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def load(self, request: _Request) -> Batch:
        """Return a batch on the device, on the stream of the caller."""
        inputs, targets = self._draw(request)
        return self._move(inputs), self._move(targets)

    def load_aside(self, request: _Request) -> _Loaded:
        """Return a batch whose copy to the device goes on, on a stream beside that of training."""
        if self._device.type != "cuda":
            return _Loaded(request, self.load(request))
        inputs, targets = self._draw(request)
        with torch.cuda.device(self._device):
            self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
            with torch.cuda.stream(self._stream):
                batch = self._move(inputs), self._move(targets)
                arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
                arrived.record()
        return _Loaded(request, batch, arrived)

    def hand_over(self, loaded: _Loaded | _Failed) -> Batch:
        """Return the batch, safe to use on the caller's stream, or raise what was raised instead."""
        if isinstance(loaded, _Failed):
            raise loaded.error
        if loaded.arrived is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(loaded.arrived)
            for tensor in loaded.batch:
                tensor.record_stream(stream)  # else its memory goes to the next copy as soon as Python drops it
        return loaded.batch

    def _draw(self, request: _Request) -> Batch:
        seed, step, batch_size = request
        if not isinstance(seed, int):
            return self._data.batches(seed, step, batch_size)
        inputs, targets = self._data.batch(seed, step, batch_size)
        index, count = self._part
        if count == 1:
            return inputs, targets
        return inputs.tensor_split(count)[index], targets.tensor_split(count)[index]

    def _move(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.to(self._device)
        if tensor.stride()[:1] == (0,):  # one batch seen as K: it is copied once
            return self._move(tensor[0]).expand_as(tensor)
        # The allocator of pinned memory keeps the source until the copy is done.
        return tensor.pin_memory().to(self._device, non_blocking=True)


class _Worker:
    """A thread that keeps the batches after the last one asked for ready, in order."""

    def __init__(self, source: _Source, depth: int) -> None:
        self._source = source
        self._depth = depth
        self._changed = threading.Condition()
        self._ready: deque[_Loaded | _Failed] = deque()
        self._next: _Request | None = None
        """What is to be loaded next; None before the first request and after an error."""
        self._loading: _Request | None = None
        self._stopped = False
        self._awake = True
        """Whether it may draw: not between a call of `get` that found more than one batch ready and one of `wake`."""
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def get(self, request: _Request) -> _Loaded | _Failed:
        """Wait for the result of one request; what was prepared for others is dropped."""
        with self._changed:
            coming = self._ready[0].request if self._ready else self._loading or self._next
            if coming != request:
                self._awake = True
                self._ready.clear()
                self._loading = None  # its result is not wanted any more
                self._next = request
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready or self._stopped)
            if self._stopped:
                raise _closed()
            loaded = self._ready.popleft()
            self._awake = not self._ready
            self._changed.notify_all()
            return loaded

    def wake(self) -> None:
        """Let the thread go on until enough is ready."""
        with self._changed:
            self._awake = True
            self._changed.notify_all()

    def stop(self) -> None:
        """End the thread, after the batch that it is loading."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._loading = None
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # the collector of garbage may run in any thread
            self._thread.join()

    def _run(self) -> None:
        while (request := self._take()) is not None:
            try:
                self._put(self._source.load_aside(request))
            except BaseException as error:  # whatever it is, the caller waits for it
                self._put(_Failed(request, error))

    def _take(self) -> _Request | None:
        """Wait for something to load; None at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or (self._awake and self._next and len(self._ready) < self._depth)
            )
            if self._stopped or self._next is None:
                return None
            self._loading, self._next = self._next, self._next.following()
            return self._loading

    def _put(self, loaded: _Loaded | _Failed) -> None:
        with self._changed:
            if self._loading is not loaded.request:
                return
            self._loading = None
            self._ready.append(loaded)
            if isinstance(loaded, _Failed):
                self._next = None  # the next ones would fail too
            self._changed.notify_all()
