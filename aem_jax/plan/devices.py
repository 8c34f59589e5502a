"""Facts of devices, topologies by name (`v5p:4x4x8`, `gpu:h100:8`, `cpu:8`), and the time of a program on them.

Sources. TPU: cloud.google.com/tpu/docs (one page for each generation: peak, memory, bandwidth, interconnect) and the
table of "How To Scale Your Model" (jax-ml.github.io/scaling-book/tpus). GPU: NVIDIA's data sheets, dense bf16 without
sparsity; memory as the driver reports it, which is less than the name says. The clock is the one in which libtpu's
estimates count cycles.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from aem_jax.distributed.runtime import gpu_memory_share
from aem_jax.errors import ConfigError
from aem_jax.overrides import nearest
from aem_jax.plan.costs import Collective, Costs

GIB = 2**30


@dataclass(frozen=True)
class Shares:
    """Fractions of the peaks that good programs reach: of FLOP/s, of the memory's and of the wire's bytes/s."""

    compute: float = 1.0
    memory: float = 1.0
    wire: float = 1.0


GPU_SHARES = Shares(compute=0.7, memory=0.85, wire=0.8)
"""Assumed of GPUs, for which the compiler estimates no time. Large bf16 products of cuBLAS and NCCL's reductions reach
about these on H100s; nothing here was measured by this project."""


@dataclass(frozen=True)
class Chip:
    """Facts of one chip.

    Attributes:
        peak: bf16 FLOP/s.
        memory: bytes of HBM, all of it.
        bandwidth: bytes/s of HBM.
        link: bytes/s of one link to a neighbour, in one direction; of a GPU, all NVLinks together.
        axes: axes of the torus (TPU), each with two links; 0 for a switch (GPU).
        ring: a TPU's axis is a ring if its size is a multiple of this number.
        clock: Hz of the cycles that the compiler estimates; 0 where it has no estimate.
        cores: number of jax devices of one chip.
        domain: most GPUs of a host, behind one switch; between hosts, `network` applies.
        network: bytes/s of a GPU to other machines, in one direction.
    """

    peak: float
    memory: float
    bandwidth: float
    link: float
    axes: int = 0
    ring: int = 0
    clock: float = 0.0
    cores: int = 1
    domain: int = 0
    network: float = 0.0
    shares: Shares = Shares()


TPUS: Mapping[str, Chip] = {
    "v4": Chip(275e12, 32 * GIB, 1.23e12, 45e9, 3, 4, 1.05e9, 2),
    "v5e": Chip(197e12, 16 * GIB, 0.82e12, 45e9, 2, 16, 1.5e9),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 90e9, 3, 4, 1.75e9),
    "v6e": Chip(918e12, 32 * GIB, 1.64e12, 90e9, 2, 16, 1.75e9),
    "tpu7x": Chip(2307e12, 192 * GIB, 7.38e12, 100e9, 3, 4, 2.2e9, 2),
}


def _gpu(peak: float, mib: int, bandwidth: float, link: float, network: float) -> Chip:
    return Chip(peak, mib * 2**20, bandwidth, link, domain=8, network=network, shares=GPU_SHARES)


GPUS: Mapping[str, Chip] = {
    "a100": _gpu(312e12, 81157, 2.039e12, 300e9, 25e9),
    "h100": _gpu(989e12, 81008, 3.352e12, 450e9, 50e9),
    "h200": _gpu(989e12, 144384, 4.8e12, 450e9, 50e9),
    "b200": _gpu(2250e12, 182642, 7.672e12, 900e9, 50e9),
    "l4": _gpu(121e12, 23034, 0.3e12, 32e9, 12.5e9),
    "l40s": _gpu(362e12, 46068, 0.864e12, 32e9, 25e9),
    "rtx4090": _gpu(165e12, 24564, 1.008e12, 32e9, 12.5e9),
}
CPU = Chip(1e11, 16 * GIB, 2e10, 1e10)
"""Placeholder values, because nothing is known of a simulated device."""


@dataclass(frozen=True)
class Topology:
    """Chips and their interconnect.

    Attributes:
        name: as given.
        kind: libtpu compiles for "tpu", a CUDA plugin of jax for "gpu", jax itself for "cpu".
        chip: facts of one chip.
        sizes: chips along each axis; for GPUs, hosts and GPUs of each; for CPUs, their number.
        model: the name of the chip in `TPUS` or `GPUS`; "cpu" for CPUs.
    """

    name: str
    kind: Literal["tpu", "gpu", "cpu"]
    chip: Chip
    sizes: tuple[int, ...]
    model: str

    @property
    def num_chips(self) -> int:
        """Number of chips."""
        return math.prod(self.sizes)

    @property
    def num_devices(self) -> int:
        """Number of jax devices."""
        return self.num_chips * self.chip.cores

    @property
    def processes(self) -> int:
        """Most processes of a run on it: one for each GPU (SLURM), or for each host of four TPU chips."""
        return -(-self.num_chips // 4) if self.kind == "tpu" else self.num_devices

    @property
    def peak(self) -> float:
        """bf16 FLOP/s of a device."""
        return self.chip.peak / self.chip.cores

    @property
    def memory(self) -> float:
        """Bytes of a device that JAX may use: of a GPU, the share that a run reserves."""
        share = gpu_memory_share() if self.kind == "gpu" else 1.0
        return share * self.chip.memory / self.chip.cores

    @property
    def bandwidth(self) -> float:
        """HBM bytes/s of a device."""
        return self.chip.bandwidth / self.chip.cores

    @property
    def positions(self) -> "Coordinates":
        """Host and number of each GPU; empty for other devices, which the compiler places."""
        hosts, gpus = self.sizes if self.kind == "gpu" else (0, 0)
        return [(host, host * gpus + gpu) for host in range(hosts) for gpu in range(gpus)]

    def wire(self, spans: tuple[int, ...]) -> float:
        """Bytes/s from one device to a group that spans `spans` chips along each axis (GPUs: hosts, GPUs)."""
        chip = self.chip
        if self.kind != "tpu":
            return chip.network if self.kind == "gpu" and spans[0] > 1 else chip.link
        total = sum(
            chip.link * (2 if size % chip.ring == 0 else 1) for size, span in zip(self.sizes, spans) if span > 1
        )
        return (total or chip.link * chip.axes * 2) / chip.cores  # no axis: the two devices of one chip

    def spans(self, devices: int) -> tuple[int, ...]:
        """Chips along each axis of a box of `devices` neighbours, which fills the last axes first."""
        left, spans = max(devices // self.chip.cores, 1), []
        for size in reversed(self.sizes):
            spans.append(min(left, size))
            left = -(-left // size)
        return tuple(reversed(spans))


def parse_topology(name: str) -> Topology:
    """Parses the name of a topology.

    Raises:
        ConfigError: an unknown device, or an invalid shape.
    """
    kind, _, rest = name.partition(":")
    if kind in TPUS:
        chip = TPUS[kind]
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest) or rest.count("x") != chip.axes - 1:
            example = "x".join(["2", "2", "2", "4"][: chip.axes])
            raise ConfigError(f"--topology: expected {kind}: and {chip.axes} sizes, as {kind}:{example}, got {name!r}")
        return Topology(name, "tpu", chip, tuple(map(int, rest.split("x"))), kind)
    if kind == "gpu":
        model, _, count = rest.partition(":")
        if model not in GPUS:
            hint = nearest(model, GPUS) or f"; known are {', '.join(GPUS)}"
            raise ConfigError(f"--topology: unknown GPU {model!r}{hint}")
        return Topology(name, "gpu", GPUS[model], _hosts(name, count, GPUS[model].domain), model)
    if kind == "cpu":
        if not re.fullmatch(r"[1-9]\d*", rest):
            raise ConfigError(f"--topology: expected a number of devices at the end of {name!r}, got {rest!r}")
        return Topology(name, "cpu", CPU, (int(rest),), "cpu")
    hint = nearest(kind, (*TPUS, "gpu", "cpu"))
    raise ConfigError(
        f"--topology: unknown device {kind!r}{hint}; expected one of {', '.join(TPUS)} and its shape (v5p:4x4x8), "
        "or gpu:MODEL:COUNT (gpu:h100:8, gpu:h100:8x4 for four hosts), or cpu:COUNT"
    )


def _hosts(name: str, count: str, most: int) -> tuple[int, int]:
    """Hosts, and GPUs of each, of `COUNT` or `GPUSxHOSTS`; COUNT fills hosts of `most` GPUs."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", count)
    if not match:
        raise ConfigError(
            f"--topology: expected a number of devices at the end of {name!r}, or GPUs of a host and hosts (8x4), "
            f"got {count!r}"
        )
    gpus, hosts = int(match[1]), int(match[2] or 1)
    if gpus > most and not match[2] and gpus % most == 0:
        gpus, hosts = most, gpus // most
    if gpus > most:
        raise ConfigError(
            f"--topology {name}: expected hosts of at most {most} GPUs, got {gpus}; write GPUs of a host and hosts, as "
            f"in {name.rpartition(':')[0]}:{most}x{-(-gpus // most)}"
        )
    return hosts, gpus


Coordinates = Sequence[tuple[int, ...]]
"""Position of each device of the mesh in the topology, in the mesh's order; empty if devices have none."""


@dataclass(frozen=True)
class Seconds:
    """Time of a program on one device.

    Attributes:
        compute: of its FLOPs at the device's peak.
        memory: of its bytes at the memory's bandwidth.
        wire: of its collectives at the interconnect's bandwidth.
        compiler: the compiler's estimate of all but collectives; kernels, which it does not know, count at the device's
            peaks. 0 without an estimate.
        shares: of the peaks that programs reach where the compiler has no estimate.
    """

    compute: float
    memory: float
    wire: float
    compiler: float
    shares: Shares = Shares()

    @property
    def roofline(self) -> float:
        """Time with complete overlap of the three; a lower bound."""
        return max(self.compute, self.memory, self.wire)

    @property
    def serial(self) -> float:
        """Time without overlap: the compiler's estimate, then collectives. Without one, each at its share of its peak:
        compute, then memory (GPUs: no product overlaps with other reads), then wire."""
        if self.compiler:
            return max(self.compiler, self.compute) + self.wire
        shares = self.shares
        return self.compute / shares.compute + self.memory / shares.memory + self.wire / shares.wire

    @property
    def bound(self) -> str:
        """The longest of the three: compute, memory or wire."""
        return max(("compute", "memory", "wire"), key=lambda name: getattr(self, name))


def estimate(costs: Costs, topology: Topology, coordinates: Coordinates = ()) -> Seconds:
    """Time of a program on one device of a topology."""
    wire = (one.count * _wire_seconds(one, topology, coordinates) for one in costs.collectives)
    kernels = (one.count * max(one.flops / topology.peak, one.bytes / topology.bandwidth) for one in costs.kernels)
    clock = topology.chip.clock
    return Seconds(
        compute=costs.flops / topology.peak,
        memory=costs.bytes / topology.bandwidth,
        wire=math.fsum(wire),
        compiler=costs.cycles / clock + math.fsum(kernels) if clock and costs.cycles else 0.0,
        shares=topology.chip.shares,
    )


def _wire_seconds(collective: Collective, topology: Topology, coordinates: Coordinates) -> float:
    """Time of rings over all axes of the group: a gather sends (n - 1)/n of the array, an all-reduce twice that."""
    size, members = collective.group, collective.members
    if size < 2:
        return 0.0
    spans = topology.spans(size)
    if coordinates and members and max(members) < len(coordinates):
        spans = tuple(len(set(axis)) for axis in zip(*(coordinates[member] for member in members)))
    sent = {
        "all-reduce": 2 * (size - 1) / size,
        "collective-permute": 1.0,
        "all-to-all": math.sqrt(size) / 4 if size > 4 else 0.5,
    }.get(collective.kind, (size - 1) / size)
    return sent * collective.bytes / topology.wire(spans)
