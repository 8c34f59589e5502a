import json
import subprocess
import sys
from pathlib import Path

import pytest
from envs import warehouse

from aem_jax.envs.alfworld.engine import Game, Player
from aem_jax.envs.testing import replay

GOLDEN = Path(__file__).parents[4] / "shared" / "alfworld"


def record(folder: Path) -> Path:
    """Writes one small game and one episode of it."""
    data = {"pddl_domain": warehouse.DOMAIN, "pddl_problem": warehouse.PROBLEM, "grammar": warehouse.GRAMMAR}
    (folder / "w.tw-pddl").write_text(json.dumps(data))
    player, steps = Player(Game.load(folder / "w.tw-pddl")), []
    for command in (None, "survey", "survey", "grab c 2"):
        if command is not None:
            player.step(command)
        steps.append({"command": command} | replay.alfworld_values(player))
    path = folder / "t.jsonl"
    path.write_text(json.dumps({"game": "w", "policy": "p", "steps": steps}) + "\n")
    return path


@pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the golden transcripts are not beside the repository (../shared/alfworld)"
)
def test_every_recorded_step_of_the_stock_engine(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["alfworld", "--games", str(GOLDEN), "--transcripts", str(GOLDEN / "transcripts.jsonl")]
    assert replay.main(arguments) == 0
    assert capsys.readouterr().out == "steps 1932, mismatches 0\n"


def test_a_mismatch_prints_both_sides_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = record(tmp_path)
    arguments = ["alfworld", "--games", str(tmp_path), "--transcripts", str(path)]
    assert replay.main(arguments) == 0
    path.write_text(path.read_text().replace("Got the c 2.", "Got it."))
    capsys.readouterr()
    assert replay.main(arguments) == 1
    out = capsys.readouterr().out
    assert "recorded: 'Got it.'" in out and "ours:     'Got the c 2.'" in out
    assert out.endswith("steps 4, mismatches 1\n")


@pytest.mark.parametrize(
    ("content", "why"),
    [("{", "JSON"), ('{"game": "w"}', "'steps'"), ('{"game": "no", "steps": []}', "no.tw-pddl"), ("[]", "episodes")],
)
def test_bad_transcripts(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, why: str) -> None:
    path = record(tmp_path)
    path.write_text(content)
    with pytest.raises(SystemExit) as error:
        replay.main(["alfworld", "--games", str(tmp_path), "--transcripts", str(path)])
    assert error.value.code == 2 and why in capsys.readouterr().err


def test_bad_arguments_on_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aem_jax.envs.testing.replay"]
    for arguments, why in (
        (["chess", "--games", ".", "--transcripts", "x"], "chess"),
        (["alfworld", "--games", str(tmp_path / "none"), "--transcripts", "x"], "--data"),
        (["alfworld", "--games", str(tmp_path), "--transcripts", str(tmp_path / "none")], "--transcripts"),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[3])
        assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr


def test_an_empty_recording_is_no_success(tmp_path: Path) -> None:
    path = record(tmp_path)
    path.write_text("")
    assert replay.main(["alfworld", "--games", str(tmp_path), "--transcripts", str(path)]) == 1
