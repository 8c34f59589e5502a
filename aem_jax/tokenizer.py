"""Conversion between text and ids, and chat turns as id *deltas*. Only this module imports transformers and tokenizers,
and imports them lazily, because their import is slow.

A conversation grows at its end: prompt, response, delta, response, delta, … Sampled ids are never changed, and only
observations are tokenised. The markup between two responses is derived from the chat template: conversations are
rendered with and without one more turn, and compared. This works for every model family whose template keeps earlier
turns unchanged. Any other template is refused, with the reason: the policy would be trained on a conversation that
differs from the sampled one. If every prompt is built from scratch (context `window`), any template is accepted.
"""

import datetime
import functools
import json
import os
import re
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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

WORDS = r"(?:system|user|assistant)\n| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Units that byte-pair merges do not cross: a word, a number or punctuation, each with the space before it. An object
name then has the same tokens at every position (` drawer`, ` 1`), so the policy can repeat it by copying. The headers
of turns are units too, because they occur in every turn."""

_END_OF_TEXT, _TURN_START, _TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Two private-use characters fence a control token inside the text of a message, from rendering to encoding.
_FENCES = "\ue0f0\ue0f1"
_FENCED = re.compile(f"{_FENCES[0]}(.*?){_FENCES[1]}", re.DOTALL)
_NO_FENCES = str.maketrans("", "", _FENCES)

_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")

_CACHED_DELTAS = 4096

_TRUSTED = ("system", "assistant")
"""Roles of the user's own instruction and of the policy's responses. Other messages come from the environment."""

_CLOCK, _DAY_FILE = "strftime_now", "chat_template_day.txt"
_DATED = (
    "{% macro strftime_now(format) %}{% set found = namespace(text=format) %}"
    "{% for directive, text in strftime_day.items() %}"
    "{% set found.text = found.text.replace(directive, text) %}{% endfor %}{{ found.text }}{% endmacro +%}"
)
"""Macro that is prepended to a template that uses the date. It replaces transformers' own function, which reads the
clock. Rendering arguments are plain data, so they cannot replace that function."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: the one in --model.path, or one that is trained for the run."""

    chat_template: Literal["own", "chatml"] = "own"
    """With --model.path: the model's own chat template, or plain ChatML. Qwen3's own template drops earlier thoughts,
    so it requires rollout.context window."""
    thinking: bool = True
    """Value of enable_thinking for the chat template. With False, Qwen3 responds without a thought."""
    vocab_size: int = 1024
    """Maximum size of a trained vocabulary: bytes, control tokens, and merges learned from the environment's text."""
    whole_words: tuple[str, ...] = ("<action>", "</action>")
    """Strings that are always one token each in a trained tokenizer."""
    episodes: int = 200
    """Number of expert episodes whose text the tokenizer is trained on."""


@dataclass(frozen=True)
class TurnMarkup:
    """The markup that a chat template writes between two responses.

    Attributes:
        before: text between a response and the next observation; begins with the stop token.
        after: text between the observation and the next response.
        stop: text of the token that closes a response.
        strips: whether the template strips white space from the ends of observations.
    """

    before: str
    after: str
    stop: str
    strips: bool


class ChatTokenizer:
    """A Hugging Face tokenizer that also encodes the chat turns of its template.

    Control tokens in a message or an observation are plain text, not markup. They are encoded character by character,
    so that an environment cannot forge a response of the policy. The tokenizer's special tokens are control tokens
    everywhere. Other added tokens that the chat template writes (`<|User|>`, `<think>`) are control tokens in messages
    of the environment, and stay tokens in responses and in the system message.

    A template may write the date (`strftime_now`, as in Llama 3.2). The date is the day on which the tokenizer was
    first loaded. `save_pretrained` saves it, so that a run's prompts do not change at midnight.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        appends: bool = True,
        thinking: bool = True,
        day: datetime.date | None = None,
    ) -> None:
        """Wraps a fast tokenizer that has a chat template.

        Args:
            tokenizer: a tokenizer of transformers, backed by the tokenizers library.
            appends: whether conversations grow by `delta_ids`. If not, the template may change earlier turns.
            thinking: value of `enable_thinking` for the template. With False, Qwen3's template adds an empty thought.
            day: the date for a template that writes one; None: today.

        Raises:
            ValueError: the tokenizer is slow or has no chat template, or the template cannot render a conversation,
                never closes a response with a control token, or, with `appends`, changes earlier turns.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"expected a fast tokenizer, got {type(tokenizer).__name__}; its files need a tokenizer.json"
            )
        if not tokenizer.chat_template:
            raise ValueError("expected a tokenizer with a chat template, got none; pass chat_template=CHATML")
        self._tokenizer, self._thinking = tokenizer, thinking
        self._day = day or datetime.date.today()
        self._template = tokenizer.get_chat_template()
        if not isinstance(self._template, str):
            raise ValueError(f"expected a chat template as a text, got {self._template!r:.80}")
        self._dated: dict[str, dict[str, str]] = {}
        if _CLOCK in self._template:
            self._template, self._dated = _DATED + self._template, {"strftime_day": _directives(self._day)}
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()  # type: ignore[attr-defined]
        control = sorted((token.content for token in added if token.special), key=len, reverse=True)
        written = self._written()
        markup = [token.content for token in added if not token.special and token.content in written]
        self._control, self._markup_tokens = _any_of(control), _any_of([*control, *markup])
        self._backend, self._plain = _backends(tokenizer, {*control, *markup})
        self._stop_id = self._encode_fenced(_stop_token(self._render, control))[0]
        self._open_delta = functools.lru_cache(_CACHED_DELTAS)(self._encode_delta)
        self.markup = _turn_markup(self._render, control) if appends else None
        if appends:
            self._check_ids()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, chat_template: str | None = None, appends: bool = True, thinking: bool = True
    ) -> "ChatTokenizer":
        """Loads a tokenizer from Hugging Face's files.

        Args:
            path: folder, or a name on the Hub.
            chat_template: Jinja text to use instead of the tokenizer's own, e.g. `CHATML` for Qwen3.
            appends: see the constructor.
            thinking: see the constructor.

        Raises:
            ValueError: no tokenizer is found, or the constructor refuses it.
        """
        _quiet()
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path))
        except Exception as error:  # damaged files: tokenizers raises plain Exception, transformers many types
            reason = _first_line(error)
            raise ValueError(f"expected a tokenizer in Hugging Face's files, got {str(path)!r}: {reason}") from error
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        return cls(tokenizer, appends=appends, thinking=thinking, day=_saved_day(Path(path)))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int = 1024,
        pattern: str = WORDS,
        whole_words: Sequence[str] = ("<action>", "</action>"),
    ) -> "ChatTokenizer":
        """Trains a small byte-level BPE on an environment's text, with Qwen's control tokens and template.

        Any text can be encoded, because the vocabulary contains all bytes. The same texts give the same tokenizer.

        Args:
            texts: observations of the environment and responses of its experts.
            vocab_size: upper bound; includes 256 bytes, 3 control tokens and `whole_words`. Few texts give fewer.
            pattern: regular expression of the units that merges do not cross.
            whole_words: strings that are always one token each.

        Raises:
            ValueError: vocab_size leaves no room for the bytes, or `texts` is one string.
        """
        if isinstance(texts, str):
            raise ValueError("expected an iterable of texts, got one string; pass [text]")
        if vocab_size < 259 + len(whole_words):
            raise ValueError(
                f"expected vocab_size >= {259 + len(whole_words)} (bytes and control tokens), got {vocab_size}"
            )
        _quiet()
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(whole_words),  # type: ignore[call-arg]
            min_frequency=2,
            special_tokens=[_END_OF_TEXT, _TURN_START, _TURN_END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        # Whole words are removed first. Otherwise their letters would produce merges that no text uses.
        longest_first = sorted(whole_words, key=len, reverse=True)
        cut = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        turns = (("user\n", *cut.split(valid_text(text)), "assistant\n", "system\n") for text in texts)
        backend.train_from_iterator((piece for turn in turns for piece in turn), trainer)
        backend.add_tokens([AddedToken(word, special=False, normalized=False) for word in whole_words])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token=_TURN_END,
            pad_token=_END_OF_TEXT,
            additional_special_tokens=[_TURN_START],
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = CHATML
        return cls(tokenizer)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the chat template, as `AutoTokenizer` reads them.

        If the template writes the date, this tokenizer's day is saved in another file of the folder.
        """
        self._tokenizer.save_pretrained(str(folder))
        if self._dated:
            write_text(Path(folder) / _DAY_FILE, f"{self._day.isoformat()}\n")

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id. An embedding needs at least this many rows."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The id with which the template closes a response. No other end-of-text id closes a turn."""
        return (self._stop_id,)

    @property
    def pad_id(self) -> int:
        """The id for padding: the pad token, or the stop id if the tokenizer has no pad token."""
        pad = self._tokenizer.pad_token_id
        return self._stop_id if pad is None else int(pad)  # type: ignore[arg-type]

    def encode(self, text: str) -> list[int]:
        """Encodes plain text. Nothing is added, and special tokens in it are plain text. Not for sampled text."""
        return self._encode_fenced(self._fence(text, trusted=True))

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to text, without control tokens."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Encodes a conversation up to the start of the next response.

        Args:
            messages: messages with `role` and `content`, as the template expects them.

        Raises:
            ValueError: there are no messages, or the template refuses them.
        """
        if not messages:
            raise ValueError("expected at least one message, got none")
        fenced = [
            {"role": m["role"], "content": self._fence(m["content"], trusted=m["role"] in _TRUSTED)} for m in messages
        ]
        return self._encode_fenced(self._render(fenced))

    def delta_ids(self, observation: str, *, closed: bool = True) -> list[int]:
        """Returns the ids between two responses: the observation as a turn, with the markup around it.

        Args:
            observation: the environment's text after the first response.
            closed: whether the response ended with the stop id. If it was truncated, the delta first closes it.

        Raises:
            ValueError: the tokenizer was made for conversations that do not grow (`appends=False`).
        """
        delta = self._open_delta(observation).tolist()
        return delta[1:] if closed else delta

    def _encode_delta(self, observation: str) -> "array[int]":
        """Encodes the delta, which begins with the stop id. An array takes 4 bytes per id, so many can be cached."""
        if self.markup is None:
            raise ValueError("expected a tokenizer made with appends=True, got one for prompts that are built anew")
        text = observation.strip() if self.markup.strips else observation
        fenced = self._fence(text, trusted=False)
        return array("i", self._encode_fenced(self.markup.before + fenced + self.markup.after))

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        conversation = [dict(message) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                conversation,
                chat_template=self._template,
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
                f"{'' if refused else f'{type(error).__name__}: '}{_first_line(error)}"
            ) from error
        return valid_text(str(text))

    def _written(self) -> str:
        """Returns the template's text and a rendered conversation, which also contains markup composed from parts.

        Raises:
            ValueError: the template draws random values, or fails.
        """
        if drawn := _RANDOM.search(self._template):
            raise ValueError(
                f"expected a chat template that always writes the same, got one with {drawn[0]!r}; mend it"
            )
        return self._template + _conversation(self._render, "(task)", "(answer)", "(seen)")

    def _fence(self, text: str, trusted: bool) -> str:
        """Fences control tokens in the text of a message, and removes fences that it already contains.

        Args:
            text: text of a message.
            trusted: whether the text may contain added tokens of the template that are not special, as a response may.
        """
        # Existing fences are removed first, because the pieces around one may form a token.
        text = valid_text(text).translate(_NO_FENCES)
        return (self._control if trusted else self._markup_tokens).sub(
            lambda m: f"{_FENCES[0]}{m[0]}{_FENCES[1]}", text
        )

    def _encode_fenced(self, text: str) -> list[int]:
        pieces = _FENCED.split(text)  # text, control token, text, …
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if piece:
                encoder = self._plain if index % 2 else self._backend
                ids += encoder.encode(piece, add_special_tokens=False).ids
        return ids

    def _check_ids(self) -> None:
        """Verifies that ids built turn by turn equal the ids of the whole conversation, not only its text."""
        answer, observations = "look around", ("A room.", "You see nothing.", "Bye.")
        messages = [{"role": "user", "content": observations[0]}]
        ids = self.prompt_ids(messages)
        for observation in observations[1:]:
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": observation}]
            ids += self.encode(answer) + self.delta_ids(observation, closed=False)
        whole = self.prompt_ids(messages)
        if ids != whole or self.delta_ids("A room.", closed=False)[0] != self._stop_id:
            ours, theirs = (self._backend.decode(i, skip_special_tokens=False) for i in (ids, whole))
            raise ValueError(
                f"expected ids built turn by turn to be those of the whole conversation, got {ids} ({ours!r}) for "
                f"{whole} ({theirs!r}); the template needs a control token or a line break on each side of a response"
            )


def _quiet() -> None:
    """Silences two warnings: PyTorch is missing (which is intended), and threads do not survive a fork."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _backends(tokenizer: "PreTrainedTokenizerBase", markup: Collection[str]):
    """Returns (the tokenizer's backend, a copy that reads added tokens as plain text), without truncation or padding.

    Markup is matched before normalization, so that a normalizer cannot produce it from other characters.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    for token in state["added_tokens"]:
        token["normalized"] = token["normalized"] and token["content"] not in markup
    state["truncation"] = state["padding"] = None
    engine = Tokenizer.from_str(json.dumps(state))
    # A post-processor may refer to added tokens. This module's encoding does not use it.
    plain = Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))
    return engine, plain


def _directives(day: datetime.date) -> dict[str, str]:
    """Maps each directive of strftime to its text at midnight of a day."""
    midnight = datetime.datetime.combine(day, datetime.time())
    return {f"%{each}": midnight.strftime(f"%{each}") for each in (*"aAbBcdeDFGHIjmMpSTuUVwWxXyYZ", "-d", "-m", "%")}


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that matches any of the tokens, longest first. Without tokens it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _saved_day(folder: Path) -> datetime.date | None:
    """Returns the day that `save_pretrained` saved; None if it saved none.

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


def _conversation(render, *contents: str) -> str:
    """Renders a conversation in which user and assistant alternate."""
    return render([{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)])


def _stop_token(render, control: Sequence[str]) -> str:
    """Returns the control token with which a template closes a response.

    Raises:
        ValueError: the template closes a response without a control token.
    """
    after = _conversation(render, "(task)", "(answer)", "(seen)").partition("(answer)")[2]
    stop = next((token for token in control if after.startswith(token)), None)
    if stop is None:
        raise ValueError(
            f"expected a chat template that closes a response with a control token and then gives the observation, got "
            f"{after!r} after a response; control tokens are {list(control)}"
        )
    return stop


def _turn_markup(render, control: Sequence[str]) -> TurnMarkup:
    """Derives the markup between two responses from the template.

    Args:
        render: messages -> text, generation prompt included.
        control: texts of the control tokens, longest first.

    Raises:
        ValueError: another turn changes earlier text.
    """
    conversation = functools.partial(_conversation, render)

    def check(said: str, whole: str, what: str) -> str:
        """Returns the text that `whole` adds to `said`."""
        if whole.startswith(said):
            return whole[len(said) :]
        at = next((i for i, (a, b) in enumerate(zip(said, whole)) if a != b), min(len(said), len(whole)))
        shown = slice(max(at - 8, 0), at + 32)
        raise ValueError(
            f"expected a chat template that keeps {what} when a turn is added, got {whole[shown]!r} where "
            f"{said[shown]!r} stood; pass a chat_template that is stable, e.g. CHATML for the Qwen family, or build "
            "every prompt anew (the window context)"
        )

    first = conversation("(task)")
    added = check(first + "(answer)", conversation("(task)", "(answer)", "(seen)"), "the prompt and the response")
    before, found, after = added.partition("(seen)")
    stop = next((token for token in control if before.startswith(token)), None)
    if not found or stop is None:
        raise ValueError(
            f"expected a chat template that closes a response with a control token and then gives the observation, got "
            f"{added!r} after a response; control tokens are {list(control)}"
        )
    thought = "<think>\nHm.\n</think>\n\n<action>look</action>"
    said = first + thought + before + "(seen)" + after + "(answer)" + before
    check(said, conversation("(task)", thought, "(seen)", "(answer)", "(more)"), "thoughts in earlier responses")
    padded = conversation("(task)", "(answer)", " \n(seen) \n")
    expected = {text: first + "(answer)" + before + text + after for text in (" \n(seen) \n", "(seen)")}
    if padded not in expected.values():
        raise ValueError(
            f"expected a chat template that gives observations as they are, got {padded!r} for ' \\n(seen) \\n'"
        )
    return TurnMarkup(before=before, after=after, stop=stop, strips=padded == expected["(seen)"])
