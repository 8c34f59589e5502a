"""A pool replays OpenEnv's own environments, as recorded by `record_openenv.py`."""

import json
import re
from pathlib import Path

import pytest
from envs.record_openenv import UNKNOWN_STEP, requests
from envs.servers import foreign_server

from aem_jax.envs.protocol import RefusedError, StepResult
from aem_jax.envs.serving.field_mapping import FieldMapping, decode_step
from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.overrides import override

FOLDER = Path(__file__).with_name("openenv_recorded")
FILES = sorted(FOLDER.glob("*.jsonl"))

OPEN = {"won": False, "valid_action": True}
GUESS = "You are Player 0. You are playing Guess The Number."
INVALID_MOVE = "You attempted an invalid move. Reason: Invalid move format."
LEGS = "Your task is to count how many legs there are in total"

# Taken from the recordings by hand: the beginning of each text, rewards, ends, wins. Versions differ if one omits
# the metadata; textarena draws a new number each time (its server ignores the seed).
EXPECTED = {
    "echo_env-0.3.0": [("", 0.0, False, OPEN), ("hello", 0.0, False, OPEN), ('ü "quoted"', 0.0, False, OPEN)],
    "echo_env-0.10.0": [
        ("Echo environment ready!", 0.0, False, OPEN),
        ("hello", 0.0, False, OPEN),
        ('ü "quoted"', 0.0, False, OPEN),
    ],
    # a tenth of a point for each character
    "echo_template-0.3.0": [
        ("Echo Template environment ready!", 0.0, False, OPEN),
        ("hello", 0.5, False, OPEN),
        ("", 0.0, False, OPEN),
    ],
    # 15 lobsters of 10 legs, 14 ducks of 2, 8 beetles and 5 fireflies of 6: 150 + 28 + 48 + 30 = 256
    "reasoning_gym_env-0.3.0": [
        (LEGS, 0.0, False, OPEN),
        ("", 1.0, True, {"won": True, "valid_action": True, "score": 1.0}),
    ],
    "textarena_env-0.3.0": [
        (GUESS, 0.0, False, OPEN),
        ("The target number is lower.", 0.0, False, OPEN),
        (INVALID_MOVE, 0.0, False, OPEN),
        # The second invalid move in a row ends the game. The reward is the nearness of the guess, 10, to the number, 1,
        # on a scale of 1 to 20: above 0, but not won.
        ("no", 1 - 9 / 19, True, OPEN),
    ],
}
for env in ("echo_template", "reasoning_gym_env", "textarena_env"):
    EXPECTED[f"{env}-0.10.0"] = list(EXPECTED[f"{env}-0.3.0"])
EXPECTED["textarena_env-0.10.0"][-1] = ("no", 1 - 4 / 19, True, OPEN)  # that game's number is 6


def recorded(path: Path):
    """(description of the recording, the mapping, [(request, answer)])."""
    head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return head, override(FieldMapping(), head["field_mapping"]), [(line["sent"], line["received"]) for line in lines]


def test_every_recording_has_expected_values():
    assert {path.stem for path in FILES} == set(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recorded_server_is_played(path: Path):
    head, mapping, exchanges = recorded(path)
    assert requests(mapping, head["task"], head["say"]) == [sent for sent, _ in exchanges]
    # The server replays the answers and compares the requests: the pool's must equal those that OpenEnv accepted.
    matches, recording = [], iter(exchanges)

    def reply(message):
        if message["type"] == "close":
            return None
        sent, received = next(recording)
        matches.append(message == json.loads(sent))
        return received

    with foreign_server(reply) as address:
        config = PoolConfig(urls=(address,), sessions_per_server=1, field_mapping=mapping)
        with EnvPool(config, ("", {})) as pool:
            results = [pool.reset(0, head["task"]).result(10)]
            results += [pool.step(0, text).result(10) for text in head["say"]]
    assert matches == [True] * (2 + len(head["say"]))
    assert len(results) == len(EXPECTED[path.stem])
    for result, (text, reward, done, info) in zip(results, EXPECTED[path.stem]):
        assert result.observation.startswith(text) and bool(result.observation) == bool(text)
        assert (result.terminated, result.truncated, result.info) == (done, False, info)
        assert result.reward == pytest.approx(reward)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_validation_errors_of_a_refused_step_are_kept(path: Path):
    _, mapping, exchanges = recorded(path)
    answer = dict(exchanges)[UNKNOWN_STEP]
    # the details are beside OpenEnv's message, not in it
    why = r"Invalid message; \w+: Field required; no such field: Extra inputs are not permitted"
    if mapping.invalid_codes:
        result = decode_step(answer, mapping)
        assert result == StepResult(result.observation, info={"won": False, "valid_action": False})
        assert re.fullmatch(why, result.observation)
    else:
        with pytest.raises(RefusedError, match=f"VALIDATION_ERROR: {why}"):
            decode_step(answer, mapping)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_closing_gets_no_reply(path: Path):
    *_, (request, answer) = recorded(path)[2]
    assert (json.loads(request), answer) == ({"type": "close"}, None)
