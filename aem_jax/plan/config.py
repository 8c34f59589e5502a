"""Settings of a plan: a run, and the devices that it is planned for."""

from dataclasses import dataclass

from aem_jax.config.run import RunConfig
from aem_jax.overrides import nearest

PROGRAMS = ("update", "reshard", "extend", "decode")


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """A run, and where it is to go."""

    topology: str = "v5p:2x2x1"
    """Devices: v4, v5e, v5p, v6e or tpu7x and its chips (v5p:4x4x8), gpu:MODEL:COUNT (gpu:h100:8), or cpu:COUNT."""
    analytic: bool = False
    """Closed forms alone: nothing is compiled, no libtpu needed."""
    programs: tuple[str, ...] = PROGRAMS
    """What is compiled, of update, reshard, extend and decode; each takes from seconds to a few minutes."""
    json: bool = False
    """One JSON line instead of tables."""

    def __post_init__(self) -> None:
        for name in self.programs:
            if name not in PROGRAMS:
                hint = nearest(name, PROGRAMS) or f"; there are {', '.join(PROGRAMS)}"
                raise ValueError(f"expected programs to be compiled, got {name!r}{hint}")


def plan_config(run: RunConfig) -> PlanConfig:
    """The plan of a run, all else default."""
    return PlanConfig(**vars(run))
