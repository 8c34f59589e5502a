"""The learner: state, optimizer, and the jitted update of a policy on one batch of trajectories.

state = init_state(policy, config, mesh, key)
update = make_update(policy, config, mesh)
state, metrics = update(state, place(collate(trajectories, layout), mesh), advantages)
"""

from aem_jax.learner.config import LearnerConfig
from aem_jax.learner.forward import Rows, row_statistics
from aem_jax.learner.optimizer import make_optimizer, make_schedule, num_updates
from aem_jax.learner.passes import make_response_values, make_token_logprobs
from aem_jax.learner.state import TrainState, abstract_state, combine, init_state, partition
from aem_jax.learner.update import Update, make_supervised_update, make_update

__all__ = [
    "LearnerConfig",
    "Rows",
    "TrainState",
    "Update",
    "abstract_state",
    "combine",
    "init_state",
    "make_optimizer",
    "make_response_values",
    "make_schedule",
    "make_supervised_update",
    "make_token_logprobs",
    "make_update",
    "num_updates",
    "partition",
    "row_statistics",
]
