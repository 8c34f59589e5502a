"""Fields of foreign servers are found at the mapped paths, and nowhere else."""

import json
import re
from dataclasses import replace

import pytest
from envs.servers import REPOSITORY

from aem_jax.envs.protocol import EnvError, RefusedError, StepResult
from aem_jax.envs.serving.field_mapping import FieldMapping, decode_result, decode_step, step_encoder
from aem_jax.envs.serving.session import encode_error

BARE = FieldMapping(
    won_field="", truncated_field="", terminated_field="", valid_field="", admissible_field="", info_field=""
)


def reply(observation, reward=0.0, done=False):
    return json.dumps({"type": "observation", "data": {"observation": observation, "reward": reward, "done": done}})


def sent(mapping: FieldMapping, text: str):
    message = json.loads(step_encoder(mapping)(text))
    assert message["type"] == "step"
    return message["data"]


def text_of(path, observation):
    return decode_result(reply(observation), replace(BARE, text_field=path)).observation


def test_an_action_inside_an_action():
    mapping = FieldMapping("arguments.message", '{"tool_name": "echo", "arguments": {"times": 2}}')
    encode = step_encoder(mapping)
    for text in ("a", "b"):  # the first action has no effect on the second
        assert json.loads(encode(text))["data"] == {"tool_name": "echo", "arguments": {"times": 2, "message": text}}
    assert sent(FieldMapping("a.b.c"), "x") == {"a": {"b": {"c": "x"}}}
    with pytest.raises(ValueError, match="expected action_constants with a mapping in 'arguments'"):
        step_encoder(FieldMapping("arguments.message", '{"arguments": 3}'))


@pytest.mark.parametrize(
    ("response", "action"),
    [
        ("<think>is it 3?</think> <answer>4</answer>", "4"),
        ("<answer>3</answer> no: <answer>4</answer>", "4"),  # the last match counts
        ("<answer></answer>", ""),
        ("4", "4"),  # without a match the server judges the full text
    ],
)
def test_action_pattern_selects_the_part_of_a_response_to_send(response, action):
    assert sent(FieldMapping("answer", action_pattern="<answer>(.*?)</answer>"), response) == {"answer": action}


@pytest.mark.parametrize("answer", ["<answer>4</answer>", "<answer>\n 4\n</answer>", "<answer> 4 </answer>\n"])
def test_the_guides_pattern_selects_an_answer_on_lines_of_its_own(answer):
    guide = (REPOSITORY / "docs" / "environments.md").read_text(encoding="utf-8")
    (pattern,) = re.findall(r"--env\.field-mapping\.action-pattern '(.*?)'", guide)
    assert sent(FieldMapping("answer", action_pattern=pattern), f"<think>2 + 2</think>\n{answer}") == {"answer": "4"}
    lines = FieldMapping("answer", action_pattern="Answer: (.*)")  # a pattern for one line remains one
    assert sent(lines, "Answer: 4\nI am sure.") == {"answer": "4"}


def test_a_pattern_needs_a_group():
    with pytest.raises(ValueError, match=r"expected action_pattern with a group \(…\), got 'go'"):
        FieldMapping(action_pattern="go")
    with pytest.raises(ValueError, match="expected action_pattern as a regular expression, got '\\('"):
        FieldMapping(action_pattern="(")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("messages.0.content", "first"),
        ("messages.-1.content", "last"),
        ("nothing|prompt", "go"),
        ("result|prompt", "go"),  # null counts as absent if another path has a value
        ("result.data|error.message", "no tool"),
        ("result|", ""),
        ("nothing|", ""),
        ("messages.2.content|", ""),
        ("messages.content|", ""),
    ],
)
def test_a_path_selects_a_text(path, text):
    messages = [{"content": "first"}, {"content": "last"}]
    observation = {"messages": messages, "prompt": "go", "result": None, "error": {"message": "no tool"}}
    assert text_of(path, observation) == text


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("reply", "expected the observation field 'reply', got fields"),
        ("reply|answer", "expected the observation field 'reply|answer', got fields"),
        ("messages.1", "expected the observation field 'messages.1'"),
        ("result", "expected text in 'result', got null; 'result|' takes null for no text"),
        ("messages", "expected text in 'messages'"),
        ("messages|", "expected text in 'messages|'"),  # a value is present, and it is no text
    ],
)
def test_a_missing_path_is_an_error_with_its_reason(path, why):
    with pytest.raises(EnvError) as error:
        text_of(path, {"messages": [{"content": "x"}], "result": None})
    assert why in str(error.value)


def test_optional_fields_have_defaults():
    optional = FieldMapping(
        "text", "{}", "text", "won|", "truncated|", "terminated|", "valid_action|", "admissible|", "info|"
    )
    won = {"won": True, "valid_action": True}
    assert decode_result(reply({"text": "x"}, 1, True), optional) == StepResult("x", 1.0, terminated=True, info=won)
    # a present field counts: lost at a limit, whatever the reward
    lost = {"won": False, "valid_action": False, "admissible": ["go"], "more": 1}
    fields = {"won": False, "truncated": True, "terminated": False, "valid_action": False}
    observation = {"text": "x", **fields, "admissible": ["go"], "info": {"more": 1}}
    assert decode_result(reply(observation, 1, True), optional) == StepResult("x", 1.0, truncated=True, info=lost)
    with pytest.raises(EnvError, match=r"expected true or false in 'won\|', got 'yes'"):
        decode_result(reply({"text": "x", "won": "yes"}), optional)


@pytest.mark.parametrize(
    ("reward", "done", "won"), [(0.5, True, False), (0.99, True, False), (1.0, True, True), (1, False, False)]
)
def test_a_last_reward_above_a_threshold_wins(reward, done, won):
    mapping = replace(BARE, won_above=0.99)
    assert decode_result(reply({"text": "x"}, reward, done), mapping).info["won"] is won


def test_a_score_is_the_tasks_own():
    mapping = replace(BARE, score_field="score")
    assert decode_result(reply({"text": "x", "score": 0.25}, 1, True), mapping).score == 0.25
    for bad in (10**400, "much", None):
        told = reply({"text": "x", "info": {"score": bad}})
        assert decode_result(told, replace(BARE, info_field="info")).score == 0.0
    open_ = decode_result(reply({"text": "x", "score": None}), mapping)
    assert "score" not in open_.info and open_.score == 0.0
    for bad in ("1", float("nan")):
        with pytest.raises(EnvError, match="expected a finite score in 'score'"):
            decode_result(reply({"text": "x", "score": bad}), mapping)


def test_an_error_among_invalid_codes_is_an_invalid_action():
    refused = encode_error("VALIDATION_ERROR", "Invalid message", errors=[{"loc": ["move", 0], "msg": "not a move"}])
    mapping = FieldMapping(invalid_codes=("VALIDATION_ERROR",))
    assert decode_step(refused, mapping) == StepResult(
        "Invalid message; move.0: not a move", info={"won": False, "valid_action": False}
    )
    with pytest.raises(RefusedError):  # a reset is not an action of the policy
        decode_result(refused, mapping)
    for answer, its in ((refused, FieldMapping()), (encode_error("EXECUTION_ERROR", "broke"), mapping)):
        with pytest.raises(RefusedError):
            decode_step(answer, its)


def test_an_error_without_details_is_only_its_message():
    for errors in (None, 7, [], ["x"], [{}], [{"loc": 7}], [{"loc": None}], [{"loc": {}}]):
        with pytest.raises(RefusedError) as error:
            decode_result(encode_error("SESSION_ERROR", "no", errors=errors), FieldMapping())
        assert error.value.message.startswith("no")
