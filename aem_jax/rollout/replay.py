"""Brings the environments of episodes under way to where they were, in new sessions."""

from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait

from aem_jax.envs.protocol import EnvError, LostError, StepResult
from aem_jax.rollout.episode import EnvReply, Episode
from aem_jax.rollout.sessions import SlotSessions

_PATIENCE_S = 30.0
"""Seconds for which all pending calls may wait for room. Sessions released before give theirs back by then."""

Calls = dict[int, Future[StepResult]]
"""Slot -> its pending call."""


def replay(sessions: SlotSessions, episodes: Mapping[int, Episode]) -> tuple[dict[int, EnvReply], Calls]:
    """Resets the environments of this process's slots, and sends them the recorded responses of their episodes.

    An episode begins again where its environment answers otherwise than before (some texts are never the same twice,
    as "passed in 0.03 s"), and where it still waits for room when the others are where they were, because these keep
    theirs.

    Args:
        sessions: environment sessions of all slots; none has an episode.
        episodes: slot, over all groups -> episode.

    Returns:
        Slot -> error, of each environment that is not where it was; and the pending resets, of the episodes that begin
        again and of those that had not begun.
    """
    replies: dict[int, EnvReply] = {}
    shown = {
        slot: [*(turn.observation for turn in episode.turns), episode.observation.text]
        for slot, episode in episodes.items()
        if episode.observation is not None
    }
    calls, resets = _reset(sessions, {slot: episodes[slot] for slot in shown}), Calls()
    sent = dict.fromkeys(calls, 0)  # responses sent to each environment
    while calls:
        wait(calls.values(), timeout=_PATIENCE_S, return_when=FIRST_COMPLETED)
        done = {slot: call for slot, call in calls.items() if call.done()}
        if not done and all(sessions.waits(slot) and not sent[slot] for slot in calls):
            # Only resets: they go on as those of the episodes that begin again. A session has one call at a time.
            why = "expected room for its environment when the episode was replayed, got none beside the others"
            replies |= dict.fromkeys(calls, EnvReply(why, restarted=True))
            resets |= calls
            break
        for slot, call in done.items():
            del calls[slot]
            episode, turn = episodes[slot], sent[slot]
            try:
                text = call.result().observation
            except EnvError as error:
                replies[slot] = EnvReply(str(error), isinstance(error, LostError))
                continue
            if text != shown[slot][turn]:
                why = f"expected the observation of turn {turn} again when the episode was replayed, got {text!r:.80}"
                replies[slot] = EnvReply(why, restarted=True)
                resets |= _reset(sessions, {slot: episode})  # ends the replayed episode, whose room others may wait for
            elif turn < len(episode.turns):
                calls[slot] = sessions.step(slot, episode.turns[turn].response)
                sent[slot] += 1
    return replies, resets | _reset(sessions, {s: e for s, e in episodes.items() if s not in shown})


def _reset(sessions: SlotSessions, episodes: Mapping[int, Episode]) -> Calls:
    """Resets the environments of this process's slots."""
    calls = {slot: sessions.reset(slot, episode.attempt.task.payload) for slot, episode in episodes.items()}
    return {slot: call for slot, call in calls.items() if call is not None}
