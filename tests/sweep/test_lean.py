"""What Ray is spared for each trial, on its own controller without its processes; tests/ray has whole sweeps."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.tune import registry
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.utils.callback import _create_default_callbacks

from landscape_ray.sweep import lean
from landscape_ray.sweep.lean import NoProgress, lean_trials

NAMES = ("_remove_actor", "on_step_end", "_cleanup_trials")


class Places:
    """Counts the requests for places that stand."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.withdrawn: list[str] = []

    def request_resources(self, resource_request: str) -> None:
        self.made.append(resource_request)

    def cancel_resource_request(self, resource_request: str) -> None:
        self.withdrawn.append(resource_request)


@pytest.fixture
def places() -> Places:
    return Places()


@pytest.fixture
def controller(places: Places, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a controller of Ray's with what the mended methods touch, inside their block."""
    monkeypatch.setattr(TuneController, "on_step_end", lambda self: None)
    monkeypatch.setattr(TuneController, "_cleanup_trials", lambda self: None)
    made = TuneController.__new__(TuneController)
    state: dict[str, Any] = {name: set() for name in ("_staged_trials", "_resetting_trials", "_stopped_trials")}
    state |= {"_live_trials": set(), "_trials_to_cache": set(), "_trial_to_actor": {}, "_trials": []}
    made.__dict__.update(state, _trial_metadata={}, _actor_manager=RayActorManager(resource_manager=places))
    with lean_trials():
        yield made


def methods() -> list[object]:
    mended = [getattr(TuneController, name, None) for name in NAMES]
    return [*mended, RayActorManager.add_actor, Trial.set_ray_actor]


def test_the_methods_are_put_back_also_after_an_exception() -> None:
    before = methods()
    assert None not in before, "this Ray has them no more: look what it does and keeps for each trial"

    def fit() -> None:
        with lean_trials():
            assert all(now is not then for now, then in zip(methods(), before, strict=True))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit()
    assert methods() == before
    assert not {"get", "contains"} & vars(registry._global_registry).keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_ray_without_them_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(TuneController, name)
    before = methods()
    with lean_trials():
        assert methods() == before


def test_another_ray_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.61.0")
    before = methods()
    with lean_trials():
        assert methods() == before


def test_a_request_for_a_place_goes_to_the_next_trial_in_line(
    controller: Any, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(lean, "time", SimpleNamespace(monotonic=lambda: now[0]))
    manager = controller._actor_manager
    first = manager.add_actor(object, {"number": 0}, "1 CPU", on_start=print)
    for number in range(1, 100):  # an actor comes free for the one in line, and another one lines up
        controller._remove_actor(first)
        controller.on_step_end()
        first = manager.add_actor(object, {"number": number}, "1 CPU", on_start=print)
    assert places.made == ["1 CPU"]
    assert places.withdrawn == []
    assert manager.pending_actors == [first]
    assert manager._pending_actors_to_attrs[first] == (object, {"number": 99}, "1 CPU")
    assert not manager._pending_actors_to_enqueued_actor_tasks
    controller._remove_actor(first)
    other = manager.add_actor(object, {}, "1 GPU")
    assert places.made == ["1 CPU", "1 GPU"], "a place of another kind is asked for"
    controller.on_step_end()
    assert places.withdrawn == []
    now[0] += 1.5 * lean._SPARE_SECONDS
    controller.on_step_end()
    assert places.withdrawn == ["1 CPU"], "nobody came for it"
    controller._remove_actor(other)
    controller._cleanup_trials()
    assert places.withdrawn == ["1 CPU", "1 GPU"]


def test_ended_trials_are_forgotten_but_for_one(controller: Any) -> None:
    # of a class that, as Ray's, has its hash by identity
    trials = [type("Trial", (), {"trial_id": str(number)})() for number in range(4)]
    ended, busy, running, failed = trials
    controller._trials.extend(trials)
    controller._live_trials |= {running, ended}
    controller._stopped_trials |= {ended, busy}
    controller._trials_to_cache |= set(trials)
    controller._trial_metadata = {trial.trial_id: "state" for trial in trials}
    controller._trial_to_actor[busy] = "its actor is not free yet"
    given_out = controller._trials
    controller.on_step_end()
    assert controller._trials is given_out
    assert controller._trials == [busy, running, failed]
    assert controller._live_trials == {running}
    assert controller._stopped_trials == {busy}
    assert controller._trials_to_cache == {busy, running, failed}
    assert controller._trial_metadata.keys() == {"1", "2", "3"}
    controller._trial_to_actor.clear()
    controller._stopped_trials.update([running, failed])
    controller.on_step_end()
    assert controller._trials == [failed], "without any trial Ray would read its snapshot"
    assert controller._stopped_trials == {failed}


def test_rays_own_progress_is_not_kept(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    trial: Any = SimpleNamespace(last_result={"done": True})
    silent = NoProgress()
    before = str(vars(silent))
    silent.on_trial_result(0, [trial], trial, {"done": True})
    silent.on_trial_complete(0, [trial], trial)
    silent.on_trial_error(0, [trial], trial)
    assert str(vars(silent)) == before
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    (found,) = _create_default_callbacks([silent])
    assert found is silent, "Ray adds no other one"


def test_an_actor_is_asked_for_no_metrics() -> None:
    trial = SimpleNamespace(temporary_state=SimpleNamespace(ray_actor=None))
    with lean_trials():
        Trial.set_ray_actor(trial, actor := object())
    assert trial.temporary_state.ray_actor is actor
    with pytest.raises(AttributeError, match="get_auto_filled_metrics"):
        Trial.set_ray_actor(trial, actor)


def test_a_class_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Names:
        def get(self, category: str, key: str) -> object:
            asked.append(f"get {key}")
            return object()

        def contains(self, category: str, key: str) -> bool:
            asked.append(f"contains {key}")
            return key != "absent"

    names = Names()
    monkeypatch.setattr(registry, "_global_registry", names)
    with lean_trials():
        assert names.contains("trainable_class", "mine")
        assert names.get("trainable_class", "mine") is names.get("trainable_class", "mine")
        assert names.contains("trainable_class", "mine")
        assert not names.contains("trainable_class", "absent")
    assert asked == ["contains mine", "get mine", "contains absent"]
    assert names.get("trainable_class", "mine") is not names.get("trainable_class", "mine")
