"""Checkpoints are exact and atomic under kill -9. Errors are clear and harm no checkpoint."""

import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from toys import ONE_DEVICE, Bigram

from aem_jax.checkpoint import CheckpointConfig, CheckpointError, Checkpoints, lock
from aem_jax.checkpoint import step as step_files
from aem_jax.learner import LearnerConfig, abstract_state, init_state, make_update
from aem_jax.sharding import MeshConfig, make_mesh

# orbax leaves the coroutines of a read that failed to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TOY = Bigram()
ABSTRACT = abstract_state(TOY, LearnerConfig(), ONE_DEVICE)
DiskUsage = namedtuple("DiskUsage", "total used free")


def state_of(seed):
    return init_state(TOY, LearnerConfig(), ONE_DEVICE, jax.random.key(seed))


def assert_equal(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def test_restore_returns_the_saved_state_bit_for_bit(tmp_path):
    state = state_of(1)
    extra = {"tasks": {"next_index": 4}, "note": "ü", "key": [1, 2]}
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(3, state, extra=extra)
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.latest == 3
        assert_equal(checkpoints.restore(ABSTRACT), state)
        assert checkpoints.extra() == checkpoints.extra(3) == extra


def test_restore_on_another_mesh(tmp_path):
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state_of(2))
        abstract = abstract_state(TOY, LearnerConfig(), mesh)
        restored = checkpoints.restore(abstract)
    assert_equal(restored, state_of(2))
    assert restored.params["base"]["embed"].sharding == abstract.params["base"]["embed"].sharding


def test_the_state_may_be_donated_while_it_is_being_written(tmp_path):
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 0 - 1, x), donate_argnums=0)
    state = {"big": jnp.arange(4_000_000, dtype=jnp.float32), "small": jnp.arange(3)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"big": jnp.zeros(4_000_000), "small": jnp.arange(3)})
        checkpoints.save(1, state)  # the second save is not waited for
        after = step(state)
        restored = checkpoints.restore(abstract)
    np.testing.assert_array_equal(restored["big"], np.arange(4_000_000))
    np.testing.assert_array_equal(after["small"], [-1, -1, -1])


def test_the_latest_the_best_and_the_first_checkpoint_are_kept(tmp_path):
    scores = {0: None, 1: 0.1, 2: 0.9, 3: 0.3, 4: None, 5: 0.2, 6: 0.4}
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, state_of(step), score=score)
        checkpoints.wait()
        assert checkpoints.steps == [0, 2, 5, 6]
        assert checkpoints.best == 2
        assert_equal(checkpoints.restore(ABSTRACT, step=2), state_of(2))
        assert [checkpoints.find(choice) for choice in ("latest", "best", 0, 5)] == [None, 2, 0, 5]
        with pytest.raises(CheckpointError, match=r"a checkpoint of step 3 in .*, got those of steps 0, 2, 5, 6$"):
            checkpoints.find(3)
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:  # as in a resumed run
        assert checkpoints.steps == [0, 2, 5, 6] and checkpoints.best == 2
        for step, score in ((7, 0.1), (8, 0.95), (9, 0.0), (10, 0.0)):
            checkpoints.save(step, state_of(step), score=score)
        checkpoints.wait()
        assert checkpoints.steps == [0, 8, 9, 10]


def test_a_score_may_come_after_its_checkpoint(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_first=False)) as checkpoints:
        for step, score in ((1, 0.5), (2, 0.9), (3, 0.1), (4, None), (5, float("nan"))):
            checkpoints.save(step, state_of(step), extra={"tasks": step})
            if score is not None:
                checkpoints.score(step, score)
        checkpoints.wait()
        assert checkpoints.steps == [2, 5] and checkpoints.best == 2
        checkpoints.score(2, 0.2)  # of a resumed run: the first one stays
    with Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_first=False)) as checkpoints:
        assert checkpoints.best == 2 and checkpoints.extra(2) == {"tasks": 2}
        assert_equal(checkpoints.restore(ABSTRACT, step=2), state_of(2))
        with pytest.raises(CheckpointError, match="cannot record the score of step 3"):
            checkpoints.score(3, 0.5)


def test_only_the_latest_checkpoint_is_kept_if_configured(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_best=False, keep_first=False)) as checkpoints:
        for step in range(3):
            checkpoints.save(step, state_of(step), score=-step)
        checkpoints.wait()
        assert checkpoints.steps == [2]


def test_without_scores_there_is_no_best_checkpoint(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        for step in range(5):
            checkpoints.save(step, state_of(step))
        checkpoints.wait()
        assert checkpoints.best is None and checkpoints.steps == [0, 3, 4]
        with pytest.raises(CheckpointError, match=r"a checkpoint with a score .*, got those of steps 0, 3, 4$"):
            checkpoints.find("best")
    with pytest.raises(CheckpointError, match=r"expected a checkpoint with a score .*, got none$"):
        Checkpoints(tmp_path / "other").find("best")


def test_a_step_is_written_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
        checkpoints.save(1, state_of(2))
        assert_equal(checkpoints.restore(ABSTRACT), state_of(1))


def damage_missing(step):
    shutil.rmtree(step / "state")


def damage_truncated(step):
    for path in (step / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])


@pytest.mark.parametrize("damage", [damage_missing, damage_truncated])
def test_an_unreadable_checkpoint_is_moved_aside_and_the_one_before_is_read(tmp_path, damage, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), extra={"step": step})
    damage(tmp_path / "2")
    reader = Checkpoints(tmp_path)  # a reader does not move it
    assert_equal(reader.restore(ABSTRACT), state_of(1))
    assert reader.steps == [1, 2] and "checkpoint of step 2 cannot be read, step 1 is taken" in caplog.text
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.claim()
        with caplog.at_level(logging.WARNING, logger="aem_jax.checkpoint"):
            assert_equal(checkpoints.restore(ABSTRACT), state_of(1))
        assert "checkpoint of step 2 cannot be read and is put aside, step 1 is taken" in caplog.text
        assert checkpoints.latest == 1 and checkpoints.extra() == {"step": 1}
        checkpoints.save(2, state_of(3))
        assert_equal(checkpoints.restore(ABSTRACT), state_of(3))
    assert (tmp_path / "unreadable" / "2").is_dir()


def replace_state(folder):
    """Replaces the arrays by those of another step, which are intact."""
    shutil.rmtree(folder / "2" / "state")
    shutil.copytree(folder / "1" / "state", folder / "2" / "state")


def rename_step(folder):
    shutil.rmtree(folder / "2")
    shutil.copytree(folder / "1", folder / "2")


def change_record(folder):
    path = folder / "2" / "extra" / "metadata"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


def other_json(folder):
    """JSON without a seal, as the records of earlier versions are."""
    (folder / "2" / "extra" / "metadata").write_text('{"item_handlers": {}}')


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_json, "expected the record of step 2 as it was written"),
        (replace_state, r"an array is not what was written: .*: expected the checksum \w{8}, got \w{8}"),
        (rename_step, "expected the record of step 2 as it was written"),
        (change_record, "expected the record of step 2 as it was written"),
    ],
)
def test_readable_but_changed_data_are_detected(tmp_path, change, why, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step))
    change(tmp_path)
    assert_equal(Checkpoints(tmp_path).restore(ABSTRACT), state_of(1))
    assert re.search(why, caplog.text)


def test_a_checkpoint_of_another_run_is_skipped(tmp_path, caplog):
    for name, seed in (("ours", 1), ("theirs", 2)):
        with Checkpoints(tmp_path / name) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, state_of(seed))
    shutil.rmtree(tmp_path / "ours/2")
    shutil.copytree(tmp_path / "theirs/2", tmp_path / "ours/2")
    assert_equal(Checkpoints(tmp_path / "ours").restore(ABSTRACT), state_of(1))
    assert "expected a checkpoint of this run" in caplog.text
    identity = tmp_path / "ours" / ".run"
    letters = bytearray(identity.read_bytes())
    letters[12] ^= 1
    identity.write_bytes(letters)  # damage to this file must not cost the run its checkpoints
    assert_equal(Checkpoints(tmp_path / "ours").restore(ABSTRACT), state_of(2))
    identity.unlink()  # a missing file costs no checkpoint either
    assert_equal(Checkpoints(tmp_path / "ours").restore(ABSTRACT), state_of(2))


def test_a_checkpoint_without_checksums_is_refused_and_stays_in_place(tmp_path):
    """As earlier versions wrote them: extra values alone, without a seal."""
    with ocp.CheckpointManager(tmp_path, item_names=("state", "extra")) as manager:
        items = {"state": ocp.args.StandardSave(state_of(1)), "extra": ocp.args.JsonSave({"a": 1})}
        manager.save(4, args=ocp.args.Composite(**items))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.claim()
        with pytest.raises(CheckpointError, match="without a checksum; use the version of aem_jax that began the run"):
            checkpoints.restore(ABSTRACT)
        with pytest.raises(CheckpointError, match="without a checksum"):
            checkpoints.extra()
        assert checkpoints.steps == [4] and checkpoints.best is None


def test_a_reader_changes_nothing_and_reads_the_latest(tmp_path):
    assert Checkpoints(tmp_path / "none").latest is None and not (tmp_path / "none").exists()
    keep_one = CheckpointConfig(keep=1, keep_first=False)
    with Checkpoints(tmp_path, keep_one) as writer:
        writer.save(1, state_of(1))
        reader = Checkpoints(tmp_path, keep_one)
        assert reader.steps == [1]
        writer.save(2, state_of(2))
        writer.wait()
        before = sorted(tmp_path.rglob("*"))
        assert_equal(reader.restore(ABSTRACT), state_of(2))
        assert sorted(tmp_path.rglob("*")) == before
        with pytest.raises(CheckpointError, match="that of step 1: "):
            reader.restore(ABSTRACT, step=1)


def test_a_checkpoint_deleted_during_a_read_is_skipped(tmp_path, monkeypatch, caplog):
    with Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_first=False)) as writer:
        writer.save(1, state_of(1))
        read = step_files.read_state

        def read_late(folder, wanted, abstract):
            if wanted == 1:  # between the list and the read
                writer.save(2, state_of(2))
                writer.wait()
            return read(folder, wanted, abstract)

        monkeypatch.setattr(step_files, "read_state", read_late)
        assert_equal(Checkpoints(tmp_path).restore(ABSTRACT), state_of(2))
    assert "cannot be read" not in caplog.text


def test_one_process_at_a_time_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_S", 0.2)
    with Checkpoints(tmp_path) as first:
        first.save(1, state_of(1))
        second = Checkpoints(tmp_path)
        with pytest.raises(
            CheckpointError,
            match=rf"expected no other process that writes to .*, got process {os.getpid()} on \S+ \(since",
        ):
            second.save(2, state_of(2))
        assert second.steps == [1]
        (tmp_path / ".lock").write_text('{"pid": 7, "host": "elsewhere", "since": "noon", "token": "x"}')
        with pytest.raises(CheckpointError, match=r"process 7 on elsewhere \(since noon\) has taken over"):
            first.save(2, state_of(2))
    with Checkpoints(tmp_path) as second:
        second.save(2, state_of(2))


@pytest.mark.parametrize("name", ["[1]", "a*b?", "run[seed=1]", "{x}%20#"])
def test_folder_names_are_no_glob_patterns(tmp_path, name):
    with Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save(0, {"w": jnp.arange(4.0)})
    abstract = {"w": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=jnp.zeros(1).sharding)}
    np.testing.assert_array_equal(Checkpoints(tmp_path / name).restore(abstract)["w"], np.arange(4.0))


@pytest.mark.parametrize(
    ("folder", "why"),
    [("a\\b", "no backslash"), ("/gs/runs", "not under /gs"), (os.fsdecode(b"\xff"), "a path in UTF-8")],
)
def test_a_folder_that_the_library_would_misread_is_refused(tmp_path, folder, why):
    with pytest.raises(CheckpointError, match=f"expected a folder for checkpoints with .*{why}.*choose another"):
        Checkpoints(tmp_path / folder).claim()


def test_a_save_that_cannot_be_read_back_is_refused_at_once(tmp_path, monkeypatch):
    glob = step_files.LiteralPath.glob
    monkeypatch.setattr(step_files.LiteralPath, "glob", lambda self, pattern: iter(()))  # as where a path is a pattern
    with pytest.raises(CheckpointError, match="expected to read back what was written to .*choose another folder"):
        Checkpoints(tmp_path).save(0, state_of(0))
    monkeypatch.setattr(step_files.LiteralPath, "glob", glob)


def test_nothing_to_restore_is_an_error_and_moves_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            checkpoints.restore(ABSTRACT)
        checkpoints.save(1, state_of(1))
        other = Bigram(width=16)
        with pytest.raises(
            CheckpointError, match=r"can be read into this state; that of step 1: (.|\n)*been changed since"
        ):
            checkpoints.restore(abstract_state(other, LearnerConfig(), ONE_DEVICE))
        assert checkpoints.steps == [1]


def test_a_checkpoint_of_an_earlier_layout_is_refused_by_name(tmp_path):
    state = state_of(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": state.params["base"], "opt_state": state.opt_state, "step": state.step})
        message = r"expected \.trainable\['base'\]\['embed'\], got \['opt_state'\].*train the run to its end with that"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(ABSTRACT)
        assert checkpoints.steps == [1]


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"expected a folder to write checkpoints into, got .*; choose another"):
        Checkpoints(tmp_path / "file" / "checkpoints").claim()


def test_too_little_space_is_refused_at_the_first_save(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(2**40, 0, 2**20))
        with pytest.raises(CheckpointError, match=r"GiB free for 6 checkpoints of .*There is no good checkpoint yet"):
            checkpoints.save(0, state_of(0))


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(2**40, 0, 2**20))
        with pytest.raises(
            CheckpointError, match=r"GiB free for 1 checkpoints .*The last good checkpoint is that of step 1"
        ):
            checkpoints.save(2, state_of(2))
        assert_equal(checkpoints.restore(ABSTRACT), state_of(1))


def test_a_write_that_fails_in_the_background_leaves_the_last_good_checkpoint(tmp_path):
    big = lambda seed: {"x": jax.random.normal(jax.random.key(seed), (500_000,))}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), big(0))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_first=False))
    checkpoints.save(1, big(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # longer files are refused, as by a full disk
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*The last good checkpoint is that of step 1"):
            checkpoints.save(2, big(2))
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.steps == [1]
    assert not list(tmp_path.glob("*tmp*"))
    assert_equal(checkpoints.restore(abstract), big(1))
    checkpoints.save(3, big(3))  # saving works again when there is space
    assert_equal(checkpoints.restore(abstract), big(3))
    checkpoints.close()


KILLED = """
import sys
import jax.numpy as jnp
from aem_jax.checkpoint import CheckpointConfig, Checkpoints
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep=2))
for step in range(1000):
    state = {name: jnp.full((200_000,), step, jnp.float32) for name in "abcdefgh"}
    checkpoints.save(step, state, extra={"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.03])
def test_kill_9_during_a_save_leaves_a_complete_checkpoint(tmp_path, delay, user_environment):
    environment = {**user_environment, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 4:
                time.sleep(delay)
                os.kill(process.pid, signal.SIGKILL)
                break
    abstract = {
        name: jax.ShapeDtypeStruct((200_000,), jnp.float32, sharding=jnp.zeros(1).sharding) for name in "abcdefgh"
    }
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        latest = checkpoints.latest
        assert latest is not None and latest >= 3  # step 3 was complete before step 4 began
        for value in checkpoints.restore(abstract).values():
            np.testing.assert_array_equal(value, np.full(200_000, latest, np.float32))
        assert checkpoints.latest == latest and checkpoints.extra() == {"step": latest}
        checkpoints.save(latest + 1, {name: jnp.zeros(200_000) for name in "abcdefgh"})
        checkpoints.wait()
        assert not list(tmp_path.glob("*tmp*"))


def test_a_resumed_run_is_equal_bit_for_bit(tmp_path):
    from toys import random_trajectories

    from aem_jax.batch import BatchLayout, collate

    layout = BatchLayout(num_microbatches=4, rows=2, row_length=40, max_responses=32, max_trajectories=8)
    config = LearnerConfig(learning_rate=0.01)
    update = make_update(TOY, config, ONE_DEVICE)

    def run(state, steps):
        for step in steps:
            batch = collate(random_trajectories(step, 4, TOY.vocab_size), layout)
            state, _ = update(state, batch, np.sin(batch.tokens + step).astype(np.float32))
        return state

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, run(state_of(0), range(3)))
    with Checkpoints(tmp_path) as checkpoints:
        resumed = run(checkpoints.restore(ABSTRACT), range(3, 6))
    assert_equal(resumed, run(state_of(0), range(6)))
