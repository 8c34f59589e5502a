"""The slot sampler: jitted functions over a `SamplerState`, whose KV cache keeps each episode's tokens."""

from aem_jax.sampler.programs import CONTINUE, Decoded
from aem_jax.sampler.sampler import Sampler
from aem_jax.sampler.sampling import SampleToken, SamplingConfig, make_sample_token
from aem_jax.sampler.state import SamplerState

__all__ = ["CONTINUE", "Decoded", "SampleToken", "Sampler", "SamplerState", "SamplingConfig", "make_sample_token"]
