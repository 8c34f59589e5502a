"""Reading and writing text and JSON, on inputs that Python's own readers cut, accept or fail on."""

import json

import pytest

from aem_jax.files import parse_json, read_json, read_json_lines, read_text, valid_text, write_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("größe \U0001f600", "größe \U0001f600"),
        ("half \ud83d pair", "half \ufffd pair"),
        ("second \ude00 half", "second \ufffd half"),
        ("both \ud83d\ude00 halves", "both \U0001f600 halves"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("ends \ud83d", "ends \ufffd"),
    ],
)
def test_halves_of_surrogate_pairs_are_replaced_or_joined(text, expected):
    assert valid_text(text) == expected
    valid_text(text).encode()


def test_strings_and_keys_of_parsed_json_can_be_encoded():
    value = parse_json('{"a\\ud83d": ["\\ude00", {"b": "\\ud83d\\ude00"}], "n": 1}', "here")
    assert value == {"a\ufffd": ["\ufffd", {"b": "\U0001f600"}], "n": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON, got nothing"),
        ("{", "line 1 column 2"),
        ('{"a": NaN}', "got NaN"),
        ("[-Infinity]", "got -Infinity"),
        ("[-1e999]", "expected numbers that a float can hold, got -1e999"),
        (b"\xff", "expected text in UTF-8, got byte 0xff at 0"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "digits"),
    ],
)
def test_invalid_json_is_refused_in_one_line_that_names_the_source(text, message):
    with pytest.raises(ValueError) as refusal:
        parse_json(text, "tasks.jsonl line 3")
    assert str(refusal.value).startswith("tasks.jsonl line 3: ") and message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_lines_end_at_newlines_alone(tmp_path):
    rows = [{"text": f"one{mark}two"} for mark in ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e")]
    file = tmp_path / "rows.jsonl"
    file.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8-sig") + b"\n\n")
    assert list(read_json_lines(file)) == list(enumerate(rows, start=1))


def test_a_byte_order_mark_is_removed(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert read_text(tmp_path / "a.json") == '{"a": 1}'


def test_an_invalid_line_is_named_by_its_number(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{}\n\n{"a": Infinity}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl line 3: expected JSON, got Infinity"):
        list(read_json_lines(tmp_path / "rows.jsonl"))


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    file = tmp_path / "page.html"
    write_text(file, "α\r\n\u2028")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\ud83d")
    assert file.read_bytes() == "α\r\n\u2028".encode()
