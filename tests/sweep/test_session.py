"""What a driver does around the training: statuses, sentences, exit status."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from landscape_ray.errors import UserError
from landscape_ray.records import RunSummary
from landscape_ray.sweep.session import (
    MAX_REPLACED,
    Outcome,
    check_data,
    conclude,
    exit_status,
    outcome_text,
    reason,
)
from landscape_ray.sweep.spec import SweepSpec
from landscape_ray.tracking.folder import SweepFolder
from landscape_ray.tracking.projector import SyncReport


def outcome(folder: SweepFolder, status: str, failures: dict[str, BaseException], error: str = "") -> Outcome:
    return Outcome(folder, status, {"finished": 2}, failures, None, SyncReport(error=error), 61.0)


class WrappedError(Exception):
    """As Ray wraps what a trial raises."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"Traceback ...\n{cause}")
        self.cause = cause


def test_exit_status_tells_who_can_mend_it(folder: SweepFolder) -> None:
    assert exit_status(outcome(folder, "finished", {})) == 0
    assert exit_status(outcome(folder, "interrupted", {})) == 130
    assert exit_status(outcome(folder, "incomplete", {"t0": WrappedError(UserError("no space left"))})) == 2
    assert (
        exit_status(outcome(folder, "incomplete", {"t0": WrappedError(UserError("x")), "t1": RuntimeError("y")})) == 1
    )


def test_a_reason_is_one_line(folder: SweepFolder) -> None:
    assert (
        reason(WrappedError(UserError("no space left to write x; free some"))) == "no space left to write x; free some"
    )
    assert reason(WrappedError(RuntimeError("line one\n  line two  \n"))) == "RuntimeError: line two"
    assert reason(KeyError()) == "KeyError"


def test_the_outcome_says_what_to_do_next(folder: SweepFolder) -> None:
    assert outcome_text(outcome(folder, "finished", {})).endswith("next: landscape-ray report sweep")
    text = outcome_text(outcome(folder, "incomplete", {"t0001": RuntimeError("boom")}, error="it does not answer"))
    assert "t0001 failed: RuntimeError: boom" in text
    assert "tracking server is behind (it does not answer); `landscape-ray sync sweep`" in text
    assert text.endswith("to go on: landscape-ray resume sweep")
    assert "incomplete in 1 min 01 s" in text


def test_the_outcome_names_members_that_were_replaced_up_to_a_few(folder: SweepFolder) -> None:
    ended = dataclasses.replace(outcome(folder, "finished", {}), replaced=("one failed", "two failed"))
    assert "\none failed\ntwo failed\nnext: " in outcome_text(ended)
    many = dataclasses.replace(ended, replaced=tuple(f"{k} failed" for k in range(MAX_REPLACED + 3)))
    assert "7 failed\n... and 3 more were replaced; `landscape-ray report sweep` shows each\n" in outcome_text(many)
    assert exit_status(many) == 0


def test_a_corpus_too_small_for_the_evaluation_is_found_before_the_start(
    search_spec: SweepSpec, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("".join(f"paragraph {i} of a small text\n\n" for i in range(60)))
    train: dict[str, Any] = {**search_spec.train, "data": {"source": str(tmp_path / "a.txt"), "context_length": 16}}
    check_data(search_spec.model_copy(update={"train": train}))
    train["eval"] = {"num_batches": 50, "batch_size": 50}
    with pytest.raises(UserError, match="validation"):
        check_data(search_spec.model_copy(update={"train": train}))


def test_a_failed_cohort_does_not_undo_its_finished_members(folder: SweepFolder, search_spec: SweepSpec) -> None:
    class Silent:
        def set_parent(self, **parent: Any) -> None:
            pass

        def close(self, timeout_seconds: float) -> SyncReport:
            return SyncReport()

    for name, status in (("t0000", "finished"), ("t0001", "running")):
        summary = RunSummary(run_id=name, status=status, config={}, varied={}, final_loss_nats=1.0)  # type: ignore[arg-type]
        folder.trial(name).commit(summary, 0)
    failures: dict[str, BaseException] = dict.fromkeys(("t0000", "t0001"), RuntimeError("its process died"))
    ended = conclude(folder, search_spec, Silent(), failures, 0.0, 2)  # type: ignore[arg-type]
    assert ended.counts == {"finished": 1, "failed": 1}
    assert list(ended.failures) == ["t0001"]
    assert ended.best is not None
    assert ended.best.run_id == "t0000"
