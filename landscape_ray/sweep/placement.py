"""Which nodes of a cluster hold a trial: what is asked of Ray, and whether it can ever be had."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ray
from ray.tune import PlacementGroupFactory

from landscape_ray.errors import UserError
from landscape_ray.sweep.cluster import nodes_alive
from landscape_ray.sweep.resources import ACCELERATOR, ResourcesConfig, label_fits

FIELDS = {"CPU": "cpus_per_trial", "GPU": "gpus_per_trial", "memory": "memory_gib_per_trial"}


class Node(NamedTuple):
    """What a node has as a whole."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] | None
    """None for a node that an autoscaler has yet to start: Ray does not say what its labels will be."""

    def units(self, wanted: ResourcesConfig) -> int:
        """Return how many workers of such a trial the node could hold."""
        if self.labels is not None:
            labels = self.labels
            if not all(label_fits(value, labels.get(name)) for name, value in wanted.labels.items()):
                return 0
        return min(math.floor(self.resources.get(name, 0.0) / each + 1e-9) for name, each in wanted.share.items())


def request(wanted: ResourcesConfig) -> PlacementGroupFactory:
    """Return what Ray Tune is to set aside for a trial: a bundle for each of its workers."""
    more = {"bundle_label_selector": [wanted.label_selector] * wanted.workers} if wanted.labels else {}
    return PlacementGroupFactory([wanted.share] * wanted.workers, wanted.placement.upper(), **more)


def present() -> list[Node]:
    """Return the nodes that are up."""
    return [Node(node["Resources"], node.get("Labels") or {}) for node in nodes_alive()]


def to_come(at_most: int) -> list[Node]:
    """Return the nodes that an autoscaler may start, of each kind so many at most."""
    config = ray._private.state.state.get_cluster_config()
    found: list[Node] = []
    for group in config.node_group_configs if config is not None else ():
        count = at_most if group.max_count < 0 else min(group.max_count, at_most)
        resources = {name: float(sys.maxsize if amount < 0 else amount) for name, amount in group.resources.items()}
        found += [Node(resources, None)] * count
    return found


def num_places(wanted: ResourcesConfig, nodes: Sequence[Node] | None = None) -> int:
    """Return how many trials nodes can hold at the same time, by default those that are up.

    An estimate from above where trials of several workers leave gaps.
    """
    units = [node.units(wanted) for node in (present() if nodes is None else nodes)]
    if wanted.placement == "strict_pack":
        return sum(each // wanted.workers for each in units)
    if wanted.placement == "strict_spread":
        most = sum(units) // wanted.workers
        while sum(min(each, most) for each in units) < wanted.workers * most:
            most -= 1
        return most
    return sum(units) // wanted.workers


def check_resources(wanted: ResourcesConfig) -> None:
    """Raise if the cluster, present or as an autoscaler may make it, could never hold one trial.

    Raises:
        UserError: names the field, what a trial asks for and what the nodes have.
    """
    nodes = [*present(), *to_come(wanted.workers)]
    if num_places(wanted, nodes) > 0:
        return
    each = "" if wanted.workers == 1 else f" for each of {wanted.workers} workers"
    for name, amount in wanted.share.items():
        largest = max((node.resources.get(name, 0.0) for node in nodes), default=0.0)
        if amount <= largest:
            continue
        if name.startswith(ACCELERATOR):
            kinds = sorted({each for node in nodes for each in node.resources if each.startswith(ACCELERATOR)})
            raise UserError(
                f"resources.accelerator must be one that a node has, got '{wanted.accelerator}'; "
                f"the nodes have {', '.join(each.removeprefix(ACCELERATOR) for each in kinds) or 'none that Ray knows'}"
            )
        unit = 2.0**30 if name == "memory" else 1.0
        raise UserError(
            f"resources.{FIELDS.get(name, f'custom.{name}')} must fit on one node, got {amount / unit:g}{each}; the "
            f"largest node has {largest / unit:g} {'GiB of memory' if name == 'memory' else name}"
        )
    there = "; ".join(dict.fromkeys(map(describe, nodes))) or "no node"
    if not any(node._replace(labels={}).units(wanted.model_copy(update={"labels": {}})) for node in nodes):
        raise UserError(f"resources must fit on one node together, got {_text(wanted.share)}{each}; there are: {there}")
    if not any(node.units(wanted) for node in nodes):
        asked = ", ".join(f"{name} = {value}" for name, value in wanted.labels.items())
        raise UserError(f"resources.labels must match a node that is large enough, got {asked}; there are: {there}")
    raise UserError(
        f"resources.workers must fit on the cluster, got {wanted.workers} with placement '{wanted.placement}' and "
        f"{_text(wanted.share)} each; there are: {there}; lower workers, or choose another placement"
    )


def describe(node: Node) -> str:
    """Return what a trial could ask of a node: amounts, kind of GPU, labels that were given to it.

    >>> describe(Node({"CPU": 4.0, "node:10.0.0.1": 1.0, "fast": 2.0}, {"ray.io/node-id": "f00", "zone": "eu"}))
    '4 CPU, 2 fast, zone = eu'
    """
    own = {
        name: amount
        for name, amount in node.resources.items()
        if not name.startswith(("node:", "object_store_memory")) and amount
    }
    given = {name: value for name, value in (node.labels or {}).items() if name != "ray.io/node-id"}
    labels = [f"{name} = {value}" for name, value in given.items()]
    return ", ".join([*([_text(own)] if own else []), *labels]) or "nothing"


def _text(resources: Mapping[str, float]) -> str:
    def one(name: str, amount: float) -> str:
        if name.startswith(ACCELERATOR):
            return name.removeprefix(ACCELERATOR)
        return f"{amount / 2**30:.3g} GiB" if name == "memory" else f"{amount:g} {name}"

    return ", ".join(one(name, amount) for name, amount in resources.items())
