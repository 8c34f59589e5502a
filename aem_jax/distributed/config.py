"""Settings of the machine and of the processes of a run."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine: what is set before the first computation."""

    compilation_cache: str = "auto"
    """Folder in which compiled programs are kept between runs; auto: $XDG_CACHE_HOME/aem_jax/xla; off: none."""
    platform: str = ""
    """Where to compute: cpu, cuda or tpu; empty: the best that there is."""
    cpu_devices: int = 0
    """Simulated devices on a CPU, to try a mesh without one; 0 leaves it to JAX."""
    distributed: Literal["auto", "on", "off", "mpi4py"] = "auto"
    """Several processes as one run. auto: where SLURM, Open MPI, a TPU pod or a Kubernetes job started several, or
    coordinator is given; on: as JAX finds them, wherever that is; mpi4py: as any MPI says; off: this process alone."""
    coordinator: str = ""
    """HOST:PORT of process 0, where processes are started by hand; the port is any free one of that host."""
    num_processes: int = 0
    """With coordinator: how many processes there are."""
    process_id: int = -1
    """With coordinator: which one this is, from 0."""
    connect_timeout_s: float = 300.0
    """Seconds that processes wait for one another at the start."""
    silence_s: float = 45.0
    """Seconds after which a process that says nothing counts as gone; one that is killed is missed at once."""

    def __post_init__(self):
        if self.cpu_devices < 0:
            raise ValueError(f"expected cpu_devices >= 0, got {self.cpu_devices}")
        if self.connect_timeout_s <= 0 or self.silence_s < 5:
            raise ValueError(
                "expected connect_timeout_s above 0 and silence_s of at least 5, "
                f"got {self.connect_timeout_s} and {self.silence_s}"
            )
        if not self.coordinator:
            if self.num_processes or self.process_id != -1:
                raise ValueError(
                    f"expected coordinator with num_processes {self.num_processes} and process_id {self.process_id}, "
                    "got none; say HOST:PORT of process 0"
                )
            return
        if self.distributed == "mpi4py" or not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(
                f"expected coordinator HOST:PORT, and distributed auto or on beside it, got {self.coordinator!r} and "
                f"{self.distributed}"
            )
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"expected num_processes above 0 and process_id from 0 to num_processes - 1 with coordinator, "
                f"got {self.num_processes} and {self.process_id}"
            )
