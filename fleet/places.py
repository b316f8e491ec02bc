"""Find out what of a Ray cluster makes videos: the chips of a host, a part of them, or all those of a slice."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# What chips are called among the resources of a node; the last one is ours, for nodes without any.
ON_CPU = "video_worker"
KINDS = ("TPU", "GPU", ON_CPU)
# Labels that Ray gives a node of a TPU slice.
SLICE, TOPOLOGY, NUMBER = "ray.io/tpu-slice-name", "ray.io/tpu-topology", "ray.io/tpu-worker-id"


class Node(NamedTuple):
    """A machine of the cluster: Ray's id for it, its name and its address."""

    id: str
    name: str
    address: str


class Place(NamedTuple):
    """Chips that make a video together.

    Attributes:
        nodes: the machines that have them, in the order of the processes.
        kind: of KINDS.
        chips: of each machine.
        number: which of the places of its machine it is.
    """

    nodes: tuple[Node, ...]
    kind: str
    chips: float
    number: int = 0

    @property
    def actor_options(self) -> dict[str, Any]:
        """The resources of an actor on one of its machines, in Ray's words."""
        return {"num_gpus": self.chips} if self.kind == "GPU" else {"resources": {self.kind: self.chips}}


def places(nodes: Sequence[Mapping[str, Any]], chips: int | None) -> Iterator[Place]:
    """Yield the places of a cluster, whose nodes are as `ray.nodes` returns them.

    Args:
        nodes: the machines; those that are dead are passed over.
        chips: how many of a host make a video together; None for all of a host, or of a slice of several hosts.
    """
    slices: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for node in nodes:
        if node["Alive"]:
            slices[node.get("Labels", {}).get(SLICE, node["NodeID"])].append(node)
    for of_slice in slices.values():
        hosts = sorted(of_slice, key=lambda node: int(node.get("Labels", {}).get(NUMBER, 0)))
        if chips is None and (wanted := hosts_of_slice(hosts[0])) > 1:
            if len(hosts) == wanted:  # without one of them none can run
                yield Place(tuple(map(_node, hosts)), "TPU", hosts[0]["Resources"]["TPU"])
            continue
        for host in hosts:
            for kind in KINDS:
                if there := host["Resources"].get(kind, 0):
                    each = there if chips is None or kind == ON_CPU else min(chips, there)
                    for number in range(int(there // each)):
                        yield Place((_node(host),), kind, each, number)
                    break


def hosts_of_slice(node: Mapping[str, Any]) -> int:
    """Return how many hosts the slice of a node has, by its label such as 4x4 and its own chips; 1 without a label."""
    topology, own = node.get("Labels", {}).get(TOPOLOGY), node["Resources"].get("TPU", 0)
    if not topology or not own:
        return 1
    return math.ceil(math.prod(int(side) for side in topology.split("x")) / own)


def _node(found: Mapping[str, Any]) -> Node:
    return Node(found["NodeID"], found["NodeManagerHostname"], found["NodeManagerAddress"])
