"""A population on a cohort: the decisions of the strategy, carried out on weights."""

import json
import math
from typing import Any

import pytest
import torch

from landscape_ray.config import parse, with_values
from landscape_ray.domains import Domain
from landscape_ray.populations import STRATEGIES, Decision, Strategy
from landscape_ray.records import EvalRecord, StepRecord
from landscape_ray.training import TrainConfig, TrainState, train
from landscape_ray.training.population import CohortPopulation

LR = "schedule.peak_lr"
TRAIN: dict[str, Any] = {
    "num_steps": 40,
    "batch_size": 8,
    "data": {"name": "images", "source": "digits"},
    "model": {"name": "mlp", "width": 16},
    "optimizer": {"name": "adamw"},
    "schedule": {"name": "wsd", "warmup_steps": 4},
    "eval": {"every_steps": 5, "num_batches": 1, "batch_size": 32},
}
SPACE = {LR: Domain(log_uniform=[1e-3, 3e-1]), "optimizer.weight_decay": Domain(uniform=[0.0, 0.3])}


def strategy(name: str = "truncation", **options: Any) -> Strategy:
    return STRATEGIES[name](SPACE, **{"num_members": 4, "num_steps": 40, "interval_steps": 10, **options})


def population(rule: Strategy, **options: Any) -> CohortPopulation:
    return CohortPopulation(TRAIN | options.pop("train", {}), rule, seed=5, **{"route": "single", **options})


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.module.parameters()])


@pytest.mark.parametrize("synchronous", [True, False], ids=["sync", "async"])
def test_members_train_to_the_horizon_and_records_say_what_was_applied(synchronous: bool) -> None:
    run = population(strategy(synchronous=synchronous))
    schedule = parse(TrainConfig, TRAIN, "test").schedule.build(40)
    applied: dict[int, list[float]] = {k: [] for k in range(4)}
    current = {d.member: d for d in run.decisions}
    for k, record in run.run():
        current |= {d.member: d for d in run.decisions}
        if isinstance(record, StepRecord):
            # the mutated value wins over whatever came with the donor's optimizer
            peak = float(current[k].values[LR])
            assert record.lr == pytest.approx(peak / schedule.peak * schedule(record.step - 1), rel=1e-12)
            assert record.weight_decay == current[k].values["optimizer.weight_decay"]
            applied[k].append(record.lr)
    assert [member.step for member in run.cohort.members] == [40] * 4
    assert run.num_updates == sum(map(len, applied.values())) == 160
    assert run.strategy.finished
    if synchronous:
        assert sum(d.donor is not None for d in run.decisions) == 3  # one of four at each of three meetings


def test_a_copy_has_the_weights_and_the_optimizer_of_its_donor() -> None:
    copies: list[tuple[Decision, torch.Tensor, torch.Tensor, Any, Any]] = []
    run = population(strategy())
    carry_out = run._carry_out

    def watched(decisions: list[Decision]) -> None:
        before = {k: (weights(m).clone(), m.step) for k, m in enumerate(run.cohort.members)}
        carry_out(decisions)
        for d in decisions:
            if d.donor is not None:
                copied = run.cohort.members[d.member]
                copies.append((d, weights(copied).clone(), before[d.donor][0], copied.step, before[d.donor][1]))

    run._carry_out = watched  # type: ignore[method-assign]
    for _ in run.run():
        pass
    assert copies
    for decision, ours, theirs, step, donor_step in copies:
        assert torch.equal(ours, theirs)
        assert decision.donor_step == step == donor_step


@pytest.mark.acceptance
def test_replay_from_scratch_repeats_a_member_that_never_exploited_bit_for_bit() -> None:
    run = population(strategy("independent"), route="alone")
    for _ in run.run():
        pass
    best = run.strategy.best()
    base = parse(TrainConfig, TRAIN, "test").schedule.build(40)
    table = run.strategy.lineage.replay(best, LR, base)
    changes = run.strategy.lineage.changes(best, "optimizer.weight_decay")
    config = run.cohort.members[best].config.model_copy(
        update={
            "schedule": parse(
                TrainConfig,
                with_values(
                    TRAIN,
                    {"schedule": {"name": "table", "peak_lr": table.peak, "points": [list(p) for p in table.points]}},
                ),
                "replay",
            ).schedule
        }
    )
    assert [c.value for c in changes] == [config.optimizer.weight_decay]
    alone = TrainState.create(config)
    losses = [record.loss_nats for record in train(alone) if isinstance(record, EvalRecord)]
    assert torch.equal(weights(alone), weights(run.cohort.members[best]))
    assert losses[1:] == [point.loss for point in run.strategy.lineage.curve(best)]


def test_a_lineage_across_members_is_replayed_to_the_bit_where_they_share_a_seed() -> None:
    """With one seed for all, weights that went through several members are those of one run under the table."""
    rule = STRATEGIES["truncation"](
        {LR: SPACE[LR]}, num_members=4, num_steps=40, interval_steps=10, quantile_fraction=0.5, seed=1
    )
    run = population(rule, vary_seed=False, route="alone")
    for _ in run.run():
        pass
    member = next(k for k in range(4) if len({s.member for s in rule.lineage.path(k)}) > 1)
    assert len(rule.lineage.changes(member, LR)) > 1
    table = rule.lineage.replay(member, LR, parse(TrainConfig, TRAIN, "test").schedule.build(40))
    points = [list(point) for point in table.points]
    values = {"seed": run.cohort.members[member].config.seed}
    data = with_values(TRAIN, values) | {"schedule": {"name": "table", "peak_lr": table.peak, "points": points}}
    alone = TrainState.create(parse(TrainConfig, data, "replay"))
    for _ in train(alone):
        pass
    assert torch.equal(weights(alone), weights(run.cohort.members[member]))


@pytest.mark.acceptance
def test_a_diverged_member_is_replaced() -> None:
    wild = {LR: Domain(log_uniform=[1e-3, 1e30])}
    rule = STRATEGIES["truncation"](
        wild,
        num_members=4,
        num_steps=40,
        interval_steps=10,
        initial=[{LR: 1e-2}, {LR: 2e-2}, {LR: 1e30}, {LR: 5e-3}],
        resample_probability=0.0,
    )
    run = population(rule, train={"optimizer": {"name": "sgd", "momentum": 0.0}, "clipping": {"name": "none"}})
    for _ in run.run():
        pass
    rescued = [d for d in run.decisions if d.member == 2 and d.donor is not None]
    assert rescued
    assert rescued[0].reason == "diverged"
    assert run.cohort.members[2].diverged is None
    assert run.cohort.members[2].step == 40
    assert math.isfinite(rule.members[2].loss)


def test_a_restart_mixes_fresh_weights_and_keeps_the_step() -> None:
    rule = strategy("ipbt", patience=1, tolerance=0.9, interval_steps=5)
    run = population(rule)
    for _ in run.run():
        pass
    restarts = [d for d in run.decisions if d.action == "restart"]
    assert restarts
    assert all(d.until_step > 10 for d in restarts)
    assert all(member.step == 40 for member in run.cohort.members)


def test_averaged_weights_reach_the_strategy() -> None:
    schedule = parse(TrainConfig, TRAIN, "test").schedule.build(40)
    rule = strategy("forecast", schedule=schedule)
    run = population(rule, train={"averaging": {"name": "ema", "decay": 0.8}})
    for _ in run.run():
        pass
    points = rule.lineage.curve(rule.best())
    assert all(math.isfinite(point.averaged) for point in points)
    assert {point.annealed for point in points} <= {p.loss for p in points} | {p.averaged for p in points}
    assert [point.step for point in points] == list(range(5, 41, 5))


def test_one_seed_gives_one_history() -> None:
    def history() -> str:
        run = population(strategy())
        for _ in run.run():
            pass
        return json.dumps(run.strategy.state_dict())

    assert history() == history()
