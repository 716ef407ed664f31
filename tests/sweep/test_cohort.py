"""Trials in a cohort stay trials: the same rows, checkpoints and summaries as each alone."""

import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.records import RunSummary
from landscape_ray.sweep.cohort import CohortRun
from landscape_ray.sweep.run import CHECKPOINT, TrialRun
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.collect import collect
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.training import read_checkpoint

TRAIN: dict[str, Any] = {
    "num_steps": 10,
    "batch_size": 8,
    "data": {"name": "images"},
    "model": {"name": "mlp", "width": 16},
    "eval": {"every_steps": 5, "num_batches": 2, "batch_size": 16},
    "probes": {"sharpness": {"every_steps": 5, "batch_size": 4, "tolerance": 0.1}},
}
COHORT = {"num_members": 3, "route": "stacked"}
MEMBERS = [
    {"trial_id": f"t000{k}", "values": {"schedule.name": name, "schedule.peak_lr": 0.01 * (k + 1)}}
    for k, name in enumerate(("constant", "linear", "cosine"))
]


@pytest.fixture
def cohort_text(sweep_text: Callable[..., str]) -> str:
    return sweep_text("search", train=TRAIN, cohort=COHORT)


@pytest.fixture
def cohort_spec(cohort_text: str) -> SweepSpec:
    return parse(SweepSpec, tomllib.loads(cohort_text), "cohort")


def make(path: Path, text: str) -> SweepFolder:
    return SweepFolder.create(path, spec_text=text, meta={"experiment": "e"})


def finish(run: Any) -> Any:
    while not run.finished:
        run.advance()
    return run


def essential(folder: SweepFolder) -> list[dict[str, Any]]:
    rows = collect(folder.path).records.to_pylist()
    order = sorted(rows, key=lambda row: (row["run_id"], row["step"], row["kind"]))
    return [{k: v for k, v in row.items() if not k.endswith(("seconds", "unix"))} for row in order]


@pytest.mark.acceptance
def test_a_cohort_leaves_what_its_trials_alone_leave(cohort_spec: SweepSpec, cohort_text: str, tmp_path: Path) -> None:
    together, apart = make(tmp_path / "together", cohort_text), make(tmp_path / "apart", cohort_text)
    run = finish(CohortRun(cohort_spec, together, MEMBERS, 0))
    for k, member in enumerate(MEMBERS):
        finish(TrialRun(cohort_spec, apart.trial(member["trial_id"]), k, member["values"]))
    got, wanted = essential(together), essential(apart)
    assert len(got) == len(wanted) == 3 * (10 + 3 + 3)
    for one, other in zip(got, wanted, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            close = 5e-2 if one["kind"] == "probe" else 1e-4  # the probe stops where its tolerance is met
            assert one[key] == (pytest.approx(value, rel=close) if isinstance(value, float) else value), key
    results = run.result()
    assert results["done"]
    assert list(results["members"]) == ["t0000", "t0001", "t0002"]
    assert results["loss_nats"] == min(each["loss_nats"] for each in results["members"].values())


@pytest.mark.acceptance
def test_a_cohort_that_was_killed_goes_on_to_the_bit(cohort_spec: SweepSpec, cohort_text: str, tmp_path: Path) -> None:
    whole, broken = make(tmp_path / "whole", cohort_text), make(tmp_path / "broken", cohort_text)
    finish(CohortRun(cohort_spec, whole, MEMBERS, 0))
    CohortRun(cohort_spec, broken, MEMBERS, 0).advance()  # and then its process dies
    finish(CohortRun(cohort_spec, broken, MEMBERS, 0))
    assert essential(broken) == essential(whole)
    for member in MEMBERS:
        one, other = (
            read_checkpoint(f.trial(member["trial_id"]).checkpoint_path / CHECKPOINT)["module"] for f in (whole, broken)
        )
        assert all(one[name].equal(other[name]) for name in one)


def test_a_member_is_saved_without_the_others(cohort_spec: SweepSpec, cohort_text: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "sweep", cohort_text)
    CohortRun(cohort_spec, folder, MEMBERS, 0).advance()
    apart = make(tmp_path / "apart", cohort_text)
    TrialRun(cohort_spec, apart.trial("t0000"), 0, MEMBERS[0]["values"]).advance()
    sizes = [(f.trial("t0000").checkpoint_path / CHECKPOINT).stat().st_size for f in (folder, apart)]
    assert sizes[0] < 1.05 * sizes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": {"model.width": {"choices": [8, 16]}}, "search": {"num_trials": 2}},
            r"space.model.width cannot be searched with \[cohort\]: model must be the same for all members",
        ),
        ({"cohort": {"num_members": 1}}, r"'cohort.num_members' .* greater than or equal to 2, got 1"),
        ({"cohort": {"route": "fast"}}, r"'cohort.route' .*got 'fast'"),
    ],
)
def test_what_cannot_be_a_cohort(sweep_text: Callable[..., str], changes: dict[str, Any], message: str) -> None:
    text = sweep_text("search", **({"train": TRAIN, "cohort": COHORT} | changes))
    with pytest.raises(UserError, match=message):
        parse(SweepSpec, tomllib.loads(text), "cohort")


def test_a_cohort_needs_a_search(sweep_text: Callable[..., str]) -> None:
    text = sweep_text("population", train=TRAIN, cohort=COHORT)
    with pytest.raises(UserError, match=r"a sweep with \[cohort\] must have a \[search\] table"):
        parse(SweepSpec, tomllib.loads(text), "cohort")


def test_data_are_opened_once(cohort_spec: SweepSpec, cohort_text: str, tmp_path: Path) -> None:
    run = CohortRun(cohort_spec, make(tmp_path / "sweep", cohort_text), MEMBERS, 0)
    assert len({id(each.state.data) for each in run.runs}) == 1


def test_the_member_that_is_damaged_is_named(cohort_spec: SweepSpec, cohort_text: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "sweep", cohort_text)
    CohortRun(cohort_spec, folder, MEMBERS, 0)
    (folder.trial("t0001").checkpoint_path / CHECKPOINT).write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"trial t0001: checkpoint .* cannot be read"):
        CohortRun(cohort_spec, folder, MEMBERS, 0)


def test_after_a_failure_the_bad_trial_goes_alone(cohort_spec: SweepSpec, tmp_path: Path) -> None:
    """In a cohort it would take the sound ones along again."""
    from landscape_ray.sweep.searching.book import Book
    from landscape_ray.sweep.searching.searcher import OptunaSearcher

    folder = SweepFolder(tmp_path)

    def searcher() -> OptunaSearcher:
        return OptunaSearcher(Book(cohort_spec, folder), {})

    def proposed(given: OptunaSearcher, name: str) -> list[str]:
        for _ in range(1000):  # proposals are made beside the driver, which asks again
            suggestion: Any = given.suggest(name)
            if suggestion is not None:
                return [each["trial_id"] for each in suggestion["trial"]["members"]]
            time.sleep(0.02)
        raise AssertionError("no proposal in twenty seconds")

    assert proposed(searcher(), "a") == ["t0000", "t0001", "t0002"]
    for name, status in (("t0000", "finished"), ("t0001", "failed"), ("t0002", "pending")):
        summary = RunSummary(run_id=name, status=status, config={}, varied={}, final_loss_nats=1.0)  # type: ignore[arg-type]
        folder.trial(name).commit(summary, 0)
    again = searcher()
    assert proposed(again, "b") == ["t0001"]
    assert proposed(again, "c") == ["t0002", "t0003", "t0004"]
    assert again.suggest("d") == "FINISHED"
