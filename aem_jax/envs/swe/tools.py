"""The agent's tools: a shell, a file editor, a search, and finish. They act only inside the sandbox."""

import posixpath
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from aem_jax.envs.swe.calls import EXAMPLE, Call, CallError, find_call
from aem_jax.envs.swe.sandbox.workspace import TESTBED, Limits, Outcome, Workspace, WorkspaceError


@dataclass(frozen=True)
class Recipe:
    """Words and limits of the tools' outputs, as an agent of the field has them.

    Attributes:
        lines: number of first and of last lines that are shown of a longer output.
        characters: longest output; the middle of a longer one is cut out.
    """

    lines: int
    characters: int


RECIPES: Mapping[str, Recipe | None] = {"own": None, "r2e-gym": Recipe(lines=100, characters=10_000)}
"""The recipes by name. `own` has the limits of the configuration."""

_DESCRIPTION = """\
You can use these tools. Write one call in each response, in exactly this form:

{example}

execute_bash: runs a bash command in {folder}. Files stay, the current folder and variables do not. {network}
  command: the command
file_editor: views and edits text files.
  command: view | create | str_replace | insert | undo_edit
  path: the file, or for view also a folder
  view_range: for view, first and last line, as [10, 40]; optional
  file_text: for create, the new file's text
  old_str, new_str: for str_replace, text that stands in the file exactly once, and what replaces it
  insert_line, new_str: for insert, the line after which new_str is inserted (0: at the top)
search: finds a text in the files of a folder.
  search_term: the text, taken literally
  path: a folder or file; optional, {folder} where not given
finish: ends the work; what the files then contain is graded.
{outputs}"""
_OUTPUTS = """
Of outputs with more than {lines} lines, the first and last {half} are shown; of these at most {characters} characters.
"""


def describe(folder: str = TESTBED, *, network: bool = False, recipe: Recipe | None = None) -> str:
    """Returns the description of the tools for the policy.

    Args:
        folder: the folder that they start in.
        network: whether commands have a network.
        recipe: limits of outputs that it names; None: it names none.
    """
    state, outputs = "There is a network." if network else "No network.", ""
    if recipe:
        outputs = _OUTPUTS.format(lines=2 * recipe.lines, half=recipe.lines, characters=recipe.characters)
    return _DESCRIPTION.format(example=EXAMPLE, folder=folder, network=state, outputs=outputs)


LARGEST_FILE = 2**20
"""Largest file that the editor opens, bytes."""
SNIPPET_LINES = 4
"""Lines shown before and after an edit."""
MAX_LISTED = 200
"""Maximum number of folder entries or search matches shown."""
_RECIPE_BYTES = 2**18
"""Bytes of an output from which a recipe takes lines."""
UNDO_EDITS, UNDO_BYTES = 50, 16 * 2**20
"""Limits on the history of `undo_edit`: number and total size of earlier versions, over all files."""


class ToolResult(NamedTuple):
    """The result of a tool call.

    Attributes:
        text: the observation.
        valid: whether the call was valid.
        finished: whether the agent has finished.
    """

    text: str
    valid: bool = True
    finished: bool = False


class ToolError(Exception):
    """A valid call could not be executed; the message is shown to the policy."""


@dataclass(frozen=True)
class _Parameters:
    """A call's parameters, with errors that name missing ones."""

    call: Call
    folder: str

    def text(self, name: str, default: str | None = None) -> str:
        value = self.call.parameters.get(name, default)
        if value is None:
            given = ", ".join(self.call.parameters) or "none"
            raise CallError(f"expected the parameter {name!r} for {self.call.name}, got {given}")
        return value

    def path(self, name: str, default: str | None = None) -> str:
        """Returns an absolute path inside the sandbox; relative paths start at the tools' folder."""
        path = self.text(name, default).strip()
        if not path or "\0" in path or len(path) > 4096:
            raise CallError(f"expected a path in {name!r}, got {path!r:.100}")
        return posixpath.normpath(posixpath.join(self.folder, path))

    def number(self, name: str) -> int:
        value = self.text(name).strip()
        if not re.fullmatch(r"-?[0-9]{1,9}", value):
            raise CallError(f"expected a line number in {name!r}, got {value!r:.100}")
        return int(value)


class Tools:
    """The tools of one episode.

    Args:
        workspace: the workspace that they act in.
        limits: limits on one command.
        observation_bytes: approximate maximum length of an observation; the middle of longer ones is cut out.
        folder: the folder in which commands run and relative paths start.
        recipe: words and limits of outputs, in place of `observation_bytes`.
    """

    def __init__(
        self,
        workspace: Workspace,
        limits: Limits,
        observation_bytes: int = 16384,
        folder: str = TESTBED,
        recipe: Recipe | None = None,
    ):
        self._workspace, self._folder, self._recipe = workspace, folder, recipe
        observation_bytes = _RECIPE_BYTES if recipe else observation_bytes
        self._limits = replace(limits, output_bytes=observation_bytes)
        self._listing = replace(limits, output_bytes=4096 * MAX_LISTED)  # enough for all names and matches
        self._undo: list[tuple[str, bytes | None]] = []
        self._tools: Mapping[str, Callable[[_Parameters], ToolResult]] = {
            "execute_bash": self._execute_bash,
            "file_editor": self._file_editor,
            "search": self._search,
            "finish": lambda parameters: ToolResult("", finished=True),
        }
        self._edits: Mapping[str, Callable[[_Parameters, str], str]] = {
            "view": self._view,
            "create": self._create,
            "str_replace": self._str_replace,
            "insert": self._insert,
            "undo_edit": self._undo_edit,
        }

    def execute(self, response: str) -> ToolResult:
        """Executes the call in a response."""
        try:
            call = find_call(response)
            if call.name not in self._tools:
                raise CallError(f"expected a tool of {', '.join(self._tools)}, got {call.name!r:.100}")
            result = self._tools[call.name](_Parameters(call, self._folder))
            if self._recipe and call.name in ("file_editor", "search"):
                result = ToolResult(_worded(call.name, _shortened(result.text, self._recipe)))
        except CallError as error:
            return ToolResult(f"ERROR: {_sanitized(str(error))}", valid=False)
        except (ToolError, WorkspaceError) as error:
            return ToolResult(f"ERROR: {_sanitized(str(error))}")
        if call.others:
            note = f"[one call a response: only the last of {call.others + 1} was carried out]\n"
            return result._replace(text=note + result.text)
        return result

    def _execute_bash(self, parameters: _Parameters) -> ToolResult:
        outcome = self._workspace.run(parameters.text("command"), limits=self._limits)
        if not self._recipe:
            return ToolResult(_outcome_text(outcome))
        text = "\n".join(filter(None, (_sanitized(outcome.output).rstrip("\n"), outcome.notice)))
        code = -1 if outcome.exit_code is None else outcome.exit_code
        return ToolResult(f"Exit code: {code}\n{_worded('execute_bash', _shortened(text, self._recipe))}")

    def _search(self, parameters: _Parameters) -> ToolResult:
        term, path = parameters.text("search_term"), parameters.path("path", self._folder)
        if not term.strip() or "\n" in term:
            raise CallError(f"expected one line of text in 'search_term', got {term!r:.100}")
        quoted = f"-e {shlex.quote(term)} -- {shlex.quote(path)}"
        # grep's lines can be as long as a file; `cut` keeps the output readable
        command = f"grep -rnIF --exclude-dir=.git --color=never {quoted} | cut -c1-300 | head -n {MAX_LISTED + 1}"
        outcome = self._workspace.run(f"set -o pipefail; {command}", limits=self._listing)
        if outcome.exit_code not in (0, 141):  # 141: head closed the pipe
            if outcome.exit_code == 1 and not outcome.output:
                return ToolResult(f"no match for {term!r:.100} in {path}")
            raise ToolError(_outcome_text(outcome))
        return ToolResult(self._first(_lines(outcome.output), "[more matches are not shown]"))

    def _file_editor(self, parameters: _Parameters) -> ToolResult:
        command = parameters.text("command").strip()
        if command not in self._edits:
            raise CallError(f"expected a command of {', '.join(self._edits)} for file_editor, got {command!r:.100}")
        return ToolResult(self._edits[command](parameters, parameters.path("path")))

    def _view(self, parameters: _Parameters, path: str) -> str:
        kind, _ = self._kind(path)
        if kind == "directory":
            find = f"find {shlex.quote(path)} -mindepth 1 -maxdepth 2 -not -path '*/.*' -printf '%p%y\\n'"
            outcome = self._workspace.run(f"{find} | sort | head -n {MAX_LISTED + 1}", limits=self._listing)
            entries = [line[:-1] + ("/" if line.endswith("d") else "") for line in _lines(outcome.output)]
            return self._first(entries, "[more entries are not shown]") or "the folder is empty"
        lines = self._read(path).decode(errors="replace").split("\n")
        first, last = 1, len(lines)
        if "view_range" in parameters.call.parameters:
            given = parameters.text("view_range")
            numbers = re.fullmatch(r"\s*\[?\s*(\d{1,9})\s*,\s*(-1|\d{1,9})\s*\]?\s*", given)
            if not numbers:
                raise CallError(f"expected view_range as [first, last], got {given!r:.100}")
            first, last = int(numbers[1]), int(numbers[2])
            last = len(lines) if last == -1 else min(last, len(lines))
            if not 1 <= first <= last:
                raise CallError(f"expected view_range within the lines 1 to {len(lines)}, got {given!r:.100}")
        return self._numbered(lines, first, last)

    def _create(self, parameters: _Parameters, path: str) -> str:
        text = parameters.text("file_text")
        kind, _ = self._kind(path, missing="")
        if kind == "directory":
            raise ToolError(f"expected the path of a file, got the folder {path}")
        before = self._read(path) if kind else None
        self._write(path, text.encode(errors="replace"), before)
        return f"{path} was {'overwritten' if kind else 'created'}"

    def _str_replace(self, parameters: _Parameters, path: str) -> str:
        old = parameters.text("old_str").encode(errors="replace")
        new = parameters.text("new_str", "").encode(errors="replace")
        if not old:
            raise CallError("expected some text in 'old_str', got none")
        data = self._read(path)
        count = data.count(old)
        if count == 0:
            raise ToolError(f"old_str does not stand in {path}; it has to match exactly, white space included")
        at = data.find(old)
        if count > 1:
            places = [data.count(b"\n", 0, match.start()) + 1 for match in re.finditer(re.escape(old), data)]
            raise ToolError(
                f"old_str stands {count} times in {path}, at lines {', '.join(map(str, places[:20]))}; "
                "give more of its surroundings, so that it is unique"
            )
        self._write(path, data[:at] + new + data[at + len(old) :], data)
        line = data.count(b"\n", 0, at) + 1
        return self._edited(path, line, line + new.count(b"\n"))

    def _insert(self, parameters: _Parameters, path: str) -> str:
        line, new = parameters.number("insert_line"), parameters.text("new_str").encode(errors="replace")
        data = self._read(path)
        lines = data.split(b"\n")
        count = len(lines) - (lines[-1] == b"")
        if not 0 <= line <= count:
            raise CallError(f"expected insert_line from 0 to {count}, got {line}")
        self._write(path, b"\n".join([*lines[:line], new, *lines[line:]]), data)
        return self._edited(path, line + 1, line + 1 + new.count(b"\n"))

    def _undo_edit(self, parameters: _Parameters, path: str) -> str:
        for index in range(len(self._undo) - 1, -1, -1):
            if self._undo[index][0] == path:
                data = self._undo.pop(index)[1]
                break
        else:
            raise ToolError(f"there is no edit of {path} to undo")
        if data is None:
            outcome = self._workspace.run(f"rm -f -- {shlex.quote(path)}", limits=self._limits)
            if outcome.exit_code != 0:
                raise ToolError(_outcome_text(outcome))
            return f"{path} was removed again"
        self._workspace.write(path, data)
        return f"the last edit of {path} was undone"

    def _kind(self, path: str, missing: str | None = None) -> tuple[str, int]:
        """Returns a path's type (following links) and size; `missing` or an error if it does not exist."""
        command = f"stat --dereference --printf '%F\\n%s' -- {shlex.quote(path)}"
        outcome = self._workspace.run(command, limits=self._limits)
        kind, _, size = outcome.output.partition("\n")
        if outcome.exit_code != 0 or not size.isdigit():
            if missing is not None and not outcome.notice:
                return missing, 0
            raise ToolError(f"there is no {path}" if not outcome.notice else outcome.notice)
        return kind, int(size)

    def _read(self, path: str) -> bytes:
        kind, size = self._kind(path)
        if not kind.startswith("regular"):
            raise ToolError(f"expected the path of a text file, got a {kind}: {path}")
        if size > LARGEST_FILE:
            raise ToolError(f"expected a file of at most {LARGEST_FILE} bytes, got {size}: {path}; use execute_bash")
        return self._workspace.read(path)

    def _write(self, path: str, data: bytes, before: bytes | None) -> None:
        if len(data) > LARGEST_FILE:
            raise ToolError(f"expected a file of at most {LARGEST_FILE} bytes, got {len(data)}: {path}")
        self._workspace.write(path, data)
        self._undo.append((path, before))
        sizes = [len(earlier or b"") for _, earlier in self._undo]
        while len(sizes) > UNDO_EDITS or sum(sizes) > UNDO_BYTES:
            del sizes[0], self._undo[0]

    def _edited(self, path: str, first: int, last: int) -> str:
        lines = self._workspace.read(path).decode(errors="replace").split("\n")
        first, last = max(1, first - SNIPPET_LINES), min(len(lines), last + SNIPPET_LINES)
        return f"{path} was edited:\n{self._numbered(lines, first, last)}"

    def _first(self, lines: list[str], more: str) -> str:
        """Returns as many lines as an observation may contain, with `more` appended if there are further ones."""
        text, room = [], self._limits.output_bytes
        for line in map(_sanitized, lines):
            room -= len(line) + 1
            if room < 0 or len(text) == MAX_LISTED:
                return "\n".join([*text, more])
            text.append(line)
        return "\n".join(text)

    def _numbered(self, lines: list[str], first: int, last: int) -> str:
        """Returns numbered lines, up to the maximum length of an observation."""
        text, room = [], self._limits.output_bytes
        for number in range(first, last + 1):
            line = f"{number:6}\t{_sanitized(lines[number - 1])}"
            room -= len(line) + 1
            if room < 0:
                text += [line[: max(room + len(line), 0)], f"[cut at line {number} of {len(lines)}; use view_range]"]
                break
            text.append(line)
        return "\n".join(text)


_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _sanitized(text: str) -> str:
    """Makes text safe for a policy or a transcript: removes terminal escapes, replaces invisible characters."""
    return _INVISIBLE.sub("�", _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))


def _outcome_text(outcome: Outcome) -> str:
    output = _sanitized(outcome.output).rstrip("\n")
    end = outcome.notice or f"exit code {outcome.exit_code}"
    return f"{output}\n[{end}]" if output else f"[{end}]"


def _lines(text: str) -> list[str]:
    """Splits at line feeds only; `str.splitlines` would also split at U+2028 and other characters."""
    return text.removesuffix("\n").split("\n") if text else []


def _shortened(text: str, recipe: Recipe) -> str:
    """Returns the first and last lines of a text, and of these the first and last characters."""
    lines, divider = text.split("\n"), "-" * 50
    if len(lines) > 2 * recipe.lines:
        left_out = f"<{len(lines) - 2 * recipe.lines} lines are not shown>"
        text = "\n".join([*lines[: recipe.lines], divider, left_out, divider, *lines[-recipe.lines :]])
    if len(text) > recipe.characters:
        half = recipe.characters // 2
        note = f"<response clipped: {len(text) - 2 * half} characters are not shown>"
        text = f"{text[:half]}\n{note}\n{text[-half:]}"
    return text


def _worded(tool: str, output: str) -> str:
    return f"Execution output of [{tool}]:\n{output}"
