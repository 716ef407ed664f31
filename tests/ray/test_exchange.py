"""Orders and weights on Ray: waiting, bounded memory, and what happens when weights are lost."""

import time
from typing import Any

import numpy as np
import pytest

from landscape_ray.populations import Decision
from landscape_ray.sweep.population.orders import Order, Weights

pytestmark = pytest.mark.usefixtures("ray_session")


def order(member: int, serial: int, source: Weights | None = None) -> Order:
    return Order(serial, Decision(member, "continue", {"lr": 0.1}, 10 * serial + 10), source)


@pytest.mark.acceptance
def test_members_wait_for_orders_and_memory_is_bounded() -> None:
    import ray

    from landscape_ray.sweep.population.exchange import open_exchange, weights_limit

    assert weights_limit(4) > 2**20
    exchange = open_exchange("test-exchange")
    try:
        waiting = exchange.next.remote(0, 1)
        ray.get(exchange.publish.remote([order(0, 0), order(1, 0)]))
        assert ray.wait([waiting], timeout=0.2) == ([], [waiting])
        assert ray.get(exchange.next.remote(1, 0)).order == order(1, 0)
        for serial in range(5):
            for member in range(2):
                reference = ray.put(np.full(10, 10 * member + serial))
                ray.get(exchange.deposit.remote(Weights(member, serial), [reference]))
        assert ray.get(exchange.num_held.remote()) == 2, "the last of each member"
        ray.get(exchange.publish.remote([order(0, 1, source=Weights(1, 4))]))
        ray.get(exchange.deposit.remote(Weights(1, 5), [ray.put(np.zeros(10))]))
        handout = ray.get(waiting)
        assert handout.order == order(0, 1, source=Weights(1, 4))
        assert ray.get(handout.weights[0])[0] == 14, "those of the report, though the donor has gone on"
        assert ray.get(exchange.num_held.remote()) == 2
        waiting = exchange.next.remote(1, 7)
        ray.get(exchange.close.remote())
        assert ray.get(waiting, timeout=30) is None
        assert ray.get(exchange.next.remote(0, 0), timeout=30) is None
    finally:
        ray.kill(exchange)


@pytest.mark.acceptance
def test_lost_weights_are_told_from_those_that_are_there() -> None:
    """The process that put them there has died: whoever copies them reads the durable copy."""
    import ray

    from landscape_ray.sweep.population.exchange import Handout
    from landscape_ray.sweep.population.trainable import MemberTrainable

    class Donor:
        def put(self, value: int) -> list[Any]:
            return [ray.put(np.full(1_000_000, value, dtype=np.uint8))]

    donor = ray.remote(num_cpus=0)(Donor).remote()
    kept, lost = ray.get([donor.put.remote(7), donor.put.remote(8)])
    fetched = MemberTrainable._fetched
    assert fetched(None, Handout(order(0, 1), kept)) == bytes([7]) * 1_000_000
    assert fetched(None, Handout(order(0, 1), [])) is None
    ray.kill(donor)
    deadline = time.monotonic() + 60
    while (found := fetched(None, Handout(order(0, 1), lost))) is not None and time.monotonic() < deadline:
        assert found == bytes([8]) * 1_000_000, "nobody has noticed yet"
        time.sleep(0.1)
    assert found is None
