"""The cost of AEM in a step of the 1.5B preset, counted from the compiled program."""

from typing import Any

import jax
import jax.numpy as jnp

from aem_jax.advantage import aem_coefficients, coefficient_statistics, response_entropy, token_advantages
from aem_jax.config.presets import read_preset
from aem_jax.plan.analytic import learn_flops
from aem_jax.plan.costs import costs
from aem_jax.plan.floors import learn_costs
from aem_jax.plan.hlo import read
from aem_jax.plan.workload import workload
from aem_jax.sharding import MeshConfig

GROUPS = 16


def all_of_aem(token_entropy, response_ids, base, groups, valid):
    """All work that AEM adds to a step. The last broadcast to tokens also occurs in a step without AEM."""
    entropies = response_entropy(token_entropy, response_ids, base.shape[0])
    alpha = aem_coefficients(entropies, groups, GROUPS, valid=valid)
    statistics = coefficient_statistics(alpha, base, entropies, groups, GROUPS, valid=valid)
    return token_advantages(alpha * base, response_ids), statistics


def test_aem_is_at_most_a_thousandth_of_a_step_of_the_large_preset():
    """AEM takes 0.006 % of the bytes and 1e-7 % of the FLOPs of the largest update.

    That update has 128 x 50 responses in 400 microbatches of 16 x 2560. Its costs come from the closed forms, which
    the tests of plans compare with compiled programs.
    """
    work = workload(read_preset("alfworld-paper", "qwen2.5-1.5b"))
    layout = work.layout
    shape = (layout.num_microbatches * layout.rows, layout.row_length)
    struct = lambda dtype, *size: jax.ShapeDtypeStruct(size, dtype)
    responses = layout.max_responses
    assert responses == 128 * 50
    tables = struct(jnp.float32, responses), struct(jnp.int32, responses), struct(jnp.bool_, responses)
    compiled = jax.jit(all_of_aem).lower(struct(jnp.float32, *shape), struct(jnp.int32, *shape), *tables).compile()
    # `costs` counts only the FLOPs of matrix products, and there are none here: XLA's own count is complete
    counted: Any = compiled.cost_analysis()
    flops, bytes_moved = counted["flops"], costs(read(compiled)).bytes
    update = learn_costs(work, MeshConfig(1, 1, 1), learn_flops(work))
    assert 0 < flops <= 1e-3 * update.flops
    assert 0 < bytes_moved <= 1e-3 * update.bytes
