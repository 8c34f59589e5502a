"""Closed forms of one run of a program: the bytes that it moves at least, and its costs without a compiler."""

from aem_jax.models import ModelConfig
from aem_jax.plan.analytic import (
    GRADIENT,
    MASTER,
    active_share,
    copies,
    decode_flops,
    expert_parameters,
    head_parameters,
    layer_parameters,
    recomputed,
    weight_bytes,
)
from aem_jax.plan.costs import Collective, Costs
from aem_jax.plan.workload import Workload
from aem_jax.sampler.sampling import SAMPLING_BLOCK
from aem_jax.sharding import MeshConfig


def update_floor(work: Workload, mesh: MeshConfig) -> float:
    """Bytes that an optimizer step of `work.rounds` full microbatches moves on one device, at least.

    Each matrix product and each call of attention reads its inputs once and writes its outputs once, and everything
    else (norms, activations, masks, scores, casts) is fused into them. A microbatch of t tokens, in w bytes each, on
    one of τ tensor shards, moves:

    - weights: w·N/τ for the forward pass, for a recomputed one (`recomputed`), and for the gradient of the inputs;
      twice if they are gathered over fsdp, since a gather writes what a product reads;
    - activations: t·w·(inputs + outputs) of all products, once forward and twice backward (the gradients of the inputs
      and of the weights); once more if they are recomputed; logits in float32;
    - gradients: w·N/τ written by the products and read by the sum over devices; the sum's shard is read and written in
      float32, and the shard of the masters is read.

    The step then reads the gradients for their norm, and reads or writes masters, gradients and moments once. Frozen
    weights (LoRA) have no gradient; adapters' own products are left out. Of a mixture every expert has tokens. It is a
    floor for these products: a kernel that computes a loss from hidden states without logits in memory would go below
    it.
    """
    model, replicas, tensor = work.model, mesh.data * mesh.fsdp * mesh.expert, mesh.tensor
    width, split, trained = weight_bytes(model), mesh.fsdp * mesh.expert * tensor, work.trained
    tokens, frozen = work.microbatch_tokens / replicas, work.lora.rank > 0
    heads, keys = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    attention = (2 * heads + keys) / tensor
    dense = 2 * model.hidden_size + (2 * heads + keys) / tensor
    mlp = copies(model) * (2 * model.hidden_size + 3 * model.intermediate_size / tensor)
    head = width * model.hidden_size + 4 * model.vocab_size / tensor
    backward = 1 if frozen else 2
    again = recomputed(work, mesh.expert)
    again_mlp = again.experts if model.mixture else again.dense
    extra = {"token": (0, 0), "response": (0, 1), "trajectory": (1, 1)}[work.ratio]  # layers, head
    activations = (
        width
        * model.num_layers
        * (
            (1 + backward + again.dense + extra[0]) * dense
            + (1 + backward + again_mlp + extra[0]) * mlp
            + (3 + again.attention + extra[0]) * attention
        )
        + (1 + backward + extra[1]) * head
    )
    # A device of an expert axis has some experts only; all its other weights are gathered.
    elsewhere = expert_parameters(model) * (1 - 1 / mesh.expert)
    own_experts = expert_parameters(model) - elsewhere
    rest = _used_parameters(model) - expert_parameters(model)
    read = (2 + again.dense + extra[0]) * rest + (2 + again_mlp + extra[0]) * own_experts
    weights = width * read / tensor * (2 if mesh.fsdp * mesh.expert > 1 else 1)
    gradients = 2 * width * (trained - elsewhere * (not frozen)) / tensor + (MASTER + GRADIENT) * trained / split
    return work.rounds * (tokens * activations + weights + gradients) + (16 + 2 * work.moments) * trained / split


def decode_floor(work: Workload, mesh: MeshConfig) -> float:
    """Bytes that one device reads for one token in each slot, at least: its weights and its cache in use.

    The plan's cache is full, `work.capacity` tokens a slot. Of an untied embedding only the sampled rows are read, and
    are left out, as are activations and logits. Of a mixture those experts are read that have a token, if all are
    equally likely.
    """
    model, width = work.model, weight_bytes(work.model)
    saved = (width - 1) * layer_parameters(model) if work.int8 else 0
    slots = work.slots / (mesh.data * mesh.fsdp * mesh.expert)
    experts = (1 if work.int8 else width) * expert_parameters(model)
    read = 1 - (1 - active_share(model)) ** (slots * mesh.expert)
    weights = (width * _used_parameters(model) - saved - experts * (1 - read / mesh.expert)) / mesh.tensor
    return weights + slots * work.read_bytes / mesh.tensor


def _used_parameters(model: ModelConfig) -> int:
    """All parameters but the embedding of an untied head."""
    return model.num_parameters - (0 if model.tied_head else head_parameters(model))


def learn_costs(work: Workload, mesh: MeshConfig, flops: float) -> Costs:
    """Costs on one device of an optimizer step of `work.rounds` full microbatches; `flops` are those of one token."""
    model, width = work.model, weight_bytes(work.model)
    gathered, tensor = mesh.fsdp * mesh.expert, mesh.tensor
    tokens = work.microbatch_tokens / (mesh.data * gathered)
    experts, trained, split = expert_parameters(model), work.trained, gathered * tensor
    count, of_experts = model.num_parameters - experts, experts * (not work.lora.rank)
    again = recomputed(work, mesh.expert)
    passes, of_expert = 2 + again.dense, 2 + again.experts
    costs = Costs(flops=work.rounds * flops * tokens / tensor, bytes=update_floor(work, mesh))
    activation, layers = tokens * model.hidden_size * width, model.num_layers
    shard = width / (tensor * mesh.expert)
    for kind, size, group, apart, times in (
        ("all-gather", width * count / tensor, gathered, tensor, passes),
        ("all-gather", shard * experts, mesh.fsdp, mesh.expert * tensor, of_expert),
        ("reduce-scatter", width * (trained - of_experts) / tensor, gathered, tensor, 1),
        ("reduce-scatter", shard * of_experts, mesh.fsdp, mesh.expert * tensor, 1),
        ("all-reduce", width * trained / split, mesh.data, split, 1),
        ("all-reduce", activation, tensor, 1, 2 * passes * layers),
        ("all-to-all", activation * copies(model), mesh.expert, tensor, 2 * of_expert * layers),
    ):
        if group > 1 and size:  # the first group; the mesh's last axis has neighbours
            members = tuple(range(0, group * apart, apart))
            costs.collectives.append(Collective(kind, size, group, members, work.rounds * times))
    return costs


def decode_costs(work: Workload, mesh: MeshConfig) -> Costs:
    """Costs on one device of one token in each slot, over a full window."""
    model, width, tensor = work.model, weight_bytes(work.model), mesh.tensor
    slots = work.slots / (mesh.data * mesh.fsdp * mesh.expert)
    costs = Costs(flops=slots * decode_flops(work) / tensor, bytes=decode_floor(work, mesh))
    if mesh.expert > 1:
        sent = slots * copies(model) * model.hidden_size * width
        costs.collectives.append(Collective("all-to-all", sent, mesh.expert, (), 2.0 * model.num_layers))
    if tensor > 1:
        reductions = slots * model.hidden_size * width
        costs.collectives.append(Collective("all-reduce", reductions, tensor, (), 2.0 * model.num_layers))
        # Sampling draws a block of the vocabulary by its mass, then a token in it: it gathers the masses, and the block
        # is summed over devices, of which one has it and the others zeros.
        costs.collectives.append(
            Collective("all-gather", 4.0 * slots * model.vocab_size / SAMPLING_BLOCK, tensor, (), 1.0)
        )
        costs.collectives.append(Collective("all-reduce", 4.0 * slots * SAMPLING_BLOCK, tensor, (), 1.0))
    return costs
