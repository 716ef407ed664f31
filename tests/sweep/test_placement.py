"""What a trial asks of a cluster's nodes, and what is said where no node has it."""

import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from landscape_ray.config import parse
from landscape_ray.errors import UserError
from landscape_ray.sweep import placement
from landscape_ray.sweep.placement import Node, check_resources, describe, num_places, request
from landscape_ray.sweep.resources import ResourcesConfig
from landscape_ray.sweep.session import check_alone, check_data
from landscape_ray.sweep.spec import SweepSpec

SweepText = Callable[..., str]
CPU = Node({"CPU": 8.0, "memory": 32 * 2.0**30, "node:10.0.0.1": 1.0}, {"ray.io/node-id": "a", "zone": "eu"})
GPU = Node({"CPU": 4.0, "GPU": 2.0, "accelerator_type:H200": 1.0, "fast": 1.0}, {"zone": "us"})


def resources(**given: Any) -> ResourcesConfig:
    return ResourcesConfig(**given)


def test_workers_share_what_a_trial_gets() -> None:
    wanted = resources(cpus_per_trial=4, gpus_per_trial=2, memory_gib_per_trial=6, workers=2, custom={"fast": 1.0},
                       accelerator="H200")  # fmt: skip
    assert wanted.share == {"CPU": 2, "GPU": 1, "memory": 3 * 2**30, "fast": 0.5, "accelerator_type:H200": 0.001}
    assert (wanted.num_threads, wanted.gpus_per_worker) == (2, 1)
    assert resources().share == {"CPU": 1}


def test_a_trial_asks_for_a_bundle_for_each_worker() -> None:
    wanted = request(resources(cpus_per_trial=4, workers=2, placement="strict_spread", labels={"zone": "in(eu, us)"}))
    assert (wanted.bundles, wanted.strategy) == ([{"CPU": 2}, {"CPU": 2}], "STRICT_SPREAD")
    # with a space Ray would look for nodes whose zone is " us"
    assert wanted._bound.kwargs == {"bundle_label_selector": [{"zone": "in(eu,us)"}] * 2}
    alone = request(resources())
    assert (alone.bundles, alone.strategy, alone._bound.kwargs) == ([{"CPU": 1}], "PACK", {})


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ({}, 12),
        ({"cpus_per_trial": 3}, 3),
        ({"gpus_per_trial": 0.25, "cpus_per_trial": 0.5}, 8),
        ({"accelerator": "H200"}, 4),
        ({"accelerator": "A100"}, 0),
        ({"labels": {"zone": "eu"}}, 8),
        ({"labels": {"zone": "!eu"}}, 4),
        ({"labels": {"other": "!in(x, y)"}}, 12),
        ({"custom": {"fast": 0.25}}, 4),
        ({"cpus_per_trial": 12, "workers": 4}, 0),
        ({"cpus_per_trial": 12, "workers": 6}, 1),
        ({"cpus_per_trial": 6, "workers": 3}, 2),
        ({"cpus_per_trial": 6, "workers": 3, "placement": "strict_pack"}, 1),
        ({"cpus_per_trial": 4, "workers": 2, "placement": "strict_spread"}, 2),
        ({"cpus_per_trial": 3, "workers": 3, "placement": "strict_spread"}, 0),
    ],
)
def test_the_number_of_trials_that_nodes_hold(given: dict[str, Any], number: int) -> None:
    assert num_places(resources(**given), [CPU, GPU]) == number


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cpus_per_trial": 9}, r"resources.cpus_per_trial must fit on one node, got 9; the largest node has 8 CPU"),
        ({"cpus_per_trial": 18, "workers": 2}, r"got 9 for each of 2 workers; the largest node has 8 CPU"),
        ({"memory_gib_per_trial": 64}, r"memory_gib_per_trial must fit on one node, got 64; .* has 32 GiB of memory"),
        ({"custom": {"fast": 2}}, r"resources.custom.fast must fit on one node, got 2; the largest node has 1 fast"),
        (
            {"accelerator": "A100"},
            r"resources.accelerator must be one that a node has, got 'A100'; the nodes have H200",
        ),
        ({"labels": {"zone": "asia"}}, r"labels must match a node that is large enough, got zone = asia; there are: 8"),
        (
            {"cpus_per_trial": 8, "gpus_per_trial": 1},
            r"resources must fit on one node together, got 8 CPU, 1 GPU; there",
        ),
        (
            {"cpus_per_trial": 16, "workers": 4, "placement": "strict_pack"},
            r"resources.workers must fit on the cluster, got 4 with placement 'strict_pack' and 4 CPU each; .*lower",
        ),
    ],
)
def test_what_no_node_can_ever_hold_is_refused(
    given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "present", lambda: [CPU, GPU])
    monkeypatch.setattr(placement, "to_come", lambda at_most: [])
    with pytest.raises(UserError, match=said):
        check_resources(resources(**given))


def test_a_cluster_that_grows_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What labels its new nodes will have, Ray does not say."""
    monkeypatch.setattr(placement, "present", lambda: [CPU])
    monkeypatch.setattr(placement, "to_come", lambda at_most: [GPU._replace(labels=None)] * at_most)
    check_resources(resources(gpus_per_trial=4, workers=4, placement="strict_spread", labels={"zone": "asia"}))
    with pytest.raises(UserError, match="gpus_per_trial must fit on one node, got 4; the largest node has 2 GPU"):
        check_resources(resources(gpus_per_trial=4))


def test_kinds_of_nodes_that_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.core.generated import autoscaler_pb2

    groups = [
        autoscaler_pb2.NodeGroupConfig(name="gpu", resources={"CPU": 8, "GPU": 1}, max_count=2),
        autoscaler_pb2.NodeGroupConfig(name="any", resources={"CPU": 4}, max_count=-1),
    ]
    config = autoscaler_pb2.ClusterConfig(node_group_configs=groups)
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: config)
    assert [node.resources["CPU"] for node in placement.to_come(3)] == [8, 8, 4, 4, 4]
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: None)
    assert placement.to_come(3) == []


def test_a_node_is_described_by_what_can_be_asked_of_it() -> None:
    assert describe(CPU) == "8 CPU, 32 GiB, zone = eu"
    assert describe(GPU) == "4 CPU, 2 GPU, H200, 1 fast, zone = us"
    assert describe(Node({}, None)) == "nothing"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"placement": "spread"}, r"resources: placement needs workers > 1, got 'spread' for one worker"),
        (
            {"gpus_per_trial": 3, "workers": 2},
            r"gpus_per_trial must be a whole number, or at most 1, for each of 2 wor",
        ),
        ({"gpus_per_trial": 1.5}, r"gpus_per_trial must be a whole number, or at most 1, got 1.5"),
        ({"custom": {"GPU": 1}}, r"custom.GPU must be a resource of yours"),
        ({"custom": {"fast": 1.5}}, r"custom.fast must be a whole number, or between 0.0001 and 1, got 1.5"),
        ({"labels": {"zone/": "eu"}}, r"labels must have names of letters, digits, .* got 'zone/'"),
        ({"labels": {"zone": "in(a,)"}}, r"labels.zone must be value, .* got 'in\(a,\)'"),
        ({"labels": {"zone": "-a"}}, r"labels.zone must be value, .* got '-a'"),
        ({"labels": {"zone": "in("}}, r"labels.zone must be value, !value, in\(a, b\) or !in\(a, b\), got 'in\('"),
        ({"workers": 3}, r"batch_size must be a multiple of workers x accumulation_steps = 3 x 1, got 4"),
        ({"workers": 4}, r"probes.sharpness.batch_size must be at least the number of workers, 4, got 2"),
    ],
)
def test_resources_that_make_no_sense_are_refused(given: dict[str, Any], said: str, sweep_text: SweepText) -> None:
    with pytest.raises(UserError, match=said):
        parse(SweepSpec, tomllib.loads(sweep_text(resources=given)), "file")


def test_cohorts_and_runs_without_ray_are_of_one_process(sweep_text: SweepText, tiny: dict[str, Any]) -> None:
    two = {"workers": 2}
    with pytest.raises(UserError, match=r"resources.workers must be 1 with \[cohort\].* got 2; remove one"):
        parse(SweepSpec, tomllib.loads(sweep_text(resources=two, cohort={"num_members": 2})), "file")
    spec = parse(SweepSpec, tomllib.loads(sweep_text(resources=two)), "file")
    with pytest.raises(UserError, match=r"resources.workers must be 1 for a run in this process, got 2"):
        check_alone(spec)
    check_data(spec)
    images = tiny | {"data": {"name": "images"}, "model": {"name": "resnet", "depth": 8, "width": 4}, "probes": {}}
    batch_norm = parse(SweepSpec, tomllib.loads(sweep_text(train=images, resources=two)), "file")
    with pytest.raises(UserError, match="a model over 2 workers must not use statistics of the batch, got the batch"):
        check_data(batch_norm)
