"""Two processes with four devices each give the results of one process with eight."""

import json
from pathlib import Path

import pytest

from aem_jax.sharding import MeshConfig, make_mesh

from .processes import finish, free_port, start
from .two_steps import two_steps

pytestmark = pytest.mark.slow

NAMES = ("learner/loss", "learner/grad_norm", "entropy/response", "aem/alpha_max", "parity/max", "rollout/return")
CHOSEN = ("selection/rounds", "selection/groups", "selection/filtered_groups")


def test_two_steps_give_the_losses_and_trajectories_of_one_process(tmp_path: Path, user_environment):
    coordinator = f"127.0.0.1:{free_port()}"
    script = str(Path(__file__).with_name("two_steps.py"))
    pair = [
        start([script, str(index), "2", coordinator, str(tmp_path / str(index))], user_environment) for index in (0, 1)
    ]
    expected = two_steps(make_mesh(MeshConfig()))
    finish(pair, [0, 0])
    seen = [json.loads((tmp_path / str(index)).read_text()) for index in (0, 1)]
    assert sum(step["rollout/retries"] for step in seen[0]["split"]["history"]) == 2
    assert any(abs(step["learner/loss"]) > 1e-3 for step in expected["history"])
    assert any(step["selection/rounds"] == 2 for step in expected["history"])
    for result in (run[mesh] for run in seen for mesh in ("split", "across")):
        assert result["episodes"] == expected["episodes"]
        for ours, theirs in zip(result["history"], expected["history"], strict=True):
            assert {name: ours[name] for name in NAMES} == pytest.approx(
                {name: theirs[name] for name in NAMES}, rel=1e-5, abs=1e-5
            )
            assert [ours[name] for name in CHOSEN] == [theirs[name] for name in CHOSEN]
            assert ours["compile/recompiles"] == 0
