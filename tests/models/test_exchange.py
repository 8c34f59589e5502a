"""The exchange of tokens with experts on other devices, in one or several rounds, computes what one device does."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aem_jax.models import exchange
from aem_jax.models.exchange import buffer_rows, order_by_key
from aem_jax.models.experts import ExpertWeights, Matrices, Routing, make_experts
from aem_jax.sharding import MeshConfig, make_mesh

EXPERTS, CHOSEN, EMBED, MLP = 8, 2, 6, 4
ROWS, LENGTH = 8, 4
CHOICES = (ROWS, LENGTH, CHOSEN)
BALANCED = np.arange(math.prod(CHOICES)).reshape(CHOICES) % EXPERTS
UNEVEN = np.where(np.random.RandomState(0).rand(*CHOICES) < 0.3, 5, BALANCED)  # half of all at the third of 4 devices
ONE_EXPERT = np.full(CHOICES, EXPERTS - 1)
ALL = np.ones(CHOICES[:2], bool)
MESHES = {"expert": MeshConfig(1, 1, 1, 4), "fsdp": MeshConfig(1, 2, 1, 4), "tensor": MeshConfig(1, 1, 2, 4)}


def activation(gate, up):
    return jnp.tanh(gate) * up


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """A buffer that holds the mean load, however few the rows: it has to be filled exactly for a single round."""
    monkeypatch.setattr(exchange, "MEAN_LOADS", 1)
    monkeypatch.setattr(exchange, "FEW_ROWS", 1)


def arguments():
    shapes = (ROWS, LENGTH, EMBED), CHOICES, (EXPERTS, EMBED, MLP), (EXPERTS, EMBED, MLP), (EXPERTS, MLP, EMBED)
    values = np.random.RandomState(1)
    return tuple(jnp.asarray(values.standard_normal(shape), jnp.float32) for shape in shapes)


def make_both(mesh):
    """A compiled program (choices, valid) -> outputs and all gradients."""
    experts = make_experts(activation, mesh)

    def both(choices, valid):
        def outputs(x, weights, gate, up, down):
            routing = Routing(choices, weights, jnp.zeros((*CHOICES[:2], EXPERTS)))
            return experts(x, routing, valid, ExpertWeights(Matrices(gate), Matrices(up), Matrices(down)))

        y, pull = jax.vjp(outputs, *arguments())
        return y, *pull(jnp.cos(jnp.arange(y.size).reshape(y.shape)))

    return jax.jit(both).lower(BALANCED, ALL).compile()


def assert_equal(got, want):
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert all(np.abs(theirs).max() > 0.01 for theirs in want)


@pytest.mark.parametrize("tokens, copies, count", [(50, 3, 4), (7, 1, 9), (1, 8, 3), (64, 8, 128)])
def test_order_by_key_is_the_stable_sort(tokens, copies, count):
    """A token can have a key twice, keys can have no rows, and `count` belongs to nobody."""
    keys = np.random.RandomState(count).randint(0, count + 1, (tokens, copies)).astype(np.int32)
    got = order_by_key(jnp.asarray(keys), count)
    want = np.argsort(keys.reshape(-1), kind="stable")
    np.testing.assert_array_equal(got.order, want)
    np.testing.assert_array_equal(got.inverse, np.argsort(want))
    np.testing.assert_array_equal(got.sizes, np.bincount(keys.reshape(-1), minlength=count + 1)[:count])


@pytest.mark.parametrize("name", MESHES)
def test_any_number_of_rounds_computes_what_one_device_does(name, small):
    """Balanced loads take one round, one expert for all takes all four, others some. All run the same
    program."""
    mesh = make_mesh(MESHES[name], jax.devices()[: math.prod(vars(MESHES[name]).values())])
    ours, one = make_both(mesh), make_both(None)
    some = ALL.copy()
    some[:, 1::3] = False  # rows that belong to nobody
    assert 1 < np.sum(UNEVEN // 2 == 2) / (UNEVEN.size / 4) <= 2
    for choices in (BALANCED, UNEVEN, ONE_EXPERT):
        for mask in (ALL, some):
            assert_equal(ours(choices, mask), one(choices, mask))


@pytest.mark.parametrize("further", [0, 1, 15, 16, 17])
def test_borders_of_rounds(further, small):
    """A device gets C rows and `further`: exactly one round, one row of the second, all of it but one, all, and one of
    the third."""
    mesh = make_mesh(MESHES["expert"], jax.devices()[:4])
    capacity = buffer_rows(math.prod(CHOICES) // 4, 4)
    assert capacity == 16
    choices = BALANCED.reshape(-1).copy()
    of_others = np.flatnonzero(choices < 6)  # experts 6 and 7 are those of the last device
    choices[of_others[:: len(of_others) // further][:further] if further else []] = 7
    assert np.sum(choices >= 6) == capacity + further
    choices = choices.reshape(CHOICES)
    assert_equal(make_both(mesh)(choices, ALL), make_both(None)(choices, ALL))
