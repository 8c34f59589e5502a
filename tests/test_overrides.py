"""Overrides of configs: accepted values, refused values, and the messages of refusals."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from aem_jax.errors import ConfigError
from aem_jax.overrides import OneOf, annotations, as_values, flatten, nearest, nested_values, override, read


@dataclass(frozen=True)
class Inner:
    size: int = 4
    rate: float = 0.5
    kinds: tuple[str, ...] = ("a",)
    span: tuple[int, int] | None = None
    mode: Literal["fast", "slow"] = "fast"

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"expected size >= 1, got {self.size}")
        if self.mode == "slow" and self.rate > 1:
            raise ValueError(f"expected rate <= 1 when slow, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    on: bool = True
    inner: Inner = Inner()


def test_fields_have_dotted_names():
    assert list(annotations(Outer())) == [
        "name", "on", "inner.size", "inner.rate", "inner.kinds", "inner.span", "inner.mode",
    ]  # fmt: skip


def test_values_land_where_they_belong_and_nothing_else_changes():
    made = override(Outer(), {"inner.size": 7, "inner.kinds": ["b", "c"], "inner.span": [1, 2], "on": False})
    assert made == Outer(on=False, inner=Inner(size=7, kinds=("b", "c"), span=(1, 2)))
    assert Outer() == Outer(inner=Inner())


def test_fields_that_depend_on_each_other_are_set_together():
    """Each override alone would be refused: slow at rate 2, or rate 2 on a slow one."""
    start = Outer(inner=Inner(rate=2.0))
    assert override(start, {"inner.mode": "slow", "inner.rate": 1}).inner.rate == 1.0


def test_as_values_is_the_inverse():
    config = Outer(name="y", inner=Inner(span=(3, 4), mode="slow"))
    assert override(Outer(), as_values(config)) == config


def test_an_int_will_do_for_a_float_and_nothing_else_is_converted():
    assert isinstance(override(Outer(), {"inner.rate": 1}).inner.rate, float)
    for name, value in {
        "inner.size": 1.0,
        "inner.rate": "1",
        "on": 1,
        "name": 3,
        "inner.size ": 1,
        "inner.span": [1],
    }.items():
        with pytest.raises(ConfigError):
            override(Outer(), {name: value})
    with pytest.raises(ConfigError, match="expected a whole number, got True"):
        override(Outer(), {"inner.size": True})
    for value in (math.inf, math.nan):  # a saved config could not be read again
        with pytest.raises(ConfigError, match="expected a finite number, got"):
            override(Outer(), {"inner.rate": value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner.sise": 1}, "unknown setting 'inner.sise'; did you mean 'inner.size'?"),
        ({"size": 1}, "unknown setting 'size'; did you mean 'inner.size'?"),
        ({"zzz": 1}, "unknown setting 'zzz'; there are " + ", ".join(map(repr, annotations(Outer())))),
        ({"inner": 1}, "'inner' is a group of fields; set one of them, as in 'inner.size'"),
        ({"inner.mode": "fats"}, "'inner.mode': expected one of fast, slow, got 'fats'; did you mean 'fast'?"),
        ({"inner.size": 0}, "'inner.size': expected size >= 1, got 0"),
        ({"inner.mode": "slow", "inner.rate": 2.0}, "'inner.rate': expected rate <= 1 when slow, got 2.0"),
        ({"inner.kinds": ["a", 3]}, "'inner.kinds': expected a text, got 3"),
    ],
)
def test_refusals_name_the_field(values: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        override(Outer(), values)
    assert str(caught.value) == message


@dataclass(frozen=True)
class Square:
    side: int = 1


@dataclass(frozen=True)
class BigCircle:
    radius: float = 2.0
    inner: Inner = Inner()


SHAPES = {"square": Square, "big-circle": BigCircle}
NAMES = {cls: name for name, cls in SHAPES.items()}


@dataclass(frozen=True)
class Drawing:
    shape: Annotated[Any, OneOf(tuple(SHAPES), lambda name: SHAPES[name](), lambda config: NAMES[type(config)])] = (
        Square()
    )
    name: str = "x"


def test_a_union_has_the_settings_of_its_choice_under_that_name():
    circle = override(Drawing(), {"shape": "big-circle", "big_circle.radius": 3, "name": "y"})
    assert circle == Drawing(BigCircle(3.0), "y")
    assert list(annotations(circle))[:3] == ["shape", "big_circle.radius", "big_circle.inner.size"]
    assert list(annotations(Drawing())) == ["shape", "square.side", "name"]
    assert nested_values(Drawing()) == {"shape": "square", "square": {"side": 1}, "name": "x"}
    assert override(Drawing(), as_values(circle)) == circle
    assert override(circle, {"shape": "big-circle", "name": "z"}).shape == circle.shape  # the same choice keeps its own
    assert override(circle, {"shape": "square"}) == Drawing(Square(), "y")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": "sqare"}, "'shape': expected one of square, big-circle, got 'sqare'; did you mean 'square'?"),
        (
            {"big_circle.radius": 1.0},
            "'big_circle.radius' is a setting of shape big-circle, and 'shape' is square here; "
            "set 'shape' to big-circle, or leave it out",
        ),
        ({"square.sides": 1}, "unknown setting 'square.sides'; did you mean 'square.side'?"),
        ({"square": 1}, "'square' is a group of fields; set one of them, as in 'square.side'"),
        ({"square.side": "1"}, "'square.side': expected a whole number, got '1'"),
        ({"shape": "big-circle", "big_circle.inner.size": 0}, "'big_circle.inner.size': expected size >= 1, got 0"),
    ],
)
def test_refusals_of_a_union_name_the_choice(values: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        override(Drawing(), values)
    assert str(caught.value) == message


def test_flatten_joins_names():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": 3}) == {"a.b.c": 1, "a.d": [2], "e": 3}


def test_nearest_prefers_the_whole_name_then_its_last_part():
    names = ["aem.strength", "learner.learning_rate"]
    assert "aem.strength" in nearest("aem.strenth", names)
    assert "learner.learning_rate" in nearest("learning_rat", names)
    assert nearest("qqqq", names) == nearest("trian", ["aem.variant"]) == ""


def test_initials_stand_for_a_name():
    names = ["warmstart.learning_rate", "learner.learning_rate", "learner.remat"]
    assert nearest("learner.lr", names) == "; did you mean 'learner.learning_rate'?"
    assert nearest("lr", names[:1]) == "; did you mean 'warmstart.learning_rate'?"


@pytest.mark.parametrize(
    ("words", "kind", "value"),
    [
        (["3"], int, 3),
        (["-3"], int, -3),
        (["1e-4"], float, 1e-4),
        (["2"], float, 2.0),
        (["true"], bool, True),
        (["False"], bool, False),
        ([], bool, True),
        (["a b"], str, "a b"),
        ([], tuple[str, ...], ()),
        (["1", "2"], tuple[int, ...], (1, 2)),
        (["1", "2"], tuple[int, int] | None, (1, 2)),
        (["none"], tuple[int, int] | None, None),
        (["None"], int | None, None),
        (["7"], int | None, 7),
        (["slow"], Literal["fast", "slow"], "slow"),
        (["a/b"], Path, Path("a/b")),
        (["1"], Literal[0, 1], 1),
        (["bfloat16"], Literal["float32", "bfloat16"] | None, "bfloat16"),
    ],
)
def test_words_are_read_by_type(words: list[str], kind: object, value: object):
    assert read(words, kind) == value and type(read(words, kind)) is type(value)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["x"], int),
        (["1.5"], int),
        ([], int),
        (["1", "2"], int),
        (["yes"], bool),
        (["1"], tuple[int, int]),
        (["fats"], Literal["fast"]),
        (["inf"], float),
        (["nan"], float | None),
        (["1", "-inf"], tuple[float, ...]),
    ],
)
def test_words_that_cannot_be_read(words: list[str], kind: object):
    with pytest.raises(ValueError, match="expected"):
        read(words, kind)


@dataclass(frozen=True)
class Shelf:
    goals: str = ""
    held_out: str = "products"

    def __post_init__(self):
        if self.held_out not in ("products", "goals"):
            raise ValueError(f"expected held_out of products, goals, got {self.held_out!r}")


def test_an_error_is_of_the_field_that_was_set():
    with pytest.raises(ConfigError, match=r"^--held_out: expected held_out of products, goals"):
        override(Shelf(), {"held_out": "words"}, lambda name: f"--{name}")


@pytest.mark.parametrize("seed", [-1, 2**32 + 5, 2**64])
def test_no_two_seeds_are_silently_the_same_run(seed: int):
    from aem_jax.config.run import RunConfig

    with pytest.raises(ConfigError, match=f"seed'?: expected seed from 0 to 4294967295, got {seed}"):
        override(RunConfig(), {"seed": seed})
    assert override(RunConfig(), {"seed": 2**32 - 1}).seed == 2**32 - 1
