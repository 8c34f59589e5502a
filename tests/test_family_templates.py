"""The chat templates of the families in `append`: handled where turns are stable, else refused with the reason.

The templates write what the published ones write for texts without tools, in words of these tests. Sources: the
`chat_template` in tokenizer_config.json of google/gemma-3-1b-it, mistralai/Mistral-7B-Instruct-v0.3,
mistralai/Ministral-8B-Instruct-2410, allenai/OLMo-2-1124-7B-Instruct; chat_template.jinja of HuggingFaceTB/SmolLM3-3B.
"""

import datetime
from pathlib import Path

import pytest
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.context import windowed_messages
from aem_jax.tokenizer import ChatTokenizer

# Without a system role: that message becomes the beginning of the first user turn. All contents are stripped.
GEMMA3 = (
    "{{ bos_token }}"
    "{%- set prefix = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' -%}"
    "{%- for message in (messages[1:] if prefix else messages) -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
# The system message goes to the last user turn. A response begins with a space, which no prompt ends with.
MISTRAL_V03 = (
    "{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
    "{{- bos_token }}"
    "{%- for message in (messages if system is none else messages[1:]) %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system is not none %}{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}"
    "{%- endfor %}"
)
MINISTRAL = MISTRAL_V03.replace("'[INST] '", "'[INST]'").replace(
    "' ' + message['content'] | trim", "message['content']"
)
OLMO2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + eos_token }}"
    "{{ '' if loop.last else '\n' }}"
    "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
# The date and the mode stand in the system turn; without thinking, every response begins with an empty thought.
SMOLLM3 = (
    "{%- set mode = '/think' if enable_thinking | default(true) else '/no_think' -%}"
    "{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}"
    "{%- set mode = '/no_think' if '/no_think' in system else mode -%}"
    "{%- set thought = '' if mode == '/think' else '<think>\n\n</think>\n' -%}"
    "{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\nReasoning Mode: ' ~ mode -}}"
    "{{- '\n\n## Custom Instructions\n\n' ~ (system.replace('/no_think', '').rstrip() or 'You are SmolLM.') -}}"
    "{{- '\n\n<|im_end|>\n' -}}"
    "{%- for message in messages if message['role'] != 'system' -%}"
    "{%- if message['role'] == 'user' -%}{{ '<|im_start|>user\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- else -%}{% generation %}{{ '<|im_start|>assistant\n' + thought + message['content'].lstrip('\n') }}"
    "{{- '<|im_end|>\n' }}{% endgeneration %}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' + thought }}{%- endif -%}"
)
# Gemma 2 refuses a system message.
GEMMA2 = GEMMA3.replace(
    "{%- set prefix",
    "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}"
    "{%- endif -%}{%- set prefix",
)

CONTROL = {
    GEMMA3: ("<bos>", "<end_of_turn>", ("<start_of_turn>",)),
    GEMMA2: ("<bos>", "<end_of_turn>", ("<start_of_turn>",)),
    MISTRAL_V03: ("<s>", "</s>", ("[INST]", "[/INST]")),
    MINISTRAL: ("<s>", "</s>", ("[INST]", "[/INST]")),
    OLMO2: ("<|endoftext|>", "<|endoftext|>", ()),
    SMOLLM3: ("<|begin_of_text|>", "<|im_end|>", ("<|im_start|>",)),
}
"""Template -> the model's first token, its last one, and further control tokens of its markup."""

NAMES = {"gemma 3": GEMMA3, "mistral": MISTRAL_V03, "ministral": MINISTRAL, "olmo 2": OLMO2, "smollm3": SMOLLM3}
KEEP_SYSTEM = ("gemma 3", "olmo 2", "smollm3")
INSTRUCTION = "You play a game."
DAY = datetime.date(2025, 7, 8)
TURNS = (("<action>go to drawer 1</action>", "The drawer 1 is closed."), ("Hm. open it", "A pen."), ("look", "Bye."))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes and a few merges, with ChatML's control tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [INSTRUCTION, *(text for turn in TURNS for text in turn)] * 8
    ChatTokenizer.train(texts, vocab_size=400, whole_words=()).save_pretrained(folder)
    return folder


def of_family(base: Path, template: str, **settings) -> ChatTokenizer:
    """The family's tokenizer: its control tokens, and its template."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(str(base))
    first, last, others = CONTROL[template]
    tokenizer.add_special_tokens({"bos_token": first, "eos_token": last})
    markup: list[str | AddedToken] = [AddedToken(token, special=True, normalized=False) for token in others]
    tokenizer.add_tokens(markup, special_tokens=True)
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer, day=DAY, **settings)


def rendered(chat: ChatTokenizer, messages: list[dict[str, str]]) -> str:
    """The independent reference: the template of the whole conversation."""
    return chat._template.render(messages)


def conversation(turns: int, instruction: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": instruction}] if instruction else []
    messages.append({"role": "user", "content": "Find a pen."})
    for response, observation in TURNS[:turns]:
        messages += [{"role": "assistant", "content": response}, {"role": "user", "content": observation}]
    return messages


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    ("name", "instruction"), [*((name, "") for name in NAMES), *((name, INSTRUCTION) for name in KEEP_SYSTEM)]
)
def test_turns_of_a_stable_template_are_appended(base, name, instruction, thinking):
    chat = of_family(base, NAMES[name], instruction=instruction, thinking=thinking)
    ids = chat.prompt_ids(conversation(0, instruction))
    for count, (response, observation) in enumerate(TURNS, start=1):
        ids += chat.response_ids(response) + chat.delta_ids(observation)
        whole = conversation(count, instruction)
        assert ids == chat.prompt_ids(whole)
        assert chat._backend.decode(ids, skip_special_tokens=False) == rendered(chat, whole)
    if instruction and name == "gemma 3":  # it has no system role
        assert rendered(chat, whole).startswith(f"<bos><start_of_turn>user\n{INSTRUCTION}\n\nFind a pen.<end_of_turn>")


@pytest.mark.parametrize("name", ["mistral", "ministral"])
def test_a_template_that_moves_the_system_message_along_is_refused_with_the_reason(base, name):
    reason = (
        r"keeps the prompt and the response when a turn is added, got .*\(task.* where .*You play a.* stood; .*"
        r"without the system message \(rollout.instruction\) this template is stable"
    )
    with pytest.raises(ValueError, match=reason):
        of_family(base, NAMES[name], instruction=INSTRUCTION)
    chat = of_family(base, NAMES[name], instruction=INSTRUCTION, appends=False)  # each prompt is built anew
    for count in range(3):
        ids = chat.prompt_ids(conversation(count, INSTRUCTION))
        text = chat._backend.decode(ids, skip_special_tokens=False)
        assert text == rendered(chat, conversation(count, INSTRUCTION)) and text.count(INSTRUCTION) == 1
        assert text.rpartition("[INST]")[2].strip().startswith(INSTRUCTION)


def test_a_template_without_a_system_message_refuses_it_at_load(base):
    of_family(base, GEMMA2)
    with pytest.raises(ValueError, match=r"can render, got \['system', 'user'\]: System role not supported; without"):
        of_family(base, GEMMA2, instruction=INSTRUCTION)


@pytest.mark.parametrize("window_turns", [0, 1])
def test_observations_in_a_row_are_joined_for_a_template_that_refuses_them(base, window_turns):
    """A window that slides shows the first observation, and then the oldest one that is kept."""
    config = RolloutConfig(context="window", window_turns=window_turns, instruction=INSTRUCTION)
    turns = [("Find a pen.", "go"), ("A drawer.", "open")]
    joined = [
        [{"role": "user", "content": "Find a pen.\n\nA pen."}],
        [
            {"role": "user", "content": "Find a pen.\n\nA drawer."},
            {"role": "assistant", "content": "open"},
            {"role": "user", "content": "A pen."},
        ],
    ][window_turns]
    joined = [{"role": "system", "content": INSTRUCTION}, *joined]
    messages = windowed_messages(turns, "A pen.", config)
    assert len(messages) == len(joined) + 1
    alternating, any_order = (of_family(base, template, appends=False) for template in (GEMMA3, OLMO2))
    assert alternating.prompt_ids(messages) == alternating.prompt_ids(joined)
    whole = any_order._backend.decode(any_order.prompt_ids(messages), skip_special_tokens=False)
    assert whole == rendered(any_order, messages) != rendered(any_order, joined)


def test_white_space_before_a_response_is_the_policys(base):
    """Mistral's prompts end with [/INST], and its responses begin with a space."""
    chat = of_family(base, MISTRAL_V03)
    assert chat.markup and (chat.markup.lead, chat.markup.after) == (" ", "[/INST]")
    assert chat.response_ids("look") == [*chat.encode(" look"), *chat.stop_ids]
    continuation = chat.continuation_ids(conversation(1, ""), 1, (), closed=True)
    assert continuation == chat.delta_ids(TURNS[0][1])
    others = [of_family(base, NAMES[name]) for name in NAMES if name != "mistral"]
    assert all(other.markup and other.markup.lead == "" for other in others)
    assert others[0].response_ids("look") == [*others[0].encode("look"), *others[0].stop_ids]


def test_the_instruction_is_checked_as_it_is(base):
    """SmolLM3's template reads the mode from the system message."""
    silent = of_family(base, SMOLLM3, instruction="Play. /no_think")
    assert silent.markup and silent.markup.after.endswith("<|im_start|>assistant\n<think>\n\n</think>\n")
    chat = of_family(base, SMOLLM3, instruction="Play.")
    assert chat.markup and chat.markup.after.endswith("<|im_start|>assistant\n")
