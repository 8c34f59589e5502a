"""The plain-JAX example learns, does not learn without a learning rate, and imports only its stated packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from examples import plain_jax

SCRIPT = Path(plain_jax.__file__)


def mean_success(history: list[dict[str, float]]) -> tuple[float, float]:
    """(first, last) ten steps."""
    success = [line["success"] for line in history]
    return sum(success[:10]) / 10, sum(success[-10:]) / 10


def test_the_example_learns_with_its_defaults(user_environment: dict[str, str]):
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=user_environment, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()[-1].replace(",", "").split()
    before, after = float(words[words.index("before") + 1]), float(words[words.index("after") + 1])
    # eight seeds: 0.09 to 0.11 before, 0.977 to 0.991 after
    assert before < 0.2 and after > 0.9


def test_without_a_learning_rate_nothing_is_learnt():
    """A random walk fails the thresholds above: it ends on one of 12 places, 0.068 to 0.101 over eight seeds."""
    before, after = mean_success(plain_jax.train(learning_rate=0.0))
    assert before < 0.2 and after < 0.2


def test_the_seed_determines_every_number():
    first = plain_jax.train(steps=20)
    assert plain_jax.train(steps=20) == first
    assert plain_jax.train(steps=20, seed=1) != first


def test_alpha_differs_from_1_unless_strength_is_0():
    modulated, plain = plain_jax.train(steps=60), plain_jax.train(steps=60, strength=0.0)
    # uniform logits: every response has the entropy log 4, and the rule of 0.1 nats leaves α at 1
    assert modulated[0]["entropy"] == pytest.approx(1.3862944, abs=1e-5)
    assert modulated[0]["alpha min"] == modulated[0]["alpha max"] == 1.0
    # e^-1 <= α <= e
    assert 0.367 < modulated[-1]["alpha min"] < 0.8 and 1.2 < modulated[-1]["alpha max"] < 2.719
    assert all(line["alpha min"] == line["alpha max"] == 1.0 for line in plain)
    assert modulated[-1]["entropy"] != plain[-1]["entropy"]


def test_the_example_imports_only_advantage():
    tree = ast.parse(SCRIPT.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) == {"jax", "jax.numpy", "optax", "aem_jax.advantage"}
