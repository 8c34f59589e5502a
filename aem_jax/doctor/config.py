"""What `doctor` can be told."""

from dataclasses import dataclass, field, replace

from aem_jax.distributed.config import RuntimeConfig
from aem_jax.models.config import CONFIGS, ModelConfig


@dataclass(frozen=True)
class DoctorConfig:
    """Which model's shape is checked, and on what."""

    model: str = ""
    """Known size of the decoder (as model.name of a run); its parameters are random. Empty: tiny on a CPU,
    qwen2.5-0.5b on an accelerator."""
    runs_dir: str = "runs"
    """Folder of all runs: whether it can be written, and what room its disk has."""
    json: bool = False
    """One JSON document on standard output; the table goes to standard error."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """The machine; always one process."""

    @property
    def shape(self) -> ModelConfig:
        """Sizes of the decoder; `model` is filled in by then."""
        return CONFIGS[self.model]

    def shallow(self, dtype: str, layers: int = 2) -> ModelConfig:
        """The same widths in another dtype, with at most `layers` layers: the same operations, quickly compiled."""
        return replace(self.shape, num_layers=min(self.shape.num_layers, layers), dtype=dtype)
