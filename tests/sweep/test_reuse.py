"""The mends of Ray's reuse of actors are in place inside their block only; tests/ray/test_faults.py has whole runs."""

import pytest
from ray.tune.execution.tune_controller import TuneController

from landscape_ray.sweep.reuse import careful_reuse

NAMES = ("_trial_task_failure", "_maybe_reuse_cached_actor")


def methods() -> list[object]:
    return [getattr(TuneController, name, None) for name in NAMES]


def test_the_methods_are_put_back_also_after_an_exception() -> None:
    before = methods()
    assert None not in before, "this Ray has them no more: look whether it has the faults"

    def fit() -> None:
        with careful_reuse():
            assert all(now is not then for now, then in zip(methods(), before, strict=True))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit()
    assert methods() == before


@pytest.mark.parametrize("name", NAMES)
def test_a_ray_without_them_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(TuneController, name)
    before = methods()
    with careful_reuse():
        assert methods() == before
