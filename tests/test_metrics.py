"""Written metrics can be read, a kill costs at most one line, and a resumed file equals an uninterrupted one."""

import os
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from aem_jax.metrics import (
    MetricsConfig,
    MetricsWriter,
    append_line,
    comparable,
    drop_lines,
    flatten,
    read_lines,
)

QUIET = MetricsConfig(tensorboard=False)


def test_flatten_joins_names_and_unwraps_scalars():
    import jax.numpy as jnp

    values = {
        "rollout": {"success": np.float32(0.5), "task_type": {"cool": 1}},
        "loss": jnp.float32(2.0),
        "half": np.asarray(1.5, ml_dtypes.bfloat16),
        "done": np.True_,
        "one": jnp.ones((1,)),
    }
    expected = {"rollout/success": 0.5, "rollout/task_type/cool": 1, "loss": 2.0, "half": 1.5, "done": True, "one": 1.0}
    assert flatten(values) == expected
    assert {type(value) for value in flatten(values).values()} == {float, int, bool}


def test_flatten_maps_non_finite_numbers_to_none():
    assert flatten({"a": np.nan, "b": -np.inf, "c": 0.0}) == {"a": None, "b": None, "c": 0.0}


@pytest.mark.parametrize("value", [np.ones(3), np.ones((0,)), "high", None, [1, 2]])
def test_flatten_refuses_values_that_are_not_one_number(value: object):
    with pytest.raises(ValueError, match="expected one number under 'a/b', got"):
        flatten({"a": {"b": value}})


def test_written_lines_are_read_back(tmp_path: Path):
    with MetricsWriter(tmp_path / "run", QUIET) as writer:
        assert writer.write(0, {"loss": np.float32(0.25)}) == {"step": 0, "loss": 0.25}
        writer.write(1, {"loss": float("nan"), "rollout": {"success": 1.0}})
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert records == [{"step": 0, "loss": 0.25}, {"step": 1, "loss": None, "rollout/success": 1.0}]


def test_a_resumed_run_writes_the_same_file(tmp_path: Path):
    def run(folder: str, start: int, stop: int) -> None:
        with MetricsWriter(tmp_path / folder, QUIET, start_step=start) as writer:
            for step in range(start, stop):
                writer.write(step, {"loss": np.float32(1 / (step + 1))})

    run("unbroken", 0, 6)
    run("parts", 0, 5)
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line
    run("parts", 3, 6)  # the last checkpoint was that of step 3
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (tmp_path / "unbroken" / "metrics.jsonl").read_bytes()


def test_a_step_does_not_wait_for_the_disk_and_lines_keep_their_order(tmp_path: Path):
    gate = threading.Event()
    with MetricsWriter(tmp_path, QUIET) as writer:
        writer.submit(lambda: print(gate.wait()))
        for step in range(3):
            writer.write(step, {"loss": 1.0})  # would never return if it waited
        assert read_lines(tmp_path / "metrics.jsonl") == []
        gate.set()
        writer.wait()
        assert [record["step"] for record in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_failed_write_is_raised_by_a_later_call(tmp_path: Path):
    writer = MetricsWriter(tmp_path / "run", QUIET)
    (tmp_path / "run").rmdir()
    writer.write(0, {"loss": 1.0})
    with pytest.raises(FileNotFoundError):
        writer.wait()
    writer.write(1, {"loss": 1.0})
    with pytest.raises(FileNotFoundError):
        writer.close()


def test_drop_lines_keeps_records_without_a_step(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    drop_lines(path, 3)
    assert not path.exists() and read_lines(path) == []
    for record in ({"note": "α"}, {"step": 2}, {"step": 3}):
        append_line(path, record)
    drop_lines(path, 3)
    assert read_lines(path) == [{"note": "α"}, {"step": 2}]


def test_appended_records_are_strict_json(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    append_line(
        path, {"success": float("nan"), "by_task_type": {"cool": {"low": float("inf"), "count": 0}}, "rest": (1, 2.5)}
    )
    assert read_lines(path) == [
        {"success": None, "by_task_type": {"cool": {"low": None, "count": 0}}, "rest": [1, 2.5]}
    ]


def test_read_lines_skips_damaged_lines_and_warns_except_for_an_unfinished_last_line(tmp_path: Path, caplog):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n[1, 2]\nnonsense\n{"cut": \n\n{"step": 2}\n{"st')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    assert [record.message.partition(": expected")[0] for record in caplog.records] == [
        f"left out: {path} line 2",
        f"left out: {path} line 3",
        f"left out: {path} line 4",
    ]


def test_any_text_is_written_and_read_back_as_one_record(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"note": "a\u2028b\x85c\x1cd \ud83d", "by_task_type": {"half \ud83d": {"count": 1}}, "step": 1})
    drop_lines(path, 2)
    assert read_lines(path) == [
        {"note": "a\u2028b\x85c\x1cd \ufffd", "by_task_type": {"half \ufffd": {"count": 1}}, "step": 1}
    ]


def test_comparable_leaves_out_the_clock():
    record = {"step": 3, "loss": 1.0, "time/update": 0.2, "throughput/tokens_per_s": 4e3}
    assert comparable(record) == {"step": 3, "loss": 1.0}


def test_tensorboard_events_hold_every_finite_number(tmp_path: Path):
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    with MetricsWriter(tmp_path) as writer:
        writer.write(7, {"aem": {"alpha": 0.75}, "bad": float("inf")})
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, scalars, at = file.read_bytes(), {}, 0
    while at < len(data):  # frames of: length u64, checksum u32, payload, checksum u32
        length = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + length])
        scalars |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        at += 16 + length
    assert scalars == {"aem/alpha": (7, 0.75)}


def test_missing_wandb_is_refused_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"expected wandb to be installed .* pip install 'aem_jax\[wandb\]'"):
        MetricsWriter(tmp_path, MetricsConfig(tensorboard=False, wandb_project="p"))


def test_wandb_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import sys
    import types

    calls: list[object] = []
    run = types.SimpleNamespace(
        log=lambda record, step: calls.append((step, record)), finish=lambda: calls.append("finished")
    )
    fake = types.SimpleNamespace(init=lambda **settings: calls.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = MetricsConfig(tensorboard=False, wandb_project="household")
    with MetricsWriter(tmp_path / "seed-1", config, run_config={"seed": 1}) as writer:
        writer.write(4, {"loss": 0.5})
    settings, line, end = calls
    assert isinstance(settings, dict)
    assert (settings["project"], settings["name"], settings["config"]) == ("household", "seed-1", {"seed": 1})
    assert (line, end) == ((4, {"step": 4, "loss": 0.5}), "finished")
    MetricsWriter(tmp_path / "seed-1", config, start_step=5).close()  # a resumed run goes on in the same one
    assert isinstance(calls[3], dict) and calls[3]["id"] == settings["id"] and settings["resume"] == "allow"


def test_a_line_is_complete_or_absent_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 0})
    write = os.write
    monkeypatch.setattr("aem_jax.metrics.os.write", lambda descriptor, line: write(descriptor, line[:5]))
    with pytest.raises(OSError, match="No space left on device"):
        append_line(path, {"step": 1})
    monkeypatch.undo()
    append_line(path, {"step": 2})
    assert [record["step"] for record in read_lines(path)] == [0, 2]
