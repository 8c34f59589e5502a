"""Mixtures of experts: products of groups, several devices as one, replayed routing, int8, adapters and the load."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import NamedSharding
from small_policies import MOE, numpy_params, numpy_tokens

from aem_jax.learner.forward import REMAT, balancing_loss, expert_metrics, load_sums
from aem_jax.models import CONFIGS, LoraConfig, Mixture, Policy, exchange
from aem_jax.models import ragged_product as products
from aem_jax.models.experts import Load, route
from aem_jax.models.int8 import scale_of
from aem_jax.models.kv_cache import init_cache
from aem_jax.models.ragged_product import blocked_gradients, blocked_product, kernel_gradients, ragged_product
from aem_jax.sharding import TRAIN, MeshConfig, make_mesh, partition, shardings

POLICY, PARAMS = Policy(MOE), numpy_params(MOE)
ROWS, LENGTH, WIDTH = 4, 11, 4
TOKENS = jnp.asarray(numpy_tokens(MOE, (ROWS, LENGTH)))
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)
SEGMENTS = jnp.ones_like(TOKENS).at[:, 9:].set(0)
RECORDED = np.random.RandomState(1).randint(0, 6, (ROWS, LENGTH, WIDTH)).astype(np.uint8)
SAME = np.zeros_like(RECORDED)  # every token at one expert, twice


@pytest.mark.parametrize("sizes", [(7, 0, 21, 3), (0, 0, 0, 0), (1, 30, 0, 5), (40, 0, 0, 0)])
def test_products_of_groups(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Values and gradients are those of a product for each group; rows of no group are 0 and have no gradient."""
    random = np.random.RandomState(0)
    shapes = (40, 6), (4, 6, 5), (40, 5)
    x, weights, out = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes)
    group = np.repeat(range(5), [*sizes, 40 - sum(sizes)])

    def separate(x, weights):
        parts = [jnp.where((group == g)[:, None], x @ weights[g], 0.0) for g in range(4)]
        return sum(parts)

    def both(function):
        result, pull = jax.vjp(function, x, weights)
        return result, *pull(out)

    wanted, counts = both(separate), jnp.asarray(sizes, jnp.int32)
    for function in (ragged_product, jax.lax.ragged_dot):
        ours = both(lambda x, weights, function=function: function(x, weights, counts))
        for got, want in zip(ours, wanted, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(blocked_product(x, weights, counts), wanted[0], atol=1e-5)
    # Those of TPUs, with a kernel for both gradients and for that of x alone; and those of other devices.
    for gradients, has_kernel in ((kernel_gradients, True), (kernel_gradients, False), (blocked_gradients, False)):
        monkeypatch.setattr(products, "WEIGHT_GRADIENT_HAS_KERNEL", has_kernel)
        for got, want in zip(gradients(x, weights, counts, out), wanted[1:], strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


def loss_and_gradient(mesh, recorded):
    policy, params, constrain = POLICY, PARAMS, None
    if mesh is not None:
        params = jax.device_put(PARAMS, shardings(mesh, POLICY.axes, TRAIN, POLICY.shapes))
        where = NamedSharding(mesh, partition(("rows", "length", None), TRAIN))
        constrain = partial(jax.lax.with_sharding_constraint, shardings=where)

    def loss(params):
        settings = {"experts": policy.experts(mesh), "recorded": recorded}
        rows = TOKENS, POSITIONS, SEGMENTS
        hidden, load = policy.hidden(params, *rows, None, constrain, **settings)
        assert load is not None
        spread = jnp.sum(load.probabilities[:, 0])
        return jnp.mean((hidden * (SEGMENTS > 0)[..., None]) ** 3) + 0.01 * spread, (hidden, load)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize(
    ("recorded", "loads"),
    [(None, 2), (RECORDED, 2), (SAME, 2), (SAME, 1)],
    ids=["routed", "recorded", "one-expert", "one-expert-in-two-rounds"],
)
def test_several_devices_compute_what_one_does(recorded, loads, monkeypatch: pytest.MonkeyPatch):
    """With the experts' axis and those of fsdp and tensor. One expert gets all tokens: none is dropped."""
    monkeypatch.setattr(exchange, "MEAN_LOADS", loads)
    monkeypatch.setattr(exchange, "FEW_ROWS", 1)
    (loss, (hidden, load)), gradient = loss_and_gradient(None, recorded)
    mesh = make_mesh(MeshConfig(1, 2, 2, 2), jax.devices()[:8])
    (ours, (rows, counted)), d_params = loss_and_gradient(mesh, recorded)
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    np.testing.assert_allclose(rows[:, :9], hidden[:, :9], atol=2e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4), counted, load)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), d_params, gradient)
    assert float(load.choices) == float(jnp.sum(load.counts)) == 2 * ROWS * 9 * 2


@pytest.mark.parametrize(
    ("remat", "expert", "kept"), [("dots", 1, True), ("dots", 2, False), ("layers", 2, False), ("none", 2, True)]
)
@pytest.mark.parametrize("loads", [1, 2])
def test_remat_recomputes_the_exchange_of_tokens(
    remat, expert, kept, loads, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Its buffers hold the mean load, and then there are further rounds, or that of two devices, the worst case. Both
    are too much to keep in every layer."""
    monkeypatch.setattr(exchange, "MEAN_LOADS", loads)
    monkeypatch.setattr(exchange, "FEW_ROWS", 1)
    mesh = make_mesh(MeshConfig(1, 4 // expert, 1, expert), jax.devices()[:4])

    def loss(params):
        rows = TOKENS, POSITIONS, SEGMENTS
        return jnp.sum(POLICY.hidden(params, *rows, REMAT[remat], experts=POLICY.experts(mesh))[0])

    print_saved_residuals(loss, PARAMS)
    lines = capsys.readouterr().out.splitlines()
    assert MOE.mixture is not None
    rows = ROWS * LENGTH * MOE.mixture.experts_per_token * min(expert, loads)
    assert any("output of scan" in line for line in lines)
    in_buffers = [line for line in lines if re.search(rf"\[2,(\d+,)?{rows},", line)]
    assert bool(in_buffers) == kept, in_buffers


def test_routing_by_hand():
    """softmax of (0, log 2, log 3, log 2) is (1, 2, 3, 2) / 8."""
    mixture, x = Mixture(4, 2), jnp.ones((1, 1, 1), jnp.bfloat16)
    router = jnp.log(jnp.asarray([[1.0, 2.0, 3.0, 2.0]]))
    routing = route(x, router, mixture)
    np.testing.assert_allclose(routing.probabilities[0, 0], [1 / 8, 2 / 8, 3 / 8, 2 / 8], rtol=1e-6)
    assert routing.experts[0, 0].tolist() == [2, 1]
    np.testing.assert_allclose(routing.weights[0, 0], [3 / 5, 2 / 5], rtol=1e-6)
    given = route(x, router, mixture, jnp.asarray([[[0, 3]]], jnp.uint8))
    np.testing.assert_allclose(given.weights[0, 0], [1 / 3, 2 / 3], rtol=1e-6)
    plain = route(x, router, replace(mixture, norm_topk=False), jnp.asarray([[[0, 3]]], jnp.uint8))
    np.testing.assert_allclose(plain.weights[0, 0], [1 / 8, 2 / 8], rtol=1e-6)
    assert {routing.weights.dtype, routing.probabilities.dtype} == {jnp.dtype("float32")}


def test_recorded_experts_keep_the_gradient_of_the_router():
    """The router's own choice, recorded, gives the same loss and gradient; another choice gives others."""
    positions, ones = POSITIONS[:1], jnp.ones_like(TOKENS[:1])
    decoder = POLICY.bind(PARAMS)
    layers, chunk = decoder.with_cache(init_cache(MOE, 1, LENGTH), LENGTH), decoder.empty_chunk(1, LENGTH)
    lengths = jnp.zeros(1, jnp.int32)
    hidden, _, experts = decoder.extend(layers, TOKENS[:1], positions, lengths, chunk, jnp.int32(0))
    assert experts is not None and experts.dtype == jnp.uint8 and experts.shape == (1, LENGTH, 2, 2)

    @jax.jit
    def compute(recorded):
        def loss(params):
            return jnp.mean(POLICY.hidden(params, TOKENS[:1], positions, ones, recorded=recorded)[0] ** 3)

        return jax.value_and_grad(loss)(PARAMS)

    own, replayed = compute(None), compute(experts.reshape(1, LENGTH, -1))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), replayed, own)
    np.testing.assert_allclose(jnp.mean(hidden**3), own[0], atol=1e-6)
    assert np.abs(replayed[1]["base"]["layers"]["router"]).max() > 1e-3
    assert abs(compute(jnp.asarray(RECORDED[:1]))[0] - own[0]) > 1e-3


def test_int8_experts_are_the_rounded_weights():
    codes = jax.jit(POLICY.quantize)(PARAMS)
    layers = dict(codes["base"]["layers"])
    for name, axis in {"qkv": 1, "o": (1, 2), "experts_gate": 2, "experts_up": 2, "experts_down": 2}.items():
        scales = layers.pop(scale_of(name))
        layers[name] = layers[name].astype(jnp.float32) * jnp.expand_dims(scales, axis)
        error = jnp.abs(layers[name] - PARAMS["base"]["layers"][name])
        assert jnp.all(error <= jnp.expand_dims(scales, axis) * 0.50001)
    rounded = {"base": {**codes["base"], "layers": layers}}
    assert layers["router"].dtype == jnp.float32  # never rounded
    ours, wanted = jax.jit(POLICY.quantized.forward)(codes, TOKENS), jax.jit(POLICY.forward)(rounded, TOKENS)
    np.testing.assert_allclose(ours, wanted, atol=5e-5)


def test_adapters_of_experts_on_several_devices():
    policy = Policy(MOE, LoraConfig(2, 6.0))
    params = {**PARAMS, "adapter": jax.tree.map(lambda x: x + 0.1, policy.init(jax.random.key(0))["adapter"])}
    wanted = jax.jit(Policy(MOE).forward)(policy.merge(params), TOKENS)
    np.testing.assert_allclose(jax.jit(policy.forward)(params, TOKENS), wanted, atol=5e-5)
    mesh = make_mesh(MeshConfig(1, 1, 2, 2), jax.devices()[:4])
    placed = jax.device_put(params, shardings(mesh, policy.axes, TRAIN, policy.shapes))
    rows = TOKENS, POSITIONS, jnp.ones_like(TOKENS)
    run = jax.jit(lambda params: policy.hidden(params, *rows, experts=policy.experts(mesh))[0])
    np.testing.assert_allclose(policy.logits(params, run(placed)), wanted, atol=5e-5)


def load(counts, probabilities, flips=0.0) -> Load:
    counts, probabilities = (jnp.asarray(x, jnp.float32) for x in (counts, probabilities))
    choices = jnp.sum(counts)
    return Load(counts, probabilities, jnp.float32(flips), choices / (2 * len(counts)), choices)


def test_load_and_balancing_loss_by_hand():
    """Eight tokens, k = 2, four experts: an even load has loss 1; all at two experts that are sure has loss 2."""
    even = load([[4, 4, 4, 4]], [[2, 2, 2, 2]])
    np.testing.assert_allclose(balancing_loss(even), 1.0)
    uneven = load([[8, 8, 0, 0]], [[4, 4, 0, 0]], flips=4.0)
    np.testing.assert_allclose(balancing_loss(uneven), 4 * (0.5 * 0.5 + 0.5 * 0.5))
    gradient = jax.grad(lambda p: balancing_loss(uneven._replace(probabilities=p)))(uneven.probabilities)
    np.testing.assert_allclose(gradient, [[0.25, 0.25, 0, 0]])
    sums = [load_sums(x, replayed=True) for x in (uneven, even)]
    metrics = expert_metrics(jax.tree.map(lambda *x: jnp.stack(x), *sums))
    assert {name: round(float(value), 5) for name, value in metrics.items()} == {
        "expert_load_max": 1.5,  # 12 of 32 choices, where the mean is 8
        "expert_entropy": round(-2 * (3 / 8 * np.log(3 / 8) + 1 / 8 * np.log(1 / 8)), 5),
        "expert_dropped": 0.0,
        "parity_flips": 0.25,  # 4 of 16 choices in the first optimizer step
    }
    assert "parity_flips" not in expert_metrics(jax.tree.map(lambda x: x[None], load_sums(even, replayed=False)))


def test_sizes_of_the_published_models():
    """Billions of parameters, all and active, as their names say."""
    known = {"qwen3-30b-a3b": (30.5, 3.3), "qwen3-235b-a22b": (235.1, 22.2), "mixtral-8x7b": (46.7, 12.9)}
    for name, (total, active) in known.items():
        config = CONFIGS[name]
        sizes = config.num_parameters / 1e9, config.num_active_parameters / 1e9
        assert tuple(round(size, 1) for size in sizes) == pytest.approx((total, active), abs=0.11), name
    assert CONFIGS["tiny"].num_active_parameters == CONFIGS["tiny"].num_parameters


def test_impossible_mixtures_are_refused():
    with pytest.raises(ValueError, match="expected 1 <= experts_per_token <= num_experts, got 3 and 2"):
        Mixture(2, 3)
    with pytest.raises(ValueError, match=r"expected names to be one of \('qwen', 'mixtral'\), got 'olmoe'"):
        Mixture(2, 1, names="olmoe")  # pyright: ignore
    assert (Mixture(256, 8).record_dtype, Mixture(257, 8).record_dtype) == ("uint8", "int16")
