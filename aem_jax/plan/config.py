"""Settings of `plan`: a run, and the devices to plan it for."""

from dataclasses import dataclass

from aem_jax.config.run import RunConfig
from aem_jax.overrides import nearest

PROGRAMS = ("update", "reshard", "extend", "decode")


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """A run and its target."""

    topology: str = "v5p:2x2x1"
    """Target: v4, v5e, v5p, v6e or tpu7x with its shape (v5p:4x4x8), gpu:MODEL:COUNT (gpu:h100:8;
    gpu:h100:8x4 for four hosts of eight), or cpu:COUNT."""
    analytic: bool = False
    """Use closed forms only: compiles nothing, and needs neither libtpu nor a CUDA plugin."""
    programs: tuple[str, ...] = PROGRAMS
    """Programs to compile, of update, reshard, extend and decode; each takes seconds to a few minutes."""
    json: bool = False
    """Print one JSON line instead of tables."""

    def __post_init__(self) -> None:
        if not self.programs:
            raise ValueError(f"expected one or more programs of {', '.join(PROGRAMS)}, got none")
        for name in self.programs:
            if name not in PROGRAMS:
                hint = nearest(name, PROGRAMS) or f"; there are {', '.join(PROGRAMS)}"
                raise ValueError(f"expected programs to be compiled, got {name!r}{hint}")


def plan_config(run: RunConfig) -> PlanConfig:
    """The config of a plan of a run, with default settings."""
    return PlanConfig(**vars(run))
