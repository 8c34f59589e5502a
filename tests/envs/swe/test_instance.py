import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest
from envs.swe.samples import ROW

from aem_jax.envs.swe.formats import read_instances
from aem_jax.envs.swe.instance import SweBenchInstance, from_row, to_row


def jsonl(path: Path, *rows) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_a_row_survives_a_round_trip():
    instance = from_row(ROW)
    assert instance.fail_to_pass == ("test_calc.py::test_even",)
    assert instance.pass_to_pass == ("test_calc.py::test_odd", "test_calc.py::test_mean")
    assert to_row(instance) == ROW
    assert from_row(ROW | {"FAIL_TO_PASS": ["test_calc.py::test_even"], "difficulty": "<15 min"}) == instance


def test_a_row_of_release_4_is_refused_with_its_missing_columns_and_the_fix():
    old = {name: value for name, value in ROW.items() if name not in ("image", "log_parser", "eval_type")}
    with pytest.raises(ValueError, match=r"row of 4\.x without image, log_parser, eval_type; load the dataset again"):
        from_row(old)
    with pytest.raises(ValueError, match=r"columns of SWE-bench 5\.x, repo, image missing"):
        from_row({name: value for name, value in ROW.items() if name not in ("repo", "image")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FAIL_TO_PASS": "[test"}, "expected a JSON list of test names in FAIL_TO_PASS, got '\\[test'"),
        ({"FAIL_TO_PASS": '["t.py::x[1\\n2]"]'}, "test names of one line in FAIL_TO_PASS, got 't.py::x"),
        ({"FAIL_TO_PASS": '[" "]'}, "test names of one line in FAIL_TO_PASS, got ' '"),
        ({"FAIL_TO_PASS": '["a", NaN]'}, "FAIL_TO_PASS: expected JSON, got NaN"),
        ({"hints_text": float("nan")}, "expected JSON, got NaN"),
        ({"PASS_TO_PASS": '{"a": 1}'}, "expected a list of test names in PASS_TO_PASS"),
        ({"FAIL_TO_PASS": "[]"}, "at least one test in FAIL_TO_PASS"),
        ({"patch": 3}, "expected text in patch, got 3"),
        ({"eval_type": "both"}, "eval_type to be one of pass_and_fail, fail_only, got 'both'"),
        ({"eval_script": "pytest"}, "eval_script with a line that prints"),
    ],
)
def test_errors_in_columns_name_file_and_line(tmp_path, change, message):
    path = jsonl(tmp_path / "data.jsonl", ROW, "", ROW | {"instance_id": "own__calc-2"} | change)
    with pytest.raises(ValueError, match=message) as raised:
        read_instances(path)
    assert f"{path} line 3: " in str(raised.value)


def test_files_of_all_formats_are_read_or_refused(tmp_path):
    rows = [ROW, ROW | {"instance_id": "own__calc-2"}]
    path = jsonl(tmp_path / "data.jsonl", *rows)
    instances = read_instances(path)
    assert [instance.instance_id for instance in instances] == ["own__calc-1", "own__calc-2"]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert read_instances(tmp_path / "data.json") == instances
    with pytest.raises(ValueError, match=r"line 2: expected JSON, got Expecting property name"):
        read_instances(jsonl(tmp_path / "half.jsonl", ROW, "{half"))
    with pytest.raises(ValueError, match=r"line 2: expected each instance_id once"):
        read_instances(jsonl(tmp_path / "twice.jsonl", ROW, ROW))
    with pytest.raises(ValueError, match=r"expected instances in .*, got none"):
        read_instances(jsonl(tmp_path / "none.jsonl", ""))
    with pytest.raises(ValueError, match=r"expected a file of \.jsonl, \.json, \.parquet"):
        read_instances(tmp_path / "data.csv")


def test_the_error_for_parquet_without_pyarrow_names_the_package_to_install(tmp_path, monkeypatch):
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        read_instances(tmp_path / "data.parquet")


def test_parquet_files_are_read(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="reads parquet")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist([ROW]), tmp_path / "data.parquet")
    assert read_instances(tmp_path / "data.parquet") == [from_row(ROW)]


def test_instances_are_frozen_and_hashable():
    assert dataclasses.replace(from_row(ROW), version="2") != from_row(ROW)
    assert isinstance(hash(from_row(ROW)), int)
    assert SweBenchInstance.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\r"])
def test_a_statement_may_contain_any_line_separator(tmp_path, mark):
    row = ROW | {"problem_statement": f"one{mark}two"}
    text = json.dumps(row, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(f"\ufeff{text}\r\n".encode())
    (tmp_path / "a.json").write_bytes(f"[{text}]".encode("utf-8-sig"))
    for name in ("a.jsonl", "a.json"):
        assert [instance.problem_statement for instance in read_instances(tmp_path / name)] == [f"one{mark}two"]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROW | {"problem_statement": "half \ud83d of it"})
    assert read_instances(path)[0].problem_statement == "half \ufffd of it"


def test_a_file_damaged_at_random_is_refused_in_one_line_or_read(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", *(ROW | {"instance_id": f"own__calc-{i}"} for i in range(3)))
    good = path.read_bytes()
    refusals = 0
    for seed in range(200):
        rng = random.Random(seed)
        at, end = sorted(rng.randrange(len(good) + 1) for _ in range(2))
        bad = rng.choice([b"", b"\0", b"\xff", b"NaN", b"null", b"\n", b'"', b"{", bytes(end - at), rng.randbytes(8)])
        path.write_bytes(rng.choice([good[:at], good[:at] + bad + good[end:], good[:at] + bad + good[at:]]))
        try:
            assert 1 <= len(read_instances(path)) <= 3
        except ValueError as error:
            refusals += 1
            assert str(path) in str(error) and "\n" not in str(error), seed
    assert refusals > 100
