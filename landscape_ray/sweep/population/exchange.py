"""Where the trials of a population fetch their orders on Ray, and the weights that come with them.

One small actor holds the latest order of each member, and references to the weights of its last report in Ray's object
store. A trial that has reported waits here for its next order, with its actor and its data in place; what it copies
comes out of the memory of its node. No more than two sets of weights a member are held; a set is given up when its
member reports again and nobody has yet to copy it.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from landscape_ray.sweep.population.orders import Order, Weights

WAITERS = 10_000
"""Members that may wait at the same time."""

STORE_SHARE = 0.5
"""Of the object store that weights may fill. Larger ones go through files."""


class Handout(NamedTuple):
    """An order as a trial gets it."""

    order: Order
    weights: list[Any]
    """A reference to the content of a checkpoint, or nothing."""
    needed: tuple[int, ...] = ()
    """Serials of the member's own earlier weights that others may still ask for."""


class Exchange:
    """Holds orders and references. Runs as an actor, see `open_exchange`."""

    def __init__(self) -> None:
        self._orders: dict[int, Order] = {}
        self._weights: dict[Weights, list[Any]] = {}
        self._wanted: dict[int, Weights] = {}
        """What members have yet to copy."""
        self._needed: dict[int, tuple[int, ...]] = {}
        self._closed = False
        self._news = asyncio.Condition()

    async def publish(self, orders: list[Order], needed: frozenset[Weights] = frozenset()) -> None:
        """Let members know what to do next, and which weights on their disks must stay."""
        async with self._news:
            for member in self._orders.keys() | {order.decision.member for order in orders}:
                self._needed[member] = tuple(weights.serial for weights in needed if weights.member == member)
            for order in orders:
                member = order.decision.member
                self._orders[member] = order
                if order.source is not None:
                    self._wanted[member] = order.source
            self._news.notify_all()

    async def close(self) -> None:
        """Let everybody who waits, or comes to wait, go home."""
        async with self._news:
            self._closed = True
            self._news.notify_all()

    async def next(self, member: int, serial: int) -> Handout | None:
        """Wait for an order of a member with this number or a later one, and return it; None at closing time."""
        async with self._news:
            await self._news.wait_for(
                lambda: self._closed or (member in self._orders and self._orders[member].serial >= serial)
            )
            if self._closed:
                return None
            order = self._orders[member]
            weights = [] if order.source is None else self._weights.get(order.source, [])
            self._wanted.pop(member, None)
            self._clear()
            return Handout(order, weights, self._needed.get(member, ()))

    async def deposit(self, weights: Weights, reference: list[Any]) -> None:
        """Keep the weights of a member's report, until its next one."""
        self._weights[weights] = reference
        self._clear()

    async def num_held(self) -> int:
        """Return how many sets of weights are held."""
        return len(self._weights)

    def _clear(self) -> None:
        latest: dict[int, int] = {}
        for weights in self._weights:
            latest[weights.member] = max(weights.serial, latest.get(weights.member, -1))
        wanted = set(self._wanted.values())
        for weights in list(self._weights):
            if weights.serial < latest[weights.member] and weights not in wanted:
                del self._weights[weights]


def open_exchange(name: str) -> Any:
    """Return a new exchange as an actor beside this process, which trials find by its name."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_concurrency=WAITERS)(Exchange)
    return actor.options(name=name, scheduling_strategy=here).remote()


def weights_limit(num_members: int) -> int:
    """Return how many bytes a member's weights may have to go through the object store, given its present size."""
    return int(STORE_SHARE * ray.cluster_resources().get("object_store_memory", 0.0) / (2 * num_members))
