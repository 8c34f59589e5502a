import itertools
import json
import random
from pathlib import Path

import pytest
from envs import warehouse
from envs.alfworld_variants import first_release

from aem_jax.envs.actions import extract_action
from aem_jax.envs.alfworld.engine import NOTHING_HAPPENS, Game, Player, display_names
from aem_jax.envs.alfworld.env import AlfworldConfig, AlfworldEnv
from aem_jax.envs.alfworld.grammar import parse_expression, parse_grammar, parse_query
from aem_jax.envs.alfworld.pddl import And, Atom, Exists, Forall, Not, Or, parse_domain, parse_problem
from aem_jax.envs.alfworld.tasks import load_game

GOLDEN = Path(__file__).parents[3] / "shared" / "alfworld"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the golden games are not beside the repository (../shared/alfworld)"
)


def warehouse_game() -> Game:
    return Game(warehouse.DOMAIN, warehouse.PROBLEM, warehouse.GRAMMAR, task_type="tidy")


# A second, slow engine: each action on all tuples of objects, conditions evaluated by recursion, facts in one set.


def holds(formula, binding: dict[str, str], facts: set, members: dict[str, list[str]]) -> bool:
    match formula:
        case Atom("=", (left, right)):
            return binding.get(left, left) == binding.get(right, right)
        case Atom(predicate, args):
            return (predicate, tuple(binding.get(arg, arg) for arg in args)) in facts
        case Not(atom):
            return not holds(atom, binding, facts, members)
        case And(parts):
            return all(holds(part, binding, facts, members) for part in parts)
        case Or(parts):
            return any(holds(part, binding, facts, members) for part in parts)
        case Exists(variables, part):
            return any(holds(part, binding | b, facts, members) for b in bindings(variables, members))
        case Forall(variables, part):
            return all(holds(part, binding | b, facts, members) for b in bindings(variables, members))
    raise AssertionError(formula)


def bindings(variables, members):
    names = [name for name, _ in variables]
    for values in itertools.product(*(members[kind] for _, kind in variables)):
        yield dict(zip(names, values, strict=True))


def slow_successors(domain, facts: set, members) -> dict[tuple[str, tuple[str, ...]], set]:
    """(action, arguments) -> facts afterwards, for every applicable action."""
    result = {}
    for action in domain.actions:
        for binding in bindings(action.parameters, members):
            if not holds(action.precondition, binding, facts, members):
                continue
            added, removed = set(), set()
            for effect in action.effects:
                for own in bindings(effect.variables, members):
                    inner = binding | own
                    if holds(effect.condition, inner, facts, members):
                        fact = (effect.atom.predicate, tuple(inner.get(arg, arg) for arg in effect.atom.args))
                        (added if effect.adds else removed).add(fact)
            args = tuple(binding.values())
            if action.name == "walk" and args[1] == args[2]:  # changes nothing by its own precondition
                continue
            result[action.name, args] = (facts - removed) | added
    return result


def facts_of(player: Player) -> set:
    names = {entity.name.strip(): id_ for id_, entity in player.game.entities.items()}
    return {(p, tuple(names[name] for name in args)) for p, args in player.facts}


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_a_slow_engine_on_random_walks(seed: int) -> None:
    rng = random.Random(seed)
    domain = parse_domain(warehouse.DOMAIN)
    problem = parse_problem(warehouse.PROBLEM, domain)
    members = {kind: [n for n, k in problem.objects.items() if kind in domain.ancestors(k)] for kind in domain.types}
    player = Player(warehouse_game())
    facts = {(p, args) for p, rows in problem.facts.items() for args in rows}
    for _ in range(40):
        successors = slow_successors(domain, facts, members)
        assert facts_of(player) == facts
        assert player.won == holds(problem.goal, {}, facts, members)
        ours = {
            (schema.action.name, args)
            for schema, table in zip(player.game.schemas, player._tables, strict=True)
            for args in table.values()
        }
        texts = {}
        for (name, args), after in successors.items():  # several actions may share one command: it is listed once
            texts.setdefault(command_of(player, name, args), []).append(((name, args), after))
        assert sorted(texts) == player.admissible
        assert ours == {min(options)[0] for options in texts.values()}
        command = rng.choice(sorted(texts))
        (_, facts) = min(texts[command], key=lambda option: option[0])
        player.step(command)
        assert player.acted


def command_of(player: Player, name: str, args: tuple[str, ...]) -> str:
    shown = [player.game.entities[arg] for arg in args]
    match name:
        case "walk":
            return f"walk to {shown[2].id}"
        case "grab" | "drop":
            return f"{name} {shown[1].name}"
        case "pack":
            loose = ("loose", (shown[2].name,)) in set(player.facts)
            return f"pack {shown[1].name} {shown[2].name if loose else 'nothing'}"
        case "switch":
            return f"switch {shown[0].name}"
    return "survey"


def test_texts_of_a_game_with_another_domain() -> None:
    # Ids in order: c_bar_1 -> "c 2", c_bar_2 -> "c 1" (the first id of a class gets the highest number). At the dock:
    # c_bar_1 and tin_bar_1; a list is sorted by type first (thing is shallower than its subtype crate), then by id.
    player = Player(warehouse_game())
    assert player.observation == "Hello.\n\nYou see a tin 1, and a c 2."
    assert player.admissible == ["grab c 2", "survey", "switch l 1", "walk to hall"]  # tin's crate is not loose
    assert player.step("walk to hall") == "hall: You see a c 1, and a l 1."
    assert player.step("grab c 1") == "Got the c 1."
    assert player.step(" switch l 1 ") == "It is on."
    assert player.step("switch l 1") == "It is off again."
    assert player.step("survey") == "Seen."
    assert player.step("survey") == NOTHING_HAPPENS and not player.acted
    assert player.step("walk to attic") == "attic: You see nothing."


def test_won_follows_the_goal_and_is_not_latched() -> None:
    player = Player(warehouse_game())
    for command in ("grab c 2", "walk to hall", "drop c 2", "switch l 1"):
        player.step(command)
        assert player.acted, command
    assert player.won
    player.step("switch l 1")
    assert not player.won


def test_players_of_one_game_do_not_share_facts() -> None:
    game = warehouse_game()
    first, second = Player(game), Player(game)
    first.step("grab c 2")
    assert second.admissible == Player(game).admissible != first.admissible


def test_objects_are_numbered_backwards_within_their_class() -> None:
    names = display_names(["cup_bar__plus_01", "cup_bar__minus_01", "sink_bar_3_bar_sinkbasin", "sink_bar_4", "agent1"])
    assert names == {
        "cup_bar__minus_01": "cup 2",  # "-" sorts before "+" here because "minus" does before "plus"
        "cup_bar__plus_01": "cup 1",
        "sink_bar_3_bar_sinkbasin": "sinkbasin 1",
        "sink_bar_4": "sink 1",
        "agent1": "agent1 ",
    }


@pytest.mark.parametrize(
    ("text", "written"),
    [  # results of the stock engine's parser
        ("\nA\n x", "A\n x"),
        ("", ""),
        (" (open)", "(open)"),
        ("a\n\n#x#\n\n#x#", "a\n\nX\n\nX"),
        ("{e.indefinite} {e.name} (on)})} and more", "a box (on)"),
        ("foo // bar #x# ; more", "foo // bar X "),
        ("// x\n#x#", "X"),
        ("a\t\t#x#\tb", "a\t\tXb"),
        ('say "hi" now', "say hi now"),
        ("{#x# } b", ""),
        ("a<b", "a"),
        ("{e.noun or e.id}, {not e.noun}, {e.adj if e.adj else 'no'}, {e.name and 'yes'}", "b1, True, no, yes"),
    ],
)
def test_texts(text: str, written: str) -> None:
    domain = "(define (domain d) (:types t) (:action a :parameters (?e - t) :precondition (p ?e) :effect (q ?e)))"
    problem = "(define (problem p) (:domain d) (:objects b1 - t) (:init (p b1)) (:goal (q b1)))"
    blocks = json.dumps({"intro": [{"rhs": ""}], "x": [{"rhs": "X"}], "text": [{"rhs": text}]})
    grammar = f'grammar :: """{blocks}""";\naction a {{ template :: "do"; feedback :: "#text#"; }}'
    player = Player(Game(domain, problem, grammar))
    assert player.step("do") == written.replace("box", "b1 ")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("(not (seen ?p))", "(>= (total-cost) 3)"), ">="),
        (("(:constants dock - place)", "(:constants dock - place) (:derived (x) (y))"), ":derived"),
        (("?t - thing ?p - place)\n   :pre", "?t - (either thing crate) ?p - place)\n   :pre"), "either"),
        ((":effect (seen ?p)", ":effect (assign (total-cost) 0)"), "assign"),
        ((":effect (seen ?p)", ":effect (seen ?q)"), "?q"),
        (("(define (domain warehouse)", "(define (domain warehouse"), "balanced"),
    ],
)
def test_unsupported_pddl_is_named(change: tuple[str, str], named: str) -> None:
    assert change[0] in warehouse.DOMAIN
    with pytest.raises(ValueError, match="expected") as error:
        Game(warehouse.DOMAIN.replace(*change), warehouse.PROBLEM, warehouse.GRAMMAR)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("problem", "named"),
    [
        ("(:goal (and", "(:aim (and"),
        ("(at tin_bar_1 dock)", "(at tin_bar_1 cellar)"),
        ("(forall (?l - lamp) (lit ?l))", "(when (lit l) (lit l))"),
    ],
)
def test_bad_problems_are_named(problem: str, named: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        Game(warehouse.DOMAIN, warehouse.PROBLEM.replace(problem, named), warehouse.GRAMMAR)
    assert any(word in str(error.value) for word in (":aim", "cellar", "when"))


@pytest.mark.parametrize("source", ["__import__('os')", "o.__class__", "o.name[0]", "o.name * 3", "lambda: 1", "o."])
def test_expressions_run_no_code(source: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_expression(source)


def test_bad_grammars_are_named() -> None:
    for document, named in (
        ("grammer :: x;", "grammer"),
        ('grammar :: """{""";', "JSON"),
        ('action a { template :: "x"; colour :: "red"; }', "colour"),
        ("action a { template", "::"),
        ("€", "€"),
    ):
        with pytest.raises(ValueError, match="expected") as error:
            parse_grammar(document)
        assert named in str(error.value)
    with pytest.raises(ValueError, match="expected a query"):
        parse_query("a(b:c")
    with pytest.raises(ValueError, match="expected a template for every action.*'survey'"):
        Game(warehouse.DOMAIN, warehouse.PROBLEM, warehouse.GRAMMAR.replace("action survey", "action surveil"))
    with pytest.raises(ValueError, match="#view#"):
        player = Player(Game(warehouse.DOMAIN, warehouse.PROBLEM, warehouse.GRAMMAR.replace('"view"', '"sight"')))
        player.step("survey")


@needs_golden
def test_first_release_wording() -> None:
    data = first_release(json.loads((GOLDEN / "pick_and_place_simple-00.tw-pddl").read_text()))
    player = Player(Game(data["pddl_domain"], data["pddl_problem"], data["grammar"]))
    both = [command for command in player.admissible if ", and " in command]
    assert len(both) == 1  # two receptacles at one place
    places = [c.removeprefix("go to ") for c in player.admissible if c.startswith("go to ") and ", and " not in c]
    text = player.step(f"go to {places[0]}")
    assert text.startswith("You arrive at loc ") and f" {places[0]}" in text
    assert any(name in player.step("look") for name in places)


@needs_golden
def test_task_type_comes_from_the_file_beside() -> None:
    for path in GOLDEN.glob("*-00.tw-pddl"):
        assert Game.load(path).task_type.startswith(path.name.split("-")[0])


def env(**settings) -> AlfworldEnv:
    return AlfworldEnv(AlfworldConfig(**settings), load_game=lambda payload: warehouse_game())


def test_rewards_validity_and_ending() -> None:
    environment = env()
    result = environment.reset({"any": 1})
    assert result.reward == 0.0 and not result.terminated and not result.truncated
    assert result.info["task_type"] == "tidy" and "grab c 2" in result.info["admissible"]
    result = environment.step("<think>take <action>survey</action>?</think> <action> grab c 2 </action>")
    assert (result.observation, result.reward, result.info["valid_action"]) == ("Got the c 2.", 0.0, True)
    for response in (
        "drop c 2",
        "<action>grab c 2</action>",
        "<action></action>",
        "<action>DROP C 2</action>",
        "<action>drop c 2",
    ):
        result = environment.step(response)
        assert (result.observation, result.reward, result.info["valid_action"]) == (NOTHING_HAPPENS, -0.1, False)
    for command in ("walk to hall", "drop c 2", "switch l 1"):
        assert not result.terminated
        result = environment.step(f"<action>{command}</action>")
    assert (result.reward, result.terminated, result.truncated) == (10.0, True, False)
    assert result.info["won"] is True and result.info["score"] == 1.0
    json.dumps(dict(result.info))
    with pytest.raises(ValueError, match="call reset"):
        environment.step("<action>survey</action>")


def test_a_limit_truncates_and_never_terminates() -> None:
    environment = env(max_steps=2, reward_step=-1.0)
    environment.reset({})
    assert environment.step("<action>survey</action>").reward == -1.0
    result = environment.step("nonsense")
    assert result.truncated and not result.terminated and not result.info["won"]
    environment.close()
    environment.close()
    with pytest.raises(ValueError, match="call reset"):
        environment.step("x")


def test_max_invalid_truncates() -> None:
    environment = env(max_invalid=2)
    for _ in range(2):  # a reset removes those of the previous episode
        environment.reset({})
        ended = [
            environment.step(response).truncated
            for response in ("hm", "<action>survey</action>", "<action>fly</action>")
        ]
        assert ended == [False, False, True]
    with pytest.raises(ValueError, match="call reset"):
        environment.step("<action>survey</action>")
    environment.reset({})
    commands = ("grab c 2", "walk to hall", "drop c 2", "switch l 1")
    result = [
        environment.step(response) for response in ("hm", *(f"<action>{command}</action>" for command in commands))
    ][-1]
    assert (result.terminated, result.truncated) == (True, False)


def test_a_win_on_the_last_step_is_terminated() -> None:
    environment = env(max_steps=4)
    environment.reset({})
    for command in ("grab c 2", "walk to hall", "drop c 2", "switch l 1"):
        result = environment.step(f"<action>{command}</action>")
    assert (result.terminated, result.truncated) == (True, False)


def test_invalid_settings_and_payloads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        AlfworldConfig(max_steps=0)
    with pytest.raises(ValueError, match="max_invalid of at least 0"):
        AlfworldConfig(max_invalid=-1)
    with pytest.raises(ValueError, match="'game'"):
        load_game({"path": "x"})
    with pytest.raises(FileNotFoundError):
        load_game({"game": str(tmp_path / "none.tw-pddl")})
    (tmp_path / "bad.tw-pddl").write_text("{")
    (tmp_path / "poor.tw-pddl").write_text('{"pddl_domain": ""}')
    for name in ("bad", "poor"):
        with pytest.raises(ValueError, match=name):
            load_game({"game": str(tmp_path / f"{name}.tw-pddl")})


def test_extract_action() -> None:
    assert extract_action("a <action>\n go to x \n</action> b") == "go to x"
    assert extract_action("<action>a</action><action>b</action>") == "b"
    assert extract_action("go to x") is None
