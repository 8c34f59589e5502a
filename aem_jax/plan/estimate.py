"""Seconds from costs: a roofline, and beside it the sum without any overlap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aem_jax.plan.costs import Collective, Costs
from aem_jax.plan.devices import Topology

Coordinates = Sequence[tuple[int, ...]]
"""Where each device of the mesh stands in the topology, in the mesh's order; empty where there is no such thing."""


@dataclass(frozen=True)
class Seconds:
    """What one device spends on a program.

    Attributes:
        compute: FLOPs at the device's peak.
        memory: bytes at its memory's bandwidth.
        wire: collectives at the interconnect's.
        compiler: the compiler's own estimate of all but collectives, with kernels at the device's peaks, as it knows
            nothing of them; 0 without one.
    """

    compute: float
    memory: float
    wire: float
    compiler: float

    @property
    def roofline(self) -> float:
        """As if all three overlapped: no run is faster."""
        return max(self.compute, self.memory, self.wire)

    @property
    def serial(self) -> float:
        """As if nothing overlapped: the compiler's estimate (else compute or memory), then collectives."""
        return max(self.compiler or max(self.compute, self.memory), self.compute) + self.wire

    @property
    def bound(self) -> str:
        """What the roofline is: compute, memory or wire."""
        return max(("compute", "memory", "wire"), key=lambda name: getattr(self, name))


def estimate(costs: Costs, topology: Topology, coordinates: Coordinates = ()) -> Seconds:
    """Seconds of a program on one device."""
    wire = math.fsum(each.count * _wire_seconds(each, topology, coordinates) for each in costs.collectives)
    clock = topology.chip.clock
    kernels = math.fsum(
        each.count * max(each.flops / topology.peak, each.bytes / topology.bandwidth) for each in costs.kernels
    )
    return Seconds(
        compute=costs.flops / topology.peak,
        memory=costs.bytes / topology.bandwidth,
        wire=wire,
        compiler=costs.cycles / clock + kernels if clock and costs.cycles else 0.0,
    )


def _wire_seconds(each: Collective, topology: Topology, coordinates: Coordinates) -> float:
    """Rings over all axes that the group spans: gathering sends (n - 1)/n of the whole, all-reducing twice that."""
    if each.group < 2:
        return 0.0
    spans = topology.spans(each.group)
    if coordinates and each.members and max(each.members) < len(coordinates):
        spans = tuple(len(set(axis)) for axis in zip(*(coordinates[member] for member in each.members)))
    sent = {
        "all-reduce": 2 * (each.group - 1) / each.group,
        "collective-permute": 1.0,
        "all-to-all": math.sqrt(each.group) / 4 if each.group > 4 else 0.5,
    }.get(each.kind, (each.group - 1) / each.group)
    return sent * each.bytes / topology.wire(spans)
