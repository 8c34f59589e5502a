"""Plays episodes between a sampler and environments. The only room that sees both text and tokens.

`Rollout` assigns episodes to slots of a KV cache. From the last sampled token of a response, a stop id or the end of
its budget, to the first token of the next response, an episode passes these steps:

    1. read      `lockstep._decode_responses`, `continuous._read`: copy a decoded chunk to the host
    2. append    `SlotGroup.append_sampled`, `Episode.append_sampled`: a finished response has budget 0
    3. submit    `SlotGroup.submit`: decode the response to text, and send it to the environment (`SlotSessions.step`)
    4. observe   `SlotGroup.collect`, `episode.observe`: tokenise the observation; does the episode end, and how?
                 `context.appended_prompt` or `context.full_prompt` choose the ids that stay and the ids to prefill
    5. gather    `slots.all_gather_replies`: every process gets the replies of all processes
    6. apply     `SlotGroup._apply`, `Episode.apply_reply`: finish the turn and set the next observation; an episode
                 that ends becomes a trajectory, one whose environment failed is retried or masked
    7. prefill   `SlotGroup.prefill`: rewind the slots to the ids that stay, or copy longer prefixes from other slots
                 (`sharing.plan_passes`), plan calls (`batching.plan_calls`), and append ids in buckets
                 (`batching.prefill`); `Episode.prefilled` sets the budget of the next response
    8. decode    `Sampler.decode`

A new episode starts at `SlotGroup.assign`, which resets its environment, and passes steps 4 to 8. Its first prompt is
prefilled once for its group and forked to the slots (`PromptCache.fork`). The environments of episodes that a resumed
run goes on with get their recorded responses again (`replay.replay`).
"""

from aem_jax.rollout.carry import Carried, group_attempts
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.rollout import Rollout, check_cache_memory
from aem_jax.rollout.stats import OverlongPromptsError, RolloutStats, check_some_played

__all__ = [
    "Carried",
    "OverlongPromptsError",
    "Rollout",
    "RolloutConfig",
    "RolloutStats",
    "check_cache_memory",
    "check_some_played",
    "group_attempts",
]
