import pytest
from envs.swe.samples import FakeRuntime

from aem_jax.envs.swe import choices
from aem_jax.envs.swe.choices import (
    ALL_PASS,
    SEVERAL,
    ChoicesConfig,
    ChoicesEnv,
    cached,
    candidates,
    failing_counter,
    make_counter,
)
from aem_jax.envs.swe.generate.mutate import apply
from aem_jax.envs.swe.generate.packages import package
from aem_jax.envs.swe.generate.tasks import DIFFICULTIES, bug, bugs
from aem_jax.envs.swe.grading import TIMED_OUT, Report
from aem_jax.envs.swe.sandbox.containers import Containers
from aem_jax.envs.swe.sandbox.workspace import Limits, SandboxError
from aem_jax.envs.swe.tasks import generated_tasks

EASY = generated_tasks("train", ["easy"])[0].payload
HARD = generated_tasks("train", ["hard"])[0].payload


def said(action: str) -> str:
    return f"thinking <action>{action}</action>"


def by_source(found, chosen) -> int:
    """A fake test run: 0 failures for the original module, otherwise one more than the bug's number of edits."""
    source = apply(apply(package(found.package).source, found.edits), chosen)
    golds = [edit.before for edit in found.edits]
    return 0 if source == package(found.package).source else 1 + len(golds)


def numbers(payload, config: ChoicesConfig) -> tuple[list[int], list[int]]:
    """Numbers of the right edits and of the wrong ones."""
    found = bug(payload)
    wanted = {(edit.after, edit.before) for edit in found.edits}
    chosen = candidates(found.id, config.candidates, payload.get("draw", 0))
    right = [n for n, edit in enumerate(chosen, start=1) if (edit.before, edit.after) in wanted]
    return right, [n for n in range(1, len(chosen) + 1) if n not in right]


def test_the_fix_is_among_the_candidates():
    for found in bugs():
        chosen = candidates(found.id, 4, 0)
        source = apply(package(found.package).source, found.edits)
        assert len(chosen) == 4
        assert all(source[edit.start : edit.end] == edit.before for edit in chosen)
        wanted = {(edit.after, edit.before) for edit in found.edits}
        gold = [edit for edit in chosen if (edit.before, edit.after) in wanted]
        assert apply(source, gold[: len(found.edits)]) != source
        if len(gold) == len(found.edits):  # a mistake elsewhere may have the same text
            assert apply(source, gold) == package(found.package).source


def test_places_tell_nothing():
    found = bug(EASY)
    draws = [candidates(found.id, 4, draw) for draw in range(40)]
    assert len({frozenset(draw) for draw in draws}) == 1  # the same edits …
    right = [numbers({**EASY, "draw": draw}, ChoicesConfig())[0][0] for draw in range(40)]
    assert set(right) == {1, 2, 3, 4}  # … in other orders


def test_an_episode():
    config = ChoicesConfig()
    env = ChoicesEnv(config, by_source)
    (right, *_), (wrong, *_) = numbers(EASY, config)
    first = env.reset(EASY)
    assert len(first.observation.split("\n")) == 5 and first.info["admissible"][-2:] == ["finish", "run"]
    assert env.step(said("run")).observation == "2 fail"
    assert env.step(said(f"apply {wrong}")).observation == f"applied {wrong}"
    assert env.step(said(f"apply  {wrong}")).info["valid_action"] is False  # already applied
    assert env.step(said("undo")).observation == f"undid {wrong}"
    assert env.step(said("undo")).observation == "nothing happens"
    env.step(said(f"apply {right}"))
    assert env.step(said("run")).observation == ALL_PASS
    last = env.step(said("finish"))
    assert last.terminated and last.reward == 1.0 and last.info["won"] and last.info["score"] == 1.0
    with pytest.raises(ValueError, match="running episode"):
        env.step(said("run"))


def test_unsolved_endings():
    env = ChoicesEnv(ChoicesConfig(max_steps=2, max_invalid=2, reward_invalid=-0.5), by_source)
    env.reset(EASY)
    last = env.step(said("finish"))
    assert last.terminated and not last.info["won"] and last.reward == 0.0
    env.reset(EASY)
    env.step(said("run"))
    assert env.step(said("run")).truncated
    env = ChoicesEnv(ChoicesConfig(max_invalid=2, reward_invalid=-0.5), by_source)
    env.reset(EASY)
    assert env.step("no tags").reward == -0.5
    assert env.step(said("apply 9")).truncated


def test_several_bugs_are_said_to_be_several():
    env = ChoicesEnv(ChoicesConfig(candidates=5), by_source)
    assert SEVERAL in env.reset(HARD).observation and SEVERAL not in env.reset(EASY).observation
    assert {found.difficulty for found in bugs()} == set(DIFFICULTIES)


def test_verdicts_are_asked_for_once(tmp_path):
    asked = []

    def failing(found, chosen) -> int:
        asked.append(chosen)
        return len(chosen)

    found = bug(EASY)
    one = candidates(found.id, 4, 0)[:1]
    answer = cached(failing, tmp_path / "kept")
    assert [answer(found, each) for each in ([], one, [], one)] == [0, 1, 0, 1]
    again = cached(failing, tmp_path / "kept")  # stands for another process
    assert again(found, one) == 1
    assert len(asked) == 2 and len(list((tmp_path / "kept").iterdir())) == 2
    assert cached(failing, None)(found, one) == 1 and len(asked) == 3
    for damage in (b"", b"\0", b"1\n2", b"-1"):  # files as a crashed machine may leave them
        for verdict in (tmp_path / "kept").iterdir():
            verdict.write_bytes(damage)
        again = cached(failing, tmp_path / "kept")
        assert [again(found, each) for each in ([], one)] == [0, 1]
    assert len(asked) == 11 and {each.read_bytes() for each in (tmp_path / "kept").iterdir()} == {b"0", b"1"}


def test_verdicts_come_from_grading(tmp_path):
    config = ChoicesConfig()
    found = bug(EASY)
    chosen = candidates(found.id, config.candidates, 0)
    (right, *_), (wrong, *_) = numbers(EASY, config)
    failing = failing_counter(FakeRuntime(tmp_path))
    assert failing(found, [chosen[right - 1]]) == 0
    assert failing(found, [chosen[wrong - 1]]) >= len(found.broken)


def test_a_slow_machine_is_given_more_time_and_no_verdict(monkeypatch, tmp_path):
    asked = []

    def grade(*arguments, limits):
        asked.append(limits.seconds)
        late = Report(False, True, {"a": False}, {"b": False}, f"{TIMED_OUT} after {limits.seconds} s")
        return late if len(asked) == 1 else Report(True, True, {"a": True}, {"b": True})

    monkeypatch.setattr(choices, "grade", grade)
    found = bug(EASY)
    assert failing_counter(FakeRuntime(tmp_path), Limits(seconds=3))(found, candidates(found.id, 4, 0)[:1]) == 0
    assert asked == [3, 30]


def test_without_a_sandbox_nothing_begins(monkeypatch):
    def none(*_, **__):
        raise SandboxError("install bubblewrap")

    monkeypatch.setattr(choices, "choose_runtime", none)
    with pytest.raises(OSError, match="install bubblewrap"):
        make_counter(ChoicesConfig())


def test_containers_need_an_image(monkeypatch):
    monkeypatch.setattr(choices, "choose_runtime", lambda name, container: Containers(name, container, "no-engine"))
    with pytest.raises(OSError, match="expected an image for docker to grade in, got none; set --swe-choices.image"):
        make_counter(ChoicesConfig(runtime="docker"))
    make_counter(ChoicesConfig(runtime="docker", image="python", cache="off"))


def test_bad_settings():
    with pytest.raises(ValueError, match="candidates of at least 2"):
        ChoicesConfig(candidates=1)
    with pytest.raises(ValueError, match="max_invalid"):
        ChoicesConfig(max_invalid=-1)
