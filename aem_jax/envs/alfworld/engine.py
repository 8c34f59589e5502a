"""Games and their players.

`Game` is the parsed content of a game file. Episodes share it and never write to it. `Player` is one episode: its
facts, its admissible commands and its latest observation. After a step, only the action schemas that read a changed
predicate are searched again for applicable actions.

Texts and commands match the stock engine, except for two of its habits. No text of the recorded games depends on them.
The stock engine's texts assume that every conditional effect fires. When an action deletes a fact that can never become
true, the stock engine does not record the fact as false (`not_…`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

from aem_jax.envs.alfworld.facts import Args, Facts, link, link_effects, unless_idle
from aem_jax.envs.alfworld.grammar import Entity, World, parse_grammar, text_reads
from aem_jax.envs.alfworld.pddl import parse_domain, parse_problem
from aem_jax.envs.alfworld.schema import Schema, Slots, compile_actions, predicates, solver
from aem_jax.files import read_json

NOTHING_HAPPENS = "Nothing happens."
START = "#intro#"
HANDFUL = 2
"""A predicate with at most this many facts at the start is assumed to have few facts throughout the game."""


class Game:
    """A parsed game.

    Args:
        domain_text: PDDL domain.
        problem_text: PDDL problem.
        grammar_text: TWL2 grammar; it must define `#intro#` and give every action of the domain a template.
        task_type: name of the task type, for metrics; the rules of the game do not use it.

    Raises:
        ValueError: a text is malformed or uses an unsupported construct; the message names it.
    """

    def __init__(self, domain_text: str, problem_text: str, grammar_text: str, task_type: str = ""):
        self.task_type = task_type
        self.source = ""
        """Path of the game file, for error messages."""
        self.domain = domain = parse_domain(domain_text)
        self.grammar = parse_grammar(grammar_text)
        problem = parse_problem(problem_text, domain)
        of_type: dict[str, list[str]] = {kind: [] for kind in domain.types}
        for name, kind in problem.objects.items():
            of_type.setdefault(kind, []).append(name)
        members: dict[str, set[str]] = {kind: set() for kind in of_type}
        for kind, names in of_type.items():
            for ancestor in domain.ancestors(kind):
                members[ancestor].update(names)
        self.types = {kind: frozenset(names) for kind, names in members.items()}
        places = {kind: (len(list(domain.ancestors(kind))), at) for at, kind in enumerate(of_type)}
        self.ranks = {name: places[kind] for name, kind in problem.objects.items()}
        mentioned = {name for rows in problem.facts.values() for args in rows for name in args}
        names = display_names(mentioned)
        self.entities = {name: Entity(name, kind, names.get(name, name)) for name, kind in problem.objects.items()}
        self.static = Facts({p: rows for p, rows in problem.facts.items() if p not in domain.fluents})
        self.initial = {p: problem.facts.get(p, set()) for p in domain.fluents}
        few = frozenset(p for p, rows in self.initial.items() if len(rows) <= HANDFUL)
        self.schemas = compile_actions(domain_text, few)
        self.goal = solver(problem.goal, slots := Slots(), (), (), few)
        self.goal_blank = slots.blank
        self.goal_reads = predicates(problem.goal)
        self.commands = tuple(_Commands(self, schema) for schema in self.schemas)

    @staticmethod
    def load(path: str | Path) -> "Game":
        """Reads a `.tw-pddl` file. The task type comes from `traj_data.json` in the same folder, if that file exists.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a game file.
        """
        path = Path(path)
        data, kind = read_game(path), ""
        beside = (path.name.removesuffix(".tw-pddl") + ".traj_data.json", "traj_data.json")
        for name in filter(lambda name: path.with_name(name).exists(), beside):
            kind = read_task_type(path.with_name(name))
            break
        with damage_named(str(path)):
            game = Game(data["pddl_domain"], data["pddl_problem"], data["grammar"], kind)
        game.source = str(path)
        return game


@contextmanager
def damage_named(source: str) -> Iterator[None]:
    """Adds the name of the game file to errors that the game's texts cause.

    The parsers report unsupported constructs themselves. A damaged text can cause an error anywhere, even during an
    episode.

    Raises:
        ValueError: the block failed; the message names `source`. If `source` is empty, the original error is raised.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if not source:
            raise
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"expected a game in {source}, got one that cannot be played: {reason}") from error


def read_game(path: Path) -> dict[str, Any]:
    """Reads the content of a game file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file lacks the texts of a game; the message names the file.
    """
    data = _read_object(path)
    missing = [key for key in ("pddl_domain", "pddl_problem", "grammar") if not isinstance(data.get(key), str)]
    if missing:
        raise ValueError(f"expected a game file, got {path} without the texts {missing}")
    return data


def read_task_type(path: Path) -> str:
    """Reads the task type from a `traj_data.json`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file contains no task type; the message names the file.
    """
    kind = _read_object(path).get("task_type")
    if not isinstance(kind, str):
        raise ValueError(f"expected a text as task_type in {path}, got {kind!r:.80}")
    return kind


def _read_object(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, got a {type(data).__name__} in {path}")
    return data


def display_names(ids: Iterable[str]) -> dict[str, str]:
    """Maps object ids to the names that players see: `drawer_bar__plus_01_dot_13…` -> `drawer 4`.

    Objects are numbered within their class. The first id in sorted order gets the highest number. The name of an id
    without coordinates has no number and, as in the stock engine, ends with a space.
    """
    marks = (("_bar_", "|"), ("_minus_", "-"), ("_plus_", "+"), ("_dot_", "."), ("_comma_", ","))
    classes = {}
    for id_ in sorted(ids):
        text = id_
        for mark, sign in marks:
            text = text.replace(mark, sign)
        name, *coordinates = text.split("|", 1)
        classes[id_] = (name + "basin" * ("basin" in id_), True) if coordinates else (text, False)
    left = Counter(name for name, numbered in classes.values() if numbered)
    result = {}
    for id_, (name, numbered) in classes.items():
        result[id_] = f"{name} {left[name]}" if numbered else f"{name} "
        left[name] -= numbered
    return result


class _Commands:
    """Command texts of one action schema, cached by the parameters that they depend on."""

    def __init__(self, game: Game, schema: Schema):
        if schema.action.name not in game.grammar.actions:
            raise ValueError(
                f"expected a template for every action in the grammar, got none for {schema.action.name!r}"
            )
        self._grammar, self._template = game.grammar, game.grammar.actions[schema.action.name].command
        self._parameters = schema.parameters
        reads = text_reads(self._template)
        self.reads: frozenset[str] | None = None if reads is None else schema.reads | (reads[1] & game.domain.fluents)
        """Predicates that the set of commands depends on; None if it may depend on any predicate."""
        self._known: dict[Any, str] | None = {}
        if reads is None or reads[1] & game.domain.fluents:
            self._known = None
            return
        used = [at for at, (name, _) in enumerate(schema.parameters) if name in reads[0]]
        self._key = itemgetter(*used) if used else lambda b: None

    def write(self, b: list[str], world: World) -> str:
        """Returns the command for the parameters at the start of `b`."""
        if self._known is None:
            return self._derive(b, world)
        key = self._key(b)
        command = self._known.get(key)
        if command is None:
            command = self._known[key] = self._derive(b, world)
        return command

    def _derive(self, b: list[str], world: World) -> str:
        return self._grammar.derive(self._template, world, dict(zip(self._parameters, b, strict=False)))


class Player:
    """One episode of a game.

    Attributes:
        observation: the latest text.
        acted: whether the latest command was admissible (False before the first).
        won: whether the goal holds now.
    """

    def __init__(self, game: Game):
        self.game = game
        self._facts = facts = Facts(game.initial | {f"not_{p}": () for p in game.initial}, game.static)
        self._world = World(facts, game.entities, game.types, game.ranks)
        self._tables: list[dict[str, Args]] = [{} for _ in game.schemas]
        self._finders = [
            _finder(schema, commands, self._world, table)
            for schema, commands, table in zip(game.schemas, game.commands, self._tables, strict=True)
        ]
        self._effects = [
            link_effects(schema.effects, schema.blank, len(schema.parameters), facts, game.types)
            for schema in game.schemas
        ]
        self._goal = [link(steps, facts, game.types, lambda b: True) for steps in game.goal]
        self._admissible: list[str] | None = None
        self.acted = False
        self.observation = game.grammar.derive(START, self._world, {})
        for find in self._finders:
            find()
        self.won = self._reached()

    @property
    def admissible(self) -> list[str]:
        """Commands that have an effect in the current state, sorted."""
        if self._admissible is None:
            self._admissible = sorted(set().union(*self._tables))
        return self._admissible

    @property
    def facts(self) -> Iterator[tuple[str, Args]]:
        """All facts that hold now, as (predicate, display names of the arguments), in arbitrary order."""
        names = {id_: entity.name.strip() for id_, entity in self.game.entities.items()}
        return ((p, tuple(names[a] for a in args)) for p, args in self._facts if not p.startswith("not_"))

    def step(self, command: str) -> str:
        """Executes a command and returns the observation. A command that is not exactly admissible does nothing."""
        command = command.strip()
        for at, table in enumerate(self._tables):
            args = table.get(command)
            if args is not None:
                self.acted = True
                self.observation = self._act(at, args)
                return self.observation
        self.acted, self.observation = False, NOTHING_HAPPENS
        return NOTHING_HAPPENS

    def _act(self, at: int, args: Args) -> str:
        game, facts, changed = self.game, self._facts, set()
        removed, added = self._effects[at](args)
        for predicate, row in removed:
            if (predicate, row) not in added:
                changed |= {predicate} if facts.discard(predicate, row) else set()
                changed |= {predicate} if facts.add(f"not_{predicate}", row) else set()
        for predicate, row in added:
            changed |= {predicate} if facts.add(predicate, row) else set()
            facts.discard(f"not_{predicate}", row)
        schema = game.schemas[at]
        feedback = game.grammar.actions[schema.action.name].feedback
        text = game.grammar.derive(feedback, self._world, dict(zip(schema.parameters, args, strict=True)))
        for find, commands in zip(self._finders, game.commands, strict=True):
            if commands.reads is None or not changed.isdisjoint(commands.reads):
                find()
                self._admissible = None
        if not changed.isdisjoint(game.goal_reads):
            self.won = self._reached()
        return text

    def _reached(self) -> bool:
        return any(run(self.game.goal_blank.copy()) for run in self._goal)


def _finder(schema: Schema, commands: _Commands, world: World, table: dict[str, Args]):
    """Returns a function that fills `table` with the commands of a schema that are applicable now."""
    count, b, write = len(schema.parameters), schema.blank.copy(), commands.write

    def collect(b: list[str]) -> bool:
        command, args = write(b, world), tuple(b[:count])
        known = table.get(command)
        if known is None or args < known:  # several arguments give one command: keep the first in name order
            table[command] = args
        return False

    runs = [link(steps, world.facts, world.types, unless_idle(idle, collect)) for steps, idle in schema.chains]

    def find() -> None:
        table.clear()
        for run in runs:
            run(b)

    return find
