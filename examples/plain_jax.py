"""AEM in a custom training loop: REINFORCE in plain JAX, with only `aem_jax.advantage`, jax and optax.

    python examples/plain_jax.py             # with AEM
    python examples/plain_jax.py 0           # λ = 0: plain GRPO advantages

The game: a walker starts on a ring of 12 places, some steps from a treasure, and has 4 turns. In each turn it observes
its place and samples a response of 2 tokens, each a move of -1, 0, +1 or +2. The reward is 1 if the walker is on the
treasure after the last turn, else 0. 8 walkers with the same start are a group; the policy is a table of logits.
"""

import sys

import jax
import jax.numpy as jnp
import optax

from aem_jax.advantage import (
    aem_coefficients,
    grpo,
    over_trajectories,
    response_entropy,
    token_advantages,
    token_statistics,
)

PLACES, TURNS, LENGTH, MOVES = 12, 4, 2, jnp.array([-1, 0, 1, 2])
GROUPS, SIZE = 16, 8
N = GROUPS * SIZE
GROUP = jnp.repeat(jnp.arange(GROUPS), SIZE)  # [N], of each trajectory
TRAJECTORY = jnp.repeat(jnp.arange(N), TURNS)  # [R], of each response
RESPONSE = jnp.repeat(jnp.arange(N * TURNS), LENGTH).reshape(N, TURNS * LENGTH)  # [N, T], of each token


def play(policy, start, key):
    """Plays from `start` [N]; returns places, previous tokens and tokens, [N, T] each, and success [N]."""
    place, steps = start, []
    for turn_key in jax.random.split(key, TURNS):
        before = jnp.full_like(place, len(MOVES))  # no token yet in this turn
        for token_key in jax.random.split(turn_key, LENGTH):
            token = jax.random.categorical(token_key, policy[place, before])
            steps.append((place, before, token))
            before = token
        place = (place + sum(MOVES[token] for _, _, token in steps[-LENGTH:])) % PLACES
    return *(jnp.stack(column, axis=1) for column in zip(*steps)), (place == 0).astype(jnp.float32)


def loss(policy, seen, before, tokens, advantages):
    """REINFORCE: −Σ A log π over an episode's tokens, mean over episodes."""
    logprobs, _ = token_statistics(policy[seen, before], tokens)
    return -jnp.mean(jnp.sum(advantages * logprobs, axis=1))


@jax.jit
def step(policy, state, key, strength, learning_rate):
    """Plays one batch of episodes and updates once; returns the policy, the optimizer's state and metrics."""
    start_key, play_key = jax.random.split(key)
    start = jax.random.randint(start_key, (GROUPS,), 1, PLACES)[GROUP]
    seen, before, tokens, success = play(policy, start, play_key)
    # The five lines of AEM: sampling entropies, their mean per response, α over a group's responses, A = α · A_base.
    _, entropies = token_statistics(policy[seen, before], tokens)
    entropy = response_entropy(entropies, RESPONSE, N * TURNS)
    alpha = aem_coefficients(entropy, GROUP[TRAJECTORY], GROUPS, strength=strength)
    base = over_trajectories(grpo, success, GROUP, GROUPS, TRAJECTORY)
    advantages = token_advantages(alpha * base, RESPONSE)
    gradient = jax.grad(loss)(policy, seen, before, tokens, advantages)
    updates, state = optax.adam(learning_rate).update(gradient, state)
    watch = {"success": success.mean(), "entropy": entropy.mean(), "alpha min": alpha.min(), "alpha max": alpha.max()}
    return optax.apply_updates(policy, updates), state, watch


def train(steps=200, strength=1.0, learning_rate=0.03, seed=0):
    """Trains from uniform logits; returns each step's success, entropy (nats) and range of α, as floats."""
    policy = jnp.zeros((PLACES, len(MOVES) + 1, len(MOVES)))  # [place, previous token, move]
    state, history = optax.adam(learning_rate).init(policy), []
    for key in jax.random.split(jax.random.key(seed), steps):
        policy, state, watch = step(policy, state, key, strength, learning_rate)
        history.append(watch)
    return [{name: float(value) for name, value in watch.items()} for watch in jax.device_get(history)]


if __name__ == "__main__":
    history = train(strength=float(sys.argv[1]) if sys.argv[1:] else 1.0)
    for number, watch in enumerate(history):
        if number % 20 == 0 or number == len(history) - 1:
            print(f"step {number:3d}", *(f"{name} {value:.3f}" for name, value in watch.items()), sep="  ")
    first, last = (sum(watch["success"] for watch in part) / 10 for part in (history[:10], history[-10:]))
    print(f"success before {first:.3f}, after {last:.3f} (means of 10 steps)")
