"""Sizes of a decoder, in the field's usual names, and the table of known ones."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of Qwen3's form: grouped queries, q/k norm, rotary positions, SwiGLU, tied or untied head."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    tied_head: bool = True
    dtype: str = "float32"
    """Dtype of activations and of the weights as used; masters are float32."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"expected num_heads divisible by num_kv_heads, got {self.num_heads} and {self.num_kv_heads}; "
                "every key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"expected an even head_dim (rotary positions turn pairs), got {self.head_dim}")

    @property
    def num_parameters(self) -> int:
        """Parameters, the embedding counted once when the head is tied."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads) + 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tied_head else 2)
        return self.num_layers * layer + tables + self.hidden_size


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, kv: int, tied: bool) -> ModelConfig:
    return ModelConfig(151_936, hidden, intermediate, layers, heads, kv, 128, tied_head=tied, dtype="bfloat16")


CONFIGS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(512, 128, 384, 4, 4, 2, 32, rope_theta=10_000.0),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8, False),
}
"""Known sizes by name. `tiny`'s vocabulary is replaced by that of the tokenizer trained for the run."""
