"""What the first process of a trial makes of what the others say; the processes themselves are in tests/ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from torch import distributed

from landscape_ray.errors import UserError
from landscape_ray.sweep import workers
from landscape_ray.sweep.resources import ResourcesConfig
from landscape_ray.sweep.workers import Follower, Workers, lost_peer, use_interface, workers_of
from landscape_ray.training import TrainConfig, TrainState

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:22222"


class Watch:
    cause: Exception | None = None

    def __init__(self, calls: list[Any], release: Callable[[], None]) -> None:
        self.stop, self.explain = (lambda: None), (lambda: self.cause)


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """Two processes, of which the second one says nothing."""
    made = object.__new__(Workers)
    made._followers = [SimpleNamespace(train=SimpleNamespace(remote=lambda until: "call"))]
    made._backend = "gloo"
    monkeypatch.setattr(made, "_bring", lambda state: None)
    monkeypatch.setattr(workers.ray, "kill", lambda follower: None)
    monkeypatch.setattr(workers, "_Watch", Watch)
    return made


def failing(error: Exception) -> Callable[..., Iterator[Any]]:
    def train(state: Any, until: int) -> Iterator[Any]:
        raise error
        yield

    return train


def test_other_weights_are_an_error(team: Workers, tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainState.create(tiny_config)
    mine = (1, workers.fingerprint(state.module))
    monkeypatch.setattr(workers, "train", lambda state, until: iter(()))
    state.step = 1
    monkeypatch.setattr(workers, "_results", lambda calls: [mine])
    assert list(team.train(state, 1)) == []
    monkeypatch.setattr(workers, "_results", lambda calls: [(1, mine[1] + 1)])
    with pytest.raises(RuntimeError, match="worker 1 of the trial has other weights than worker 0 after step 1"):
        list(team.train(state, 1))


def test_a_replica_lives_as_long_as_the_state_of_the_first_process(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object that has made an update is no match for a new one, which has yet to ask which parameters are used."""
    follower, team = object.__new__(Follower), object.__new__(Workers)
    follower._state, team._known, sent = None, None, []

    def remote(*given: Any) -> None:
        sent.append(given)
        follower.open(*given)

    team._followers = [SimpleNamespace(open=SimpleNamespace(remote=remote))]
    monkeypatch.setattr(workers.ray, "put", lambda content: content)
    monkeypatch.setattr(workers, "_results", lambda calls: calls)
    state = TrainState.create(tiny_config)
    team._bring(state)
    first: Any = follower._state
    team._bring(state)
    assert len(sent) == 1, "there is nothing new"
    schedule = tiny_config.schedule.model_copy(update={"peak_lr": 0.5})
    state.config = tiny_config.model_copy(update={"schedule": schedule})
    team._bring(state)
    assert follower._state is first
    assert first.config == state.config
    state.restore(state.payload())
    team._bring(state)
    assert (len(sent), follower._state) == (3, first)
    team._bring(TrainState.create(tiny_config))
    last: Any = follower._state
    assert last is not first
    assert last.data is first.data
    assert last.config == tiny_config


def test_the_first_cause_is_told(team: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "train", failing(RuntimeError(GLOO)))
    monkeypatch.setattr(Watch, "cause", UserError("no such data"))
    with pytest.raises(UserError, match="no such data"):
        list(team.train(None, 1))  # type: ignore[arg-type]
    assert not team._sound
    monkeypatch.setattr(Watch, "cause", None)
    with pytest.raises(RuntimeError, match=r"the workers of the trial lost each other: .* Connection closed by peer"):
        list(team.train(None, 1))  # type: ignore[arg-type]
    monkeypatch.setattr(workers, "train", failing(ValueError("own")))
    with pytest.raises(ValueError, match="own"):
        list(team.train(None, 1))  # type: ignore[arg-type]


def test_the_others_are_ended_when_one_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the calls says only that somebody is gone; who that was is told a little later."""
    answers = {"first": [RuntimeError(GLOO)], "second": [TimeoutError(), RayActorError()]}

    def wait(calls: list[str], timeout: float) -> tuple[list[str], list[str]]:
        ready = [call for call in calls if not isinstance(answers[call][0], TimeoutError)][:1]
        answers["second"] = answers["second"][-1:]
        return ready, [call for call in calls if call not in ready]

    def get(call: str) -> None:
        raise answers[call][0]

    monkeypatch.setattr(workers.ray, "wait", wait)
    monkeypatch.setattr(workers.ray, "get", get)
    released: list[bool] = []
    watch = workers._Watch(["first", "second"], lambda: released.append(True))
    assert "died or its node was lost" in str(watch.explain())
    assert released == [True]
    answers["first"], released[:] = [UserError("own")], []
    watch = workers._Watch(["first"], lambda: released.append(True))
    assert str(watch.explain()) == "own"
    assert released == [True]


def test_what_an_error_means() -> None:
    assert lost_peer(RuntimeError(GLOO))
    assert lost_peer(distributed.DistBackendError("x"))
    assert not lost_peer(RuntimeError("CUDA out of memory"))
    assert "died or its node was lost" in str(workers._cause(RayActorError()))
    assert str(workers._cause(SimpleNamespace(cause=UserError("inner")))) == "inner"  # type: ignore[arg-type]


def test_one_worker_needs_nobody() -> None:
    assert workers_of(ResourcesConfig(), None) is None


@pytest.mark.skipif(not os.path.exists("/sys/class/net/lo"), reason="needs Linux")
def test_gloo_gets_the_interface_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "kept")
    use_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "kept", "the user's own choice stays"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    use_interface("203.0.113.7")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    use_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
