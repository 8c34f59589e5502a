"""Settings of `doctor`."""

from dataclasses import dataclass, field, replace

from aem_jax.distributed.config import RuntimeConfig
from aem_jax.models.config import CONFIGS, ModelConfig


@dataclass(frozen=True)
class DoctorConfig:
    """The model shape to check, and the machine."""

    model: str = ""
    """Name of a known decoder size (as model.name of a run); its parameters are random. Empty: tiny on a CPU,
    qwen2.5-0.5b on an accelerator."""
    runs_dir: str = "runs"
    """Folder of all runs; checked for write access and free disk space."""
    json: bool = False
    """Print one JSON document on standard output; the table goes to standard error."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """The machine; the checks always use one process."""

    @property
    def shape(self) -> ModelConfig:
        """Sizes of the decoder; requires that `model` is set."""
        return CONFIGS[self.model]

    def shallow(self, dtype: str) -> ModelConfig:
        """The same widths in another dtype, with at most two layers: the same operations compile faster."""
        return replace(self.shape.with_layers(min(self.shape.num_layers, 2)), dtype=dtype)
