"""A chat template: conversations as text, and the markup that it writes between two responses.

The markup is derived from renderings: conversations are rendered with and without one more turn, and compared. This
works for every model family whose template keeps earlier turns unchanged. Any other template is refused, with the
reason: the policy would be trained on a conversation that differs from the sampled one.
"""

import datetime
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_jax.files import read_text, valid_text, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Chat template of the tokenizers trained here. It also replaces Qwen3's own template, which drops earlier thoughts."""

_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")
_CLOCK, _DAY_FILE = "strftime_now", "chat_template_day.txt"
_DATED = (
    "{% macro strftime_now(format) %}{% set date = namespace(text=format) %}"
    "{% for directive, text in strftime_day.items() %}"
    "{% set date.text = date.text.replace(directive, text) %}{% endfor %}{{ date.text }}{% endmacro +%}"
)
"""Macro that is prepended to a template that uses the date. It replaces transformers' own function, which reads the
clock. Rendering arguments are plain data, so they cannot replace that function."""
_DIRECTIVES = tuple(f"%{letter}" for letter in (*"aAbBcdeDFGHIjmMpSTuUVwWxXyYZ", "-d", "-m", "%"))


@dataclass(frozen=True)
class TurnMarkup:
    """The markup that a chat template writes between two responses.

    Attributes:
        lead: white space that begins a response, and that the policy samples: Mistral's template writes a space there.
        before: text between a response and the next observation; begins with the stop token.
        after: text between the observation and the next response.
        strips: whether the template strips white space from the ends of observations.
    """

    lead: str
    before: str
    after: str
    strips: bool


class ChatTemplate:
    """The chat template of a tokenizer, with fixed settings and a fixed date."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, thinking: bool, day: datetime.date | None) -> None:
        """Reads the template of a tokenizer.

        Args:
            tokenizer: a tokenizer of transformers.
            thinking: value of `enable_thinking`.
            day: the date for a template that writes one; None: today.

        Raises:
            ValueError: there is no template, or it draws random values.
        """
        if not tokenizer.chat_template:
            raise ValueError("expected a tokenizer with a chat template, got none; pass chat_template=CHATML")
        text = tokenizer.get_chat_template()
        if not isinstance(text, str):
            raise ValueError(f"expected a chat template as a text, got {text!r:.80}")
        self._tokenizer, self._thinking = tokenizer, thinking
        self._day = day or datetime.date.today()
        self._dated: dict[str, dict[str, str]] = {}
        if _CLOCK in text:
            midnight = datetime.datetime.combine(self._day, datetime.time())
            text = _DATED + text
            self._dated = {"strftime_day": {directive: midnight.strftime(directive) for directive in _DIRECTIVES}}
        self.text: str = text
        if drawn := _RANDOM.search(text):
            raise ValueError(
                f"expected a chat template that always writes the same, got one with {drawn[0]!r}; mend it"
            )

    def save_day(self, folder: Path) -> None:
        """Writes the date to a file of the folder, if the template uses it."""
        if self._dated:
            write_text(folder / _DAY_FILE, f"{self._day.isoformat()}\n")

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Renders messages, and the start of the next response.

        Args:
            messages: as the template expects them.
            tools: definitions of functions, as in OpenAI's API.

        Raises:
            ValueError: the template refuses the messages, or fails.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=self._thinking,
                **self._dated,  # pyright: ignore[reportArgumentType]
            )
        except Exception as error:  # a template is a program, and may raise any exception
            roles, name = [message["role"] for message in messages], self._tokenizer.name_or_path
            refused = type(error).__name__ == "TemplateError"  # the template's own raise_exception
            raise ValueError(
                f"expected messages that the chat template{f' of {name}' if name else ''} can render, got {roles}: "
                f"{'' if refused else f'{type(error).__name__}: '}{first_line(error)}"
            ) from error
        return valid_text(str(text))

    def conversation(self, *contents: str, system: str = "") -> str:
        """Renders a conversation in which user and assistant alternate, after the system message if there is one."""
        first = [{"role": "system", "content": system}] if system else []
        turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        return self.render(first + turns)

    def written(self) -> str:
        """The template's text, and what it writes: it may compose markup from parts (`'<|' + role + '|>'`)."""
        user, system = {"role": "user", "content": "(task)"}, {"role": "system", "content": "(rules)"}
        function = {"name": "look", "description": "(looks)", "parameters": {"type": "object", "properties": {}}}
        call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {}}}
        result = {"role": "tool", "name": "look", "tool_call_id": "call00001", "content": "(seen)"}
        answer = {"role": "assistant", "content": "(answer)"}
        tools = [{"type": "function", "function": function}]
        texts = [self.text, self.conversation("(task)", "(answer)", "(seen)")]
        for messages, definitions in (
            ([system, user], ()),
            ([user], tools),
            ([user, answer, result], ()),
            ([user, {**answer, "content": "", "tool_calls": [call]}, result], tools),
        ):
            try:
                texts.append(self.render(messages, definitions))
            except ValueError:  # a template without system messages or tools
                continue
        return "".join(texts)

    def needs_alternation(self) -> bool:
        """Whether the template refuses two messages of the user in a row, as Gemma's and Mistral's do."""
        try:
            self.render([{"role": "user", "content": "(task)"}, {"role": "user", "content": "(seen)"}])
        except ValueError:
            return True
        return False

    def stop_token(self, control: Sequence[str]) -> str:
        """Returns the control token with which the template closes a response.

        Args:
            control: texts of the control tokens, longest first.

        Raises:
            ValueError: the template closes a response without a control token.
        """
        after = self.conversation("(task)", "(answer)", "(seen)").partition("(answer)")[2]
        return _first_token(after, control)

    def response_lead(self) -> str:
        """The white space that the template writes between a prompt and the response to it."""
        first, turn = self.conversation("(task)"), self.conversation("(task)", "(answer)", "(seen)")
        after = turn.removeprefix(first)
        return after[: len(after) - len(after.lstrip())] if turn.startswith(first) else ""

    def turn_markup(self, control: Sequence[str], instruction: str = "") -> TurnMarkup:
        """Derives the markup between two responses.

        Args:
            control: texts of the control tokens, longest first.
            instruction: the system message of the conversations; empty for none.

        Raises:
            ValueError: another turn changes earlier text.
        """
        if not instruction:
            return self._turn_markup(control, self.conversation)
        try:
            return self._turn_markup(control, functools.partial(self.conversation, system=instruction))
        except ValueError as error:
            try:
                self._turn_markup(control, self.conversation)
            except ValueError:
                raise error from None
            raise ValueError(
                f"{error}; without the system message (rollout.instruction) this template is stable"
            ) from None

    def _turn_markup(self, control: Sequence[str], conversation: Callable[..., str]) -> TurnMarkup:
        first, lead = conversation("(task)"), self.response_lead()
        turn = conversation("(task)", "(answer)", "(seen)")
        added = _suffix(turn, first + lead + "(answer)", "the prompt and the response")
        before, observation, after = added.partition("(seen)")
        _first_token(before if observation else "", control, added)
        thought = "<think>\nHm.\n</think>\n\n<action>look</action>"
        earlier = first + lead + thought + before + "(seen)" + after + lead + "(answer)" + before
        longer = conversation("(task)", thought, "(seen)", "(answer)", "(more)")
        _suffix(longer, earlier, "thoughts in earlier responses")
        padded = conversation("(task)", "(answer)", " \n(seen) \n")
        expected = {text: first + lead + "(answer)" + before + text + after for text in (" \n(seen) \n", "(seen)")}
        if padded not in expected.values():
            raise ValueError(
                f"expected a chat template that gives observations as they are, got {padded!r} for ' \\n(seen) \\n'"
            )
        return TurnMarkup(lead=lead, before=before, after=after, strips=padded == expected["(seen)"])


def saved_day(folder: Path) -> datetime.date | None:
    """Returns the date that `save_day` wrote; None if it wrote none.

    Raises:
        ValueError: the file does not contain a date.
    """
    path = folder / _DAY_FILE
    if not path.is_file():
        return None
    text = read_text(path).strip()
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{path}: expected a date as 2026-01-31, got {text!r:.60}") from None


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _first_token(text: str, control: Sequence[str], shown: str | None = None) -> str:
    """Returns the control token at the start of a text that follows a response."""
    token = next((token for token in control if text.startswith(token)), None)
    if token is None:
        raise ValueError(
            f"expected a chat template that closes a response with a control token and then gives the observation, got "
            f"{text if shown is None else shown!r} after a response; control tokens are {list(control)}"
        )
    return token


def _suffix(text: str, prefix: str, what: str) -> str:
    """Returns what follows `prefix` in a rendered conversation that must begin with it."""
    if text.startswith(prefix):
        return text[len(prefix) :]
    at = next((i for i, (a, b) in enumerate(zip(prefix, text)) if a != b), min(len(prefix), len(text)))
    shown = slice(max(at - 8, 0), at + 32)
    raise ValueError(
        f"expected a chat template that keeps {what} when a turn is added, got {text[shown]!r} where "
        f"{prefix[shown]!r} stood; pass a chat_template that is stable, e.g. CHATML for the Qwen family, or build "
        "every prompt anew (the window context)"
    )
