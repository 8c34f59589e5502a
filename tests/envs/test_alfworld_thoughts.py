"""Thoughts of household experts: true to their knowledge, leading to the command, varied, and of a bounded length."""

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
from envs.thoughts import Recorder, bpe_lengths, smollm2_lengths

from aem_jax.envs.actions import extract_action
from aem_jax.envs.alfworld import suite as alfworld
from aem_jax.envs.alfworld.engine import Game, Player
from aem_jax.envs.alfworld.env import AlfworldConfig
from aem_jax.envs.alfworld.experts import Searcher, in_grammar, next_on_round
from aem_jax.envs.alfworld.generator.catalog import TASK_TYPES
from aem_jax.envs.alfworld.generator.config import TINY, GeneratorConfig
from aem_jax.envs.alfworld.generator.files import domain_text, grammar_text, problem_text
from aem_jax.envs.alfworld.generator.games import draw_game
from aem_jax.envs.alfworld.goals import PLACES, Goal, class_of
from aem_jax.envs.alfworld.knowledge import Knowledge
from aem_jax.envs.alfworld.phrasings import PHRASES, REMARKS, STEPS
from aem_jax.envs.alfworld.thoughts import WORDS, thought
from aem_jax.envs.play import play
from aem_jax.envs.suite import SuiteOptions
from aem_jax.envs.thoughts import NUMBERS

NAME = r"[a-z]+ \d+"
OLDER = (
    ('template :: "move {o} to {r}"', 'template :: "put {o} in/on {r}"'),
    ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
)


@dataclass
class Moment:
    """An expert's goal and knowledge before a command, the command, and the thought."""

    goal: Goal
    known: Knowledge
    command: str
    text: str
    on_round: bool = False

    @property
    def sentences(self) -> list[str]:
        return self.text.lower().split(". ")


def imperfect_moments(games: GeneratorConfig, tasks: int, monkeypatch, errors: Mapping[str, Any]) -> list[Moment]:
    moments = []

    def recorded(goal: Goal, known: Knowledge, command: str, rng: random.Random, on_round: bool) -> str:
        said = thought(goal, known, command, rng, on_round)
        moments.append(Moment(goal, deepcopy(known), command, said, on_round))
        return moments[-1].text

    monkeypatch.setattr(alfworld, "thought", recorded)
    suite = alfworld.task_suite(AlfworldConfig(games=games), SuiteOptions(expert_thinks=True, **errors))
    assert suite.demonstrator
    kinds = Counter()
    for task in suite.training[:tasks]:
        kinds[task.task_type] += 1
        play(suite.make_env(), task.payload, suite.demonstrator(task), 30)
    assert set(kinds) == set(TASK_TYPES)
    return moments


def older_moments(games: int) -> list[Moment]:
    """Episodes in the older grammar, whose first `move … to …` is refused, and in which searches start again."""
    moments = []
    for index in range(games):
        game = draw_game(TINY, 0, "train", index)
        grammar = grammar_text(game)
        for new, old in OLDER:
            assert new in grammar
            grammar = grammar.replace(new, old)
        player = Player(Game(domain_text(), problem_text(game), grammar, task_type=game.task_type))
        searcher, rng = Searcher(), random.Random(index)
        for step in range(40):
            if player.won:
                break
            searcher.observe(player.observation)
            if step % 5 == 4:
                searcher.known.contents = {place: [] for place in searcher.known.receptacles}  # all has moved
            command = searcher.command()
            known = deepcopy(searcher.known)
            moments.append(Moment(searcher.goal, known, command, thought(searcher.goal, known, command, rng)))
            player.step(command)
    return moments


@pytest.fixture(scope="module")
def moments() -> list[Moment]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        small, large = (
            imperfect_moments(games, 60, monkeypatch, {"expert_noise": 0.3}) for games in (TINY, GeneratorConfig())
        )
        habitual = imperfect_moments(TINY, 60, monkeypatch, {"expert_habit": 0.9})
    return [*small, *large, *habitual, *older_moments(40)]


def wanted_at(moment: Moment, place: str) -> bool:
    """Whether an object that the expert could look for is known to be there."""
    goal, known = moment.goal, moment.known
    wanted = goal.place if goal.light and known.held else goal.target
    return wanted in map(class_of, known.contents[place])


def names(text: str) -> list[str]:
    return re.findall(NAME, text)


def contains(moment: Moment, things: str, place: str) -> bool:
    return set(names(things)) <= set(moment.known.contents[place])


def nothing_found(moment: Moment) -> bool:
    """Whether no place is known that has what is needed; a target at its destination is not needed."""
    goal, known = moment.goal, moment.known
    if goal.light and known.held:
        return not known.places_of(goal.place)
    rest = [place for _, place in known.places_of(goal.target) if goal.light or class_of(place) != goal.place]
    return known.held is None and not rest


THINGS = rf"{NAME}(?:(?:, | and ){NAME})*(?: and other things)?"
CHECKS: dict[str, Callable[..., bool]] = {
    # in the hand
    rf"\bi (?:hold|have|have got|am carrying) ({NAME})": lambda m, thing: m.known.held == thing,
    rf"({NAME}) is in my hand": lambda m, thing: m.known.held == thing,
    r"hands are empty|hold nothing|carry nothing|nothing is in my hands": lambda m: m.known.held is None,
    # at a place
    rf"({NAME}) is (?:already )?(?:in|on) ({NAME})": contains,
    rf"with ({NAME}) (?:in|on) ({NAME})": contains,
    rf"({NAME}) has ({THINGS})": lambda m, place, things: contains(m, things, place),
    rf"(?:i see|there is) ({THINGS}) (?:in|on) ({NAME})": contains,
    rf"(?:in|on) ({NAME}) (?:i see|there is) ({THINGS})": lambda m, place, things: contains(m, things, place),
    rf"i (?:saw|remember) ({NAME}) (?:in|on) ({NAME})": contains,
    rf"({NAME}) (?:is empty|holds nothing)": lambda m, place: m.known.contents[place] == [],
    rf"there is nothing (?:in|on) ({NAME})": lambda m, place: m.known.contents[place] == [],
    rf"no [a-z]+ (?:in|on) ({NAME})": lambda m, place: not wanted_at(m, place),
    rf"({NAME}) does not have": lambda m, place: not wanted_at(m, place),
    rf"({NAME})(?:, which)? is closed": lambda m, place: place in m.known.closed,
    rf"cannot (?:see inside|use) ({NAME})": lambda m, place: place in m.known.closed,
    r"middle of the room|just started|stand in the room": lambda m: m.known.here is None,
    # before
    rf"(?:checked|found no [a-z]+ at|looked at|far i have seen) ({THINGS})": lambda m, places: all(
        place in m.known.contents and not wanted_at(m, place) for place in names(places)
    ),
    rf"({THINGS}) did not have": lambda m, places: not any(wanted_at(m, place) for place in names(places)),
    r"(?:checked|after) ([a-z]+) places": lambda m, count: NUMBERS.index(count) == len(m.known.contents),
    r"([a-z]+) places are left": lambda m, count: (
        NUMBERS.index(count) == len(set(m.known.receptacles) - set(m.known.contents))
    ),
    r"still missing|need to find|not know yet where|have not found": nothing_found,
    rf"not seen yet what is (?:in|on) ({NAME})": lambda m, place: place not in m.known.contents,
    rf"missed something (?:in|on) ({NAME})|look at ({NAME}) again": lambda m, *place: (
        "".join(place) in m.known.contents  # one of the two matched
    ),
    # the round
    rf"({NAME}) is (?:the )?next\b|(?:begins|goes on) with ({NAME})|(?:order, next is|other, now) ({NAME})": (
        lambda m, *place: next_on_round(m.known) == "".join(place)
    ),
    rf"after ({NAME}) (?:comes|my round)": lambda m, place: m.known.here == place,
    # the task
    rf"({NAME}) is (?:clean|hot|cool)\b|have made ({NAME})": lambda m, *thing: "".join(thing) in m.known.treated,
    rf"({NAME}) (?:still|is not ready)|(?:not made|have to [a-z]+|first) ({NAME})(?! and)": lambda m, *thing: (
        "".join(thing) not in m.known.treated
    ),
    r"([a-z]+) is often (?:kept|found) (?:in|on) an? ([a-z]+)": lambda m, thing, place: place in PLACES[thing],
    rf"({NAME}) is a likely place for [a-z]+ ([a-z]+)": lambda m, place, thing: class_of(place) in PLACES[thing],
    rf"moving ({NAME} to {NAME}) had no effect": lambda m, moved: f"move {moved}" in m.known.refused,
    rf"now i only need .* for ({NAME})|({NAME}) needs the light": lambda m, *thing: m.known.held == "".join(thing),
}  # fmt: skip


def test_no_statement_is_false(moments: list[Moment]):
    used = set()
    for moment in moments:
        for sentence in moment.sentences:
            for pattern, holds in CHECKS.items():
                for match in re.finditer(pattern, sentence.rstrip(".")):
                    used.add(pattern)
                    assert holds(moment, *(group or "" for group in match.groups())), (sentence, moment)
    assert used == set(CHECKS)


def test_every_kind_of_statement_about_the_room_is_checked():
    """Each remark, with made-up facts, is found by a pattern."""
    facts = {"held": "mug 1", "here": "cabinet 1", "at_here": "in cabinet 1", "seen": "cup 1 and fork 1"}
    facts |= {
        "wanted": "mug",
        "a_wanted": "a mug",
        "looked": "shelf 1 and shelf 2",
        "number": "four",
        "unseen": "two",
        "one": "mug 2",
    }
    facts |= {"at_one": "on shelf 1", "target": "mug", "state": "hot", "place": "desklamp", "a_place": "a desklamp"}
    facts |= {"thing": "mug 1", "at_dest": "in cabinet 1", "dest": "cabinet 1", "a_target": "a mug"}
    for topic in ("hand", "view", "past", "progress", "where", "closed_now", "order"):
        for phrasing in {**REMARKS, **PHRASES}[topic]:
            sentence = re.sub(r"\{(\w+)\}", lambda name: facts.get(name[1], ""), phrasing).lower().rstrip(".")
            allowed = "has to be open" in sentence  # of the place that the command opens
            assert allowed or any(re.search(pattern, sentence) for pattern in CHECKS), phrasing


def test_names_are_known_and_lead_to_the_command(moments: list[Moment]):
    for moment in moments:
        known = moment.known
        things = {thing for contents in known.contents.values() for thing in contents}
        assert set(names(moment.text.lower())) <= {*known.receptacles, *things, known.held or ""}, moment
        assert set(names(moment.command.removeprefix("go to "))) <= set(names(moment.text.lower())), moment


def test_lengths_are_bounded(moments: list[Moment]):
    texts = [moment.text for moment in moments]
    assert all(WORDS[0] <= len(text.split()) <= WORDS[1] for text in texts)
    lengths = bpe_lengths(texts)
    assert 15 <= sum(lengths) / len(lengths) <= 40 and max(lengths) <= 60


def test_lengths_with_smollm2(moments: list[Moment]):
    lengths = smollm2_lengths([moment.text for moment in moments])
    assert min(lengths) >= 15 and max(lengths) <= 60


def test_one_state_has_many_wordings(moments: list[Moment]):
    for moment in random.Random(0).sample(moments, 40):
        rng = random.Random(1)
        drawn = [thought(moment.goal, moment.known, moment.command, rng, moment.on_round) for _ in range(200)]
        assert max(Counter(drawn).values()) <= 20 and len(set(drawn)) >= 60, moment
        assert len({text.split()[0] for text in drawn}) >= 5


def test_every_phrasing_is_said(moments: list[Moment]):
    recorder = Recorder(0)
    known = Knowledge(["shelf 1"], {"shelf 1": []}, here="shelf 1", held="cup 1", refused={"move cup 1 to shelf 1"})
    goal = Goal("pick_and_place_simple", "mug", "shelf")
    commands = ("go to shelf 1", "move cup 1 to shelf 1", "put cup 1 in/on shelf 1", "look", "examine shelf 1")
    for moment in [*moments, *[Moment(goal, known, command, "") for command in commands] * 60]:
        thought(moment.goal, moment.known, moment.command, recorder, moment.on_round)
    silent = {phrasing for part in (REMARKS, STEPS, PHRASES) for texts in part.values() for phrasing in texts}
    assert not silent - recorder.chosen


def test_mistakes_are_as_long_as_good_thoughts(moments: list[Moment]):
    good, bad = [], []
    for moment in moments:
        searcher = Searcher()
        searcher._goal, searcher.known = moment.goal, deepcopy(moment.known)
        (good if searcher.command() == moment.command else bad).append(len(moment.text.split()))
    assert len(bad) > 200
    assert abs(sum(good) / len(good) - sum(bad) / len(bad)) < 1.5


@pytest.mark.parametrize("errors", [{"expert_noise": 0.3}, {"expert_habit": 0.9}])
def test_a_thinking_expert_acts_as_a_silent_one(errors: Mapping[str, Any]):
    config = AlfworldConfig(games=TINY)
    silent, loud, again = (
        alfworld.task_suite(config, SuiteOptions(expert_thinks=thinks, **errors)) for thinks in (False, True, True)
    )
    for task in silent.training[:40]:
        episodes = [play(s.make_env(), task.payload, s.demonstrator(task), 15) for s in (silent, loud, again)]  # type: ignore[misc]
        commands = [[extract_action(exchange.response) for exchange in episode] for episode in episodes]
        assert commands[0] == commands[1] == commands[2]
        assert [exchange.result for exchange in episodes[0]] == [exchange.result for exchange in episodes[1]]
        assert episodes[1] == episodes[2]
        form = r"<think>[A-Z][^\n<>]+\.</think>\n<action>.+</action>"
        assert all(re.fullmatch(form, exchange.response) for exchange in episodes[1])


def test_an_object_that_is_not_needed_is_put_away():
    goal = Goal("pick_and_place_simple", "mug", "shelf")
    known = Knowledge(["shelf 1", "desk 1"], {"shelf 1": [], "desk 1": []}, here="shelf 1", held="cup 1")
    for command in ("move cup 1 to shelf 1", "go to desk 1", in_grammar("move cup 1 to shelf 1", newer=False)):
        texts = [thought(goal, known, command, random.Random(seed)).lower() for seed in range(50)]
        assert all(names(command.removeprefix("go to "))[-1] in text for text in texts)
        assert any("i hold cup 1, which is not a mug" in text for text in texts)
    for seed in range(20):
        assert "look" in thought(goal, known, "look", random.Random(seed))


def test_an_unknown_command_is_refused():
    with pytest.raises(ValueError, match="expected a command of an ALFWorld expert, got 'dance'"):
        thought(Goal("pick_and_place_simple", "mug", "shelf"), Knowledge(["shelf 1"]), "dance", random.Random(0))
