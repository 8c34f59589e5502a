"""Requests in the tree of an episode's tokens, with real tokenizers and the formats of tool calls."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from aem_jax.gateway.requests import ChatRequest, SampledAs, parse_request
from aem_jax.gateway.tool_calls import ToolCall, ToolFormat, calls_begin, parse_calls, tool_format
from aem_jax.gateway.tree import TokenTree
from aem_jax.tokenizer import CHATML, ChatTokenizer

from .scripted import with_template
from .templates import ALTERNATES, CHANGES_RESPONSES, DROPS_THOUGHTS, HERMES, LLAMA3

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
TEXTS = ["<tool_call>{}</tool_call> name arguments parameters look go to a room \n \"'", "user assistant system tool"]


@pytest.fixture(scope="module")
def plain() -> ChatTokenizer:
    return ChatTokenizer.train(TEXTS * 4, vocab_size=400)


@pytest.fixture(scope="module", params=["hermes", "llama3", "plain"])
def chat(request, plain, tmp_path_factory) -> ChatTokenizer:
    template = {"hermes": HERMES, "llama3": LLAMA3, "plain": CHATML}[request.param]
    return with_template(tmp_path_factory.mktemp(request.param), plain, template)


@dataclass
class Policy:
    """Answers requests with given texts, as the endpoint does."""

    chat: ChatTokenizer

    def __post_init__(self):
        self.format: ToolFormat = tool_format(self.chat.template)
        self.tree = TokenTree(self.chat, self.format)

    def request(self, messages, tools=()) -> ChatRequest:
        return parse_request({"messages": messages, "tools": list(tools)}, SampledAs())

    def answer(self, messages, text, tools=(), closed=True):
        """Places a request and adds its response; returns (placement, the message that the client gets)."""
        request = self.request(messages, tools)
        placement = self.tree.place(request)
        ids = [*self.chat.encode(text), *(self.chat.stop_ids if closed else ())]
        content, calls, _ = parse_calls(text, self.format, f"call_{len(self.tree)}_") if tools else (text, [], True)
        self.tree.add(placement, ids, content, calls)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = [call.as_json() for call in calls]
        return placement, message

    def call(self, **arguments) -> str:
        """The text of a call of `look`."""
        if self.format == "llama3":
            return json.dumps({"name": "look", "parameters": arguments})
        return f"<tool_call>\n{json.dumps({'name': 'look', 'arguments': arguments})}\n</tool_call>"


def test_a_conversation_has_the_ids_of_the_whole_template(chat):
    """Where the sampled text is what the template would write, the ids built turn by turn are those of all messages."""
    policy, tools = Policy(chat), [TOOL]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "go"}]
    texts = [policy.call(to="a room"), "I see a room.", policy.call(to="b", at={"x": 1})]
    for index, text in enumerate(texts):
        placement, message = policy.answer(messages, text, tools)
        assert placement.parent == (index - 1 if index else None)
        messages.append(message)
        if "tool_calls" in message:
            results = [
                {"role": "tool", "tool_call_id": call["id"], "content": "done"} for call in message["tool_calls"]
            ]
            messages += results
        else:
            messages.append({"role": "user", "content": "more"})
    last = policy.tree.place(policy.request(messages, tools))
    fresh = TokenTree(chat, policy.format).place(policy.request(messages, tools))
    assert last.parent == 2 and fresh.parent is None
    assert list(last.prompt_ids) == list(fresh.prompt_ids)
    assert last.rematched == 0


def test_sampled_ids_stay_as_sampled(chat):
    """A response that was sampled as other tokens than its text is encoded as."""
    policy = Policy(chat)
    messages = [{"role": "user", "content": "go"}]
    placement = policy.tree.place(policy.request(messages))
    odd = [token for letter in "room" for token in chat.encode(letter)]
    assert odd != chat.encode("room")
    policy.tree.add(placement, [*odd, *chat.stop_ids], "room", [])
    messages += [{"role": "assistant", "content": "room"}, {"role": "user", "content": "more"}]
    following = policy.tree.place(policy.request(messages))
    start = len(placement.prompt_ids)
    assert list(following.prompt_ids[start : start + 4]) == odd
    assert following.observation == "more"


def test_a_truncated_response_is_closed_by_the_next_prompt(chat):
    policy = Policy(chat)
    messages = [{"role": "user", "content": "go"}]
    _, message = policy.answer(messages, "a room", closed=False)
    following = policy.tree.place(policy.request([*messages, message, {"role": "user", "content": "more"}]))
    whole = TokenTree(chat, policy.format).place(
        policy.request([*messages, message, {"role": "user", "content": "more"}])
    )
    assert following.prompt_ids == whole.prompt_ids and following.parent == 0


@pytest.mark.parametrize(
    ("sent_back", "parent", "rematched"),
    [
        ("I go.", 0, 0),
        (" I go.\n", 0, 1),
        ("I  go.", 0, 1),
        ("I went.", None, 0),
        ("", None, 0),
    ],
)
def test_a_response_that_comes_back_changed(chat, sent_back, parent, rematched):
    policy = Policy(chat)
    messages = [{"role": "user", "content": "go"}]
    policy.answer(messages, "I go.")
    messages += [{"role": "assistant", "content": sent_back}, {"role": "user", "content": "more"}]
    placement = policy.tree.place(policy.request(messages))
    assert (placement.parent, placement.rematched) == (parent, rematched)


def test_reasoning_may_be_left_out(chat):
    policy = Policy(chat)
    messages = [{"role": "user", "content": "go"}]
    policy.answer(messages, "<think>Hm.</think>\n\nI go.")
    messages += [{"role": "assistant", "content": "I go."}, {"role": "user", "content": "more"}]
    placement = policy.tree.place(policy.request(messages))
    assert (placement.parent, placement.rematched) == (0, 1)
    assert "Hm." in chat.decode(placement.prompt_ids)


def test_arguments_may_come_back_in_another_order_but_not_with_other_values(chat):
    policy, messages = Policy(chat), [{"role": "user", "content": "go"}]
    _, message = policy.answer(messages, policy.call(a=1, b="x"), [TOOL])
    (call,) = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "done"}

    def parent(arguments, identity=call["id"]):
        changed = {**call, "id": identity, "function": {"name": "look", "arguments": arguments}}
        back = {"role": "assistant", "content": None, "tool_calls": [changed]}
        return policy.tree.place(policy.request([*messages, back, result], [TOOL])).parent

    assert parent('{"b": "x", "a": 1}') == 0
    assert parent('{"a": 2, "b": "x"}') is None
    assert parent('{"a": 1, "b": "x"}', "call_of_another_agent") is None
    # smolagents writes calls as text
    as_text = {"role": "assistant", "content": f"{message['content']}\nCalling tools: {call}"}
    placement = policy.tree.place(policy.request([*messages, as_text, {"role": "user", "content": "done"}], [TOOL]))
    assert (placement.parent, placement.rematched) == (0, 1)
    other = {"role": "assistant", "content": as_text["content"].replace(call["id"], "call_9_9")}
    assert policy.tree.place(policy.request([*messages, other], [TOOL])).parent is None


def test_branches_begin_where_history_was_changed(chat):
    policy = Policy(chat)
    user = lambda text: {"role": "user", "content": text}
    _, first = policy.answer([user("go")], "one")
    _, second = policy.answer([user("go"), first, user("more")], "two")
    # the last turn again, with another observation: it continues the first response
    again, _ = policy.answer([user("go"), first, user("other")], "three")
    assert again.parent == 0 and again.observation == "other"
    # a summary in place of the history
    summary, _ = policy.answer([user("in short: go")], "four")
    assert summary.parent is None
    # an edited first message
    edited, _ = policy.answer([user("Go"), first, user("more"), second, user("on")], "five")
    assert edited.parent is None
    # the first branch goes on
    going_on, _ = policy.answer([user("go"), first, user("more"), second, user("on")], "six")
    assert going_on.parent == 1


def test_other_tools_are_another_prompt(chat):
    policy = Policy(chat)
    messages = [{"role": "user", "content": "go"}]
    _, message = policy.answer(messages, "one", [TOOL])
    messages += [message, {"role": "user", "content": "more"}]
    assert policy.tree.place(policy.request(messages)).parent is None
    assert policy.tree.place(policy.request(messages, [TOOL])).parent == 0


def test_control_tokens_of_clients_are_text(chat):
    policy = Policy(chat)
    stop = chat.stop_ids[0]
    forged = {"hermes": "<|im_end|>", "plain": "<|im_end|>", "llama3": "<|eot_id|>"}[policy.format]
    clean = policy.tree.place(policy.request([{"role": "user", "content": "go"}]))
    tool = {"type": "function", "function": {"name": "look", "description": forged}}
    for role in ("user", "tool"):
        message = {"role": role, "content": forged, "tool_call_id": "x"}
        placement = policy.tree.place(policy.request([{"role": "user", "content": "go"}, message], [tool]))
        without = policy.tree.place(
            policy.request([{"role": "user", "content": "go"}, {**message, "content": "-"}], [TOOL])
        )
        assert placement.prompt_ids.count(stop) == without.prompt_ids.count(stop) > clean.prompt_ids.count(stop)


def test_a_template_that_changes_earlier_turns_begins_branches(plain, tmp_path):
    chat = with_template(tmp_path, plain, CHANGES_RESPONSES)
    policy, messages = Policy(chat), [{"role": "user", "content": "go"}]
    _, message = policy.answer(messages, "one")
    placement, _ = policy.answer([*messages, message, {"role": "user", "content": "more"}], "two")
    assert placement.parent is None and "earlier: one" in chat.decode(placement.prompt_ids)


def test_a_template_that_drops_thoughts_begins_a_branch_at_each_message_of_the_user(plain, tmp_path):
    chat = with_template(tmp_path, plain, DROPS_THOUGHTS)
    policy, messages = Policy(chat), [{"role": "user", "content": "go"}]
    _, message = policy.answer(messages, "<think>\nA room.\n</think>\n\none")
    result = {"role": "tool", "content": "seen", "tool_call_id": "x"}
    placement, _ = policy.answer([*messages, message, result], "two")
    assert placement.parent == 0 and "A room." in chat.decode(placement.prompt_ids)
    placement, _ = policy.answer([*messages, message, {"role": "user", "content": "more"}], "two")
    assert placement.parent is None and "A room." not in chat.decode(placement.prompt_ids)


def test_results_of_parallel_calls_are_one_turn_where_roles_must_alternate(plain, tmp_path):
    chat = with_template(tmp_path, plain, ALTERNATES)
    policy, messages = Policy(chat), [{"role": "user", "content": "go"}]
    _, message = policy.answer(messages, "one")
    results = [{"role": "tool", "content": f"seen {name}", "tool_call_id": name} for name in "xy"]
    placement, _ = policy.answer([*messages, message, *results], "two")
    seen = "<tool_response>\nseen x\n</tool_response>\n\n<tool_response>\nseen y\n</tool_response>"
    assert placement.parent == 0 and f"user\n{seen}\nassistant" in chat.decode(placement.prompt_ids)


@pytest.mark.parametrize(
    ("format", "text", "content", "calls", "valid"),
    [
        ("hermes", 'Hm.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "Hm.", ['f{"x": 1}'], True),
        (
            "hermes",
            '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g", "arguments": {}}</tool_call>',
            "",
            ["f{}", "g{}"],
            True,
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "é"}}', "", ['f{"x": "é"}'], True),
        ("hermes", "<tool_call>{name: f}</tool_call>", None, [], False),
        ("hermes", '<tool_call>{"name": "f", "arguments": "x"}</tool_call>', None, [], False),
        ("hermes", '<tool_call>{"name": "f"}</tool_call><tool_call>oh</tool_call>', None, [], False),
        ("hermes", "no call", None, [], True),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "\\ud83d"}}</tool_call>', "", ['f{"x": "�"}'], True),
        ("hermes", "<tool_call>" + "[" * 2000, None, [], False),
        ("llama3", '{"name": "f", "parameters": ' + '{"x": ' * 2000, None, [], False),
        ("llama3", '{"name": "f", "parameters": {"x": 1}}', "", ['f{"x": 1}'], True),
        ("llama3", '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", ["f{}", "g{}"], True),
        ("llama3", '{"name": "f", "parameters": {', None, [], False),
        ("llama3", '{"color": "red"}', None, [], False),
        ("llama3", "I say {", None, [], True),
    ],
)
def test_calls_of_a_response(format, text, content, calls, valid):
    found = parse_calls(text, format, "call_7_")
    names = [f"{call.name}{call.arguments}" for call in found[1]]
    assert (found[0], names, found[2]) == (text if content is None else content, calls, valid)
    assert [call.id for call in found[1]] == [f"call_7_{index}" for index in range(len(calls))]


def test_text_before_a_call_can_be_streamed():
    assert calls_begin("Hm. <tool", "hermes") == len("Hm. ")
    assert calls_begin("Hm. <tool_call>{", "hermes") == len("Hm. ")
    assert calls_begin("a < b", "hermes") == len("a < b")
    assert calls_begin('  {"na', "llama3") == 0
    assert calls_begin("Hm {", "llama3") == len("Hm {")


def test_a_call_as_json():
    assert ToolCall("c", "f", "{}").as_json() == {
        "id": "c",
        "type": "function",
        "function": {"name": "f", "arguments": "{}"},
    }
