"""What is known of devices, and topologies by name: `v5p:4x4x8`, `gpu:h100:8`, `cpu:8`.

Sources. TPU: cloud.google.com/tpu/docs (a page a generation: peak, memory, bandwidth, interconnect) and the table of
"How To Scale Your Model" (jax-ml.github.io/scaling-book/tpus). GPU: NVIDIA's data sheets, dense bf16 without sparsity.
The clock is that in which libtpu's own estimates count cycles.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from aem_jax.errors import ConfigError
from aem_jax.overrides import nearest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Facts of one chip.

    Attributes:
        peak: bf16 FLOP/s.
        memory: bytes of HBM.
        bandwidth: bytes/s of HBM.
        link: bytes/s of one link to a neighbour, in one direction; of a GPU all NVLinks together.
        axes: axes of the torus (TPU), each with two links; 0 for a switch (GPU).
        ring: a TPU's axis of a multiple of so many chips closes to a ring.
        clock: Hz of the cycles that the compiler estimates, 0 where it estimates none.
        cores: devices that jax sees of one chip.
        domain: chips behind one switch (GPU); beyond it `network` counts.
        network: bytes/s a GPU has to other machines, in one direction.
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


TPUS: Mapping[str, Chip] = {
    "v4": Chip(275e12, 32 * GIB, 1.23e12, 45e9, 3, 4, 1.05e9, 2),
    "v5e": Chip(197e12, 16 * GIB, 0.82e12, 45e9, 2, 16, 1.5e9),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 90e9, 3, 4, 1.75e9),
    "v6e": Chip(918e12, 32 * GIB, 1.64e12, 90e9, 2, 16, 1.75e9),
    "tpu7x": Chip(2307e12, 192 * GIB, 7.38e12, 100e9, 3, 4, 2.2e9, 2),
}
GPUS: Mapping[str, Chip] = {
    "a100": Chip(312e12, 80e9, 2.04e12, 300e9, domain=8, network=25e9),
    "h100": Chip(989e12, 80e9, 3.35e12, 450e9, domain=8, network=50e9),
    "h200": Chip(989e12, 141e9, 4.8e12, 450e9, domain=8, network=50e9),
    "b200": Chip(2250e12, 180e9, 7.7e12, 900e9, domain=8, network=50e9),
    "l40s": Chip(362e12, 48e9, 0.864e12, 32e9, domain=8, network=25e9),
    "rtx4090": Chip(165e12, 24e9, 1.008e12, 32e9, domain=8, network=12.5e9),
}
CPU = Chip(1e11, 16 * GIB, 2e10, 1e10, domain=1024)
"""Of a simulated device nothing is known; these only keep the arithmetic going."""


@dataclass(frozen=True)
class Topology:
    """Chips and how they are joined.

    Attributes:
        name: as given.
        kind: "tpu" is compiled for by libtpu, "cpu" by jax itself, "gpu" not at all.
        chip: facts of one chip.
        sizes: chips along each axis; of GPUs and CPUs their number.
    """

    name: str
    kind: Literal["tpu", "gpu", "cpu"]
    chip: Chip
    sizes: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Chips."""
        return math.prod(self.sizes)

    @property
    def num_devices(self) -> int:
        """Devices that jax sees."""
        return self.num_chips * self.chip.cores

    @property
    def peak(self) -> float:
        """bf16 FLOP/s of a device."""
        return self.chip.peak / self.chip.cores

    @property
    def memory(self) -> float:
        """Bytes of a device."""
        return self.chip.memory / self.chip.cores

    @property
    def bandwidth(self) -> float:
        """HBM bytes/s of a device."""
        return self.chip.bandwidth / self.chip.cores

    def wire(self, spans: tuple[int, ...]) -> float:
        """Bytes/s out of one device to a group that spans `spans` chips along each axis (of GPUs: so many devices)."""
        chip = self.chip
        if self.kind != "tpu":
            return chip.link if math.prod(spans) <= chip.domain else chip.network
        total = sum(
            chip.link * (2 if size % chip.ring == 0 else 1) for size, span in zip(self.sizes, spans) if span > 1
        )
        return (total or chip.link * chip.axes * 2) / chip.cores  # none: the two devices of one chip

    def spans(self, devices: int) -> tuple[int, ...]:
        """The box of chips that `devices` neighbours fill, its axes from the last one on."""
        if self.kind != "tpu":
            return (devices,)
        left, found = max(devices // self.chip.cores, 1), []
        for size in reversed(self.sizes):
            found.append(min(left, size))
            left = -(-left // size)
        return tuple(reversed(found))


def parse_topology(name: str) -> Topology:
    """The topology of a name.

    Raises:
        ConfigError: no such device, or a shape that is none.
    """
    kind, _, rest = name.partition(":")
    if kind in TPUS:
        chip = TPUS[kind]
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest) or rest.count("x") != chip.axes - 1:
            example = "x".join(["2", "2", "2", "4"][: chip.axes])
            raise ConfigError(f"--topology: expected {kind}: and {chip.axes} sizes, as {kind}:{example}, got {name!r}")
        return Topology(name, "tpu", chip, tuple(map(int, rest.split("x"))))
    if kind == "gpu":
        model, _, count = rest.partition(":")
        if model not in GPUS:
            hint = nearest(model, GPUS) or f"; known are {', '.join(GPUS)}"
            raise ConfigError(f"--topology: unknown GPU {model!r}{hint}")
        return Topology(name, "gpu", GPUS[model], (_count(name, count),))
    if kind == "cpu":
        return Topology(name, "cpu", CPU, (_count(name, rest),))
    hint = nearest(kind, (*TPUS, "gpu", "cpu"))
    raise ConfigError(
        f"--topology: unknown device {kind!r}{hint}; expected one of {', '.join(TPUS)} and its shape (v5p:4x4x8), "
        "or gpu:MODEL:COUNT (gpu:h100:8), or cpu:COUNT"
    )


def _count(name: str, word: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", word):
        raise ConfigError(f"--topology: expected a number of devices at the end of {name!r}, got {word!r}")
    return int(word)
