"""The policy and the sampler that rollout tests share."""

import jax
import pytest

from aem_jax.sampler import Sampler, SamplingConfig

from .fakes import CONFIG, POLICY, STOP


@pytest.fixture(scope="session")
def params():
    return POLICY.init(jax.random.key(0))


@pytest.fixture(scope="session")
def sampler():
    return Sampler(POLICY, SamplingConfig(), [STOP], capacity=96, slack=CONFIG.slack, windows=CONFIG.windows)
