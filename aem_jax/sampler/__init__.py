"""The slot sampler: jitted functions over a `SamplerState`, whose KV cache lives as long as its episodes do."""

from aem_jax.sampler.draw import Draw, SamplingConfig, make_draw
from aem_jax.sampler.sampler import Decoded, Sampler
from aem_jax.sampler.state import SamplerState

__all__ = ["Decoded", "Draw", "Sampler", "SamplerState", "SamplingConfig", "make_draw"]
