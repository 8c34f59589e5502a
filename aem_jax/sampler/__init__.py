"""The slot sampler: jitted functions over a `SamplerState`, whose KV cache lives as long as its episodes do."""

from aem_jax.sampler.draw import Draw, SamplingConfig, make_draw
from aem_jax.sampler.programs import GO_ON, Decoded
from aem_jax.sampler.sampler import Sampler
from aem_jax.sampler.state import SamplerState

__all__ = ["GO_ON", "Decoded", "Draw", "Sampler", "SamplerState", "SamplingConfig", "make_draw"]
