"""Command lines of the package in pages and scripts, and a check that their options exist."""

import contextlib
import functools
import io
import re
import shlex

from aem_jax.launch.cli import COMMANDS, main

_COMMAND = re.compile(r"python\w* -m aem_jax\.launch\b([^`\n]*)")


def commands(text: str) -> list[list[str]]:
    """The words after `python -m aem_jax.launch` of each command line in a text; comments and redirections left out."""
    words = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for match in _COMMAND.finditer(line):
            tail = re.split(r"\s[#>;&(|]|[;)]$", match[1].replace("…", ""))[0]
            if tail.count("'") % 2 or tail.count('"') % 2:  # the command is itself quoted
                tail = tail.rstrip().rstrip("'\"")
            words.append(shlex.split(tail.strip(".,:")))
    return words


@functools.cache
def _help(command: str, presets: tuple[str, ...]) -> str:
    output = io.StringIO()
    preset = ["--preset", *presets] if presets and command in ("train", "evaluate", "plan") else []
    with contextlib.redirect_stdout(output):
        assert main([command, *preset, "--help", "all"]) == 0, (command, presets)
    return output.getvalue()


def unknown_options(words: list[str]) -> list[str]:
    """The words of a command line that are neither a command nor one of its options."""
    command, options = (words[0], words[1:]) if words and not words[0].startswith("-") else ("train", words)
    if command not in COMMANDS:
        return [command]
    if not any(word.startswith("--") for word in options):
        return []
    presets: list[str] = []
    for number, word in enumerate(options):
        if word == "--preset":
            names = _until_option(options[number + 1 :])
            presets = [name for name in names if not re.fullmatch(r"[A-Z$].*|.*\.toml", name)]
    known = set(re.findall(r"--[a-z][\w.-]*", _help(command, tuple(presets)))) | {"--preset", "--help"}
    return [word for word in options if word.startswith("--") and word.partition("=")[0] not in known]


def _until_option(words: list[str]) -> list[str]:
    first = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first]
