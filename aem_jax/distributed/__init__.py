"""Several processes as one run: joining, control channel, failures, signals; and the machine of each process."""

from aem_jax.distributed.process_group import SINGLE_PROCESS, ProcessGroup

__all__ = ["SINGLE_PROCESS", "ProcessGroup"]
