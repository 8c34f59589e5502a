"""Settings of the machine and of the processes of a run."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine: settings that apply before the first computation."""

    compilation_cache: str = "auto"
    """Folder of compiled programs. auto: $XDG_CACHE_HOME/aem_jax/xla, of several processes RUNS_DIR/.xla; off: none."""
    platform: str = ""
    """Platform to compute on: cpu, cuda or tpu; empty: the best available one."""
    cpu_devices: int = 0
    """Simulated devices on a CPU, to try a mesh on one machine; 0: JAX's default."""
    distributed: Literal["auto", "on", "off", "mpi4py"] = "auto"
    """Several processes as one run. auto: where SLURM, Open MPI, a TPU pod or a Kubernetes job started several, or
    coordinator is given; on: as JAX detects them; mpi4py: as mpi4py reports them; off: this process alone."""
    coordinator: str = ""
    """HOST:PORT of process 0, for processes started by hand; any free port there."""
    num_processes: int = 0
    """With coordinator: number of processes."""
    process_id: int = -1
    """With coordinator: index of this process, from 0."""
    connect_timeout_s: float = 300.0
    """Seconds that the processes wait for one another at the start."""
    heartbeat_timeout_s: float = 45.0
    """Seconds without a heartbeat after which a process counts as gone; a killed process is detected at once."""

    def __post_init__(self):
        if self.cpu_devices < 0:
            raise ValueError(f"expected cpu_devices >= 0, got {self.cpu_devices}")
        if self.connect_timeout_s <= 0 or self.heartbeat_timeout_s < 5:
            raise ValueError(
                "expected connect_timeout_s above 0 and heartbeat_timeout_s of at least 5, "
                f"got {self.connect_timeout_s} and {self.heartbeat_timeout_s}"
            )
        if not self.coordinator:
            if self.num_processes or self.process_id != -1:
                raise ValueError(
                    f"expected coordinator with num_processes {self.num_processes} and process_id {self.process_id}, "
                    "got none; give HOST:PORT of process 0"
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
