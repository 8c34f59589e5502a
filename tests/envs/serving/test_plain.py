"""Values of other libraries become plain values, or raise an error that names their key."""

import datetime
import json
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from aem_jax.envs.protocol import MAX_MESSAGE_BYTES, StepResult
from aem_jax.envs.serving.plain import checked_result, flag, number, plain
from aem_jax.envs.serving.session import encode_result


class Colour(Enum):
    RED = np.int64(3)


class Env:
    """Only the class name matters."""

    def reset(self, task):
        raise NotImplementedError

    def step(self, action_text):
        raise NotImplementedError

    def close(self):
        pass


def checked(*fields, **info):
    return checked_result(Env(), "step", StepResult(*fields, **({"info": info} if info else {})))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.bool_(True), True),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.longdouble(2), 2.0),
        (np.array(3.0), 3.0),
        (np.arange(3), [0, 1, 2]),
        (np.array([1.0, np.nan, -np.inf]), [1.0, None, None]),
        (float("nan"), None),
        (np.str_("text"), "text"),
        (np.datetime64("2020-01-01"), "2020-01-01"),
        (datetime.datetime(2020, 1, 1, 12), "2020-01-01T12:00:00"),
        (Decimal("1.5"), 1.5),
        (Fraction(1, 2), 0.5),
        (Colour.RED, 3),
        (Path("/a/b"), "/a/b"),
        ({3, 1}, [1, 3]),
        ((1, (2,)), [1, [2]]),
        ({0: "a", np.int64(2): "b", None: "c", True: "d"}, {"0": "a", "2": "b", "null": "c", "true": "d"}),
        ("half \ud83d of a pair", "half \ufffd of a pair"),
    ],
)  # fmt: skip
def test_values_are_converted_to_json_values(value, expected):
    converted = plain({"key": value}, "info")["key"]
    assert converted == expected and type(converted) is type(expected)
    assert json.loads(json.dumps(converted, allow_nan=False)) == expected


LOOP: list = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"frames": [{"x": object()}]}, r"got object .* in info\['frames'\]\[0\]\['x'\]; convert it or leave it out"),
        ({"b": b"bytes"}, r"got bytes b'bytes' in info\['b'\]"),
        ({"z": 1j}, r"got complex 1j in info\['z'\]"),
        ({(1, 2): 3}, r"got tuple \(1, 2\) in info"),
        ({"loop": LOOP}, "nested too deeply or inside themselves"),
    ],
)
def test_a_value_without_a_json_equivalent_is_named(value, why):
    with pytest.raises(ValueError, match=why):
        plain(value, "info")


def test_numbers_and_flags():
    numbers = [1, True, np.float32(2), np.array(3), Decimal(4), Colour.RED]
    assert [number(value) for value in numbers] == [1.0, 1.0, 2.0, 3.0, 4.0, 3.0]
    none = [float("nan"), float("inf"), 1e300, 10**400, None, "1", np.array([3]), b"1"]
    assert [number(value) for value in none] == [None] * len(none)
    assert [flag(value) for value in (1, True, np.bool_(False), np.array(True), 0.0)] == [
        True,
        True,
        False,
        True,
        False,
    ]
    assert [flag(value) for value in (2, None, "True", [], float("nan"))] == [None] * 5


def test_a_result_with_numpy_values_is_converted():
    info = {"won": np.bool_(True), "score": np.float32(0.5), "admissible": ("a", "b"), "steps": np.int64(3)}
    converted = checked("x\ud800", np.float32(1), np.bool_(True), np.bool_(False), **info)
    assert converted == StepResult(
        "x\ufffd", 1.0, True, False, {"won": True, "score": 0.5, "admissible": ["a", "b"], "steps": 3}
    )
    assert json.loads(encode_result(converted, send_admissible=True))["data"]["reward"] == 1.0
    assert checked("x", score=float("nan"), won=None).info == {}  # not known yet


@pytest.mark.parametrize(
    ("fields", "info", "why"),
    [
        (("x", float("nan")), {}, "expected a number, finite in float32, as reward from Env.step, got float nan"),
        (("x", 1e300), {}, "as reward from Env.step, got float 1e"),
        (("x", None), {}, "as reward from Env.step, got NoneType None"),
        (("x", np.array([1.0])), {}, "as reward from Env.step, got ndarray"),
        (("x", 1, None), {}, "expected true or false as terminated from Env.step, got NoneType None"),
        (("x", 1, False, "no"), {}, "expected true or false as truncated from Env.step, got str 'no'"),
        ((b"x",), {}, "got bytes b'x' as observation; return aem_jax.envs.protocol.StepResult"),
        (("x",), {"won": "False"}, r"expected true or false as info\['won'\] from Env.step, got str 'False'"),
        (("x",), {"score": "high"}, r"expected a finite number as info\['score'\]"),
        (("x",), {"admissible": "ab"}, r"expected a list of texts as info\['admissible'\]"),
        (("x",), {"env": Env()}, r"in Env.step's info\['env'\]"),
    ],
)  # fmt: skip
def test_a_wrong_part_of_a_result_is_named(fields, info, why):
    with pytest.raises(ValueError, match=why):
        checked(*fields, **info)


@pytest.mark.parametrize("result", [None, ("observation", {}), {"observation": "x"}])
def test_gymnasium_style_results_are_refused_with_the_expected_form(result):
    with pytest.raises(ValueError, match=r"expected a StepResult .* from Env.reset, got .*; return aem_jax.envs"):
        checked_result(Env(), "reset", result)


def test_a_reply_above_the_message_size_is_refused_with_its_largest_part():
    result = StepResult("x", info={"frame": "y" * MAX_MESSAGE_BYTES})
    with pytest.raises(ValueError, match=r"at most 16 MiB .* got 16.0 MiB, 16.0 MiB of it in info\['frame'\]"):
        encode_result(result, send_admissible=False)
