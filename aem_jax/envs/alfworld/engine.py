"""A game and its players.

`Game` is what a file says: reusable, never written. `Player` is one episode: its facts, what it may do, what it saw.
After a step, only the action schemas that read a predicate which just changed are asked again what is applicable.

Texts and commands are those of the stock engine, but for two of its habits, on which no text of the recorded games
depends: its texts take every conditional effect for fired, and a fact that can never become true is not told as false
(`not_…`) when an action deletes it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

from aem_jax.envs.alfworld.facts import Args, Facts, link
from aem_jax.envs.alfworld.grammar import parse_grammar, text_reads
from aem_jax.envs.alfworld.logic import Slots, predicates, solver
from aem_jax.envs.alfworld.pddl import parse_domain, parse_problem
from aem_jax.envs.alfworld.query import Entity, World
from aem_jax.envs.alfworld.schema import Schema, compile_actions, unless_idle
from aem_jax.files import read_json

NOTHING_HAPPENS = "Nothing happens."
START = "#intro#"
HANDFUL = 2
"""A predicate with at most so many facts at the start is taken to have few throughout."""


class Game:
    """A parsed game.

    Args:
        domain_text: PDDL domain.
        problem_text: PDDL problem.
        grammar_text: TWL2 grammar; it must define `#intro#` and give every action of the domain a template.
        task_type: name of the task's family, for metrics; the rules of the game do not need it.

    Raises:
        ValueError: a text that is malformed or uses a construct that is not supported, named.
    """

    def __init__(self, domain_text: str, problem_text: str, grammar_text: str, task_type: str = ""):
        self.task_type = task_type
        self.source = ""
        """The file that it is from, for errors."""
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
        goal_slots = Slots()
        self.goal = solver(problem.goal, goal_slots, (), (), few)
        self.goal_blank = goal_slots.blank
        self.goal_reads = predicates(problem.goal)
        self.commands = tuple(_Commands(self, schema) for schema in self.schemas)

    @staticmethod
    def load(path: str | Path) -> "Game":
        """Reads a `.tw-pddl` file; the task type comes from the `traj_data.json` beside it, if there is one.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a game file.
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
    """Errors of a game's texts with the file that they are from.

    Parsers and grammar say what they know to be unsupported; a damaged text can break them anywhere, even in use.

    Raises:
        ValueError: the block failed; names `source`, if there is one.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if not source:
            raise
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"expected a game in {source}, got one that cannot be played: {said}") from error


def read_game(path: Path) -> dict[str, Any]:
    """The content of a game file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it does not hold the texts of a game; names it.
    """
    data = _read_object(path)
    missing = [key for key in ("pddl_domain", "pddl_problem", "grammar") if not isinstance(data.get(key), str)]
    if missing:
        raise ValueError(f"expected a game file, got {path} without the texts {missing}")
    return data


def read_task_type(path: Path) -> str:
    """The task type that a `traj_data.json` names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it names none; names the file.
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
    """Names that players see: `drawer_bar__plus_01_dot_13…` -> `drawer 4`.

    Objects are numbered within their class, the first in the order of ids getting the highest number. An id without
    coordinates has no number, and (as in the stock engine) its name ends with a space.
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
    """Command texts of one action schema, remembered by the parameters that they depend on."""

    def __init__(self, game: Game, schema: Schema):
        if schema.action.name not in game.grammar.actions:
            raise ValueError(
                f"expected a template for every action in the grammar, got none for {schema.action.name!r}"
            )
        self._grammar, self._template = game.grammar, game.grammar.actions[schema.action.name].command
        self._parameters = schema.parameters
        reads = text_reads(self._template)
        self.reads: frozenset[str] | None = None if reads is None else schema.reads | (reads[1] & game.domain.fluents)
        """Predicates that decide which commands there are; None if any may."""
        self._known: dict[Any, str] | None = {}
        if reads is None or reads[1] & game.domain.fluents:
            self._known = None
            return
        used = [at for at, (name, _) in enumerate(schema.parameters) if name in reads[0]]
        self._key = itemgetter(*used) if used else lambda b: None

    def write(self, b: list[str], world: World) -> str:
        """The command for parameters that stand first in `b`."""
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
        self._effects = [schema.link_effects(facts, game.types) for schema in game.schemas]
        self._goal = [link(steps, facts, game.types, lambda b: True) for steps in game.goal]
        self._admissible: list[str] | None = None
        self.acted = False
        self.observation = game.grammar.derive(START, self._world, {})
        for find in self._finders:
            find()
        self.won = self._reached()

    @property
    def admissible(self) -> list[str]:
        """Commands that would do something now, sorted."""
        if self._admissible is None:
            self._admissible = sorted(set().union(*self._tables))
        return self._admissible

    @property
    def done(self) -> bool:
        """Whether the game is over: it is when it is won."""
        return self.won

    @property
    def score(self) -> float:
        """1 if won, else 0."""
        return float(self.won)

    @property
    def facts(self) -> Iterator[tuple[str, Args]]:
        """Everything true now as (predicate, names as the player sees them); order is arbitrary."""
        names = {id_: entity.name.strip() for id_, entity in self.game.entities.items()}
        return ((p, tuple(names[a] for a in args)) for p, args in self._facts if not p.startswith("not_"))

    def step(self, command: str) -> str:
        """Does a command if it is admissible, letter for letter; else nothing happens. Returns the observation."""
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


def start(game: Game) -> Player:
    """Starts an episode."""
    return Player(game)


def _finder(schema: Schema, commands: _Commands, world: World, table: dict[str, Args]):
    """A function that fills `table` with the commands of a schema that are applicable now."""
    count, b, write = len(schema.parameters), schema.blank.copy(), commands.write

    def found(b: list[str]) -> bool:
        command, args = write(b, world), tuple(b[:count])
        known = table.get(command)
        if known is None or args < known:  # several ways to do the same thing: the first in the order of names
            table[command] = args
        return False

    runs = [link(steps, world.facts, world.types, unless_idle(idle, found)) for steps, idle in schema.chains]

    def find() -> None:
        table.clear()
        for run in runs:
            run(b)

    return find
