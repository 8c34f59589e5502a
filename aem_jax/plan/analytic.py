"""Closed forms: FLOPs, bytes and collectives of a step from its sizes alone.

They check the costs of compiled programs, replace them where there is no compiler, and choose the mesh. N is the number
of parameters of matrix products: all but norms, biases, and the embedding of an untied head.
"""

from dataclasses import dataclass

from aem_jax.learner.head import LOGIT_BYTES
from aem_jax.models import ModelConfig
from aem_jax.models.attention import BLOCK
from aem_jax.models.kernels import KERNELS
from aem_jax.models.parameters import layer_matrices
from aem_jax.plan.costs import Collective, Costs
from aem_jax.plan.workload import Workload
from aem_jax.sampler.sampling import SAMPLING_BLOCK
from aem_jax.sharding import MeshConfig, MeshDemand

MASTER, GRADIENT = 4, 8
"""Bytes of a trained parameter: the float32 master; the sum of gradients and the next gradient."""


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of all layers' matrix products."""
    return sum(row.size for row in layer_matrices(model))


def head_parameters(model: ModelConfig) -> int:
    """Parameters of the head's product."""
    return model.vocab_size * model.hidden_size


def attention_flops(model: ModelConfig, tokens: float) -> float:
    """FLOPs of one token's attention to `tokens` others, forward: 4·L·H·Dh·tokens; with a sliding window, of fewer."""
    attended = sum(min(window or tokens, tokens) for window in model.windows)
    return 4.0 * model.num_heads * model.head_dim * attended


def useful_flops(work: Workload) -> float:
    """FLOPs of learning one token without recomputation, for MFU: 6·N + 6·L·H·Dh·T.

    A token attends to half of its row on average, as if every row had one segment. Frozen weights have no gradient:
    4·N.
    """
    return token_flops(work.model, work.layout.row_length, 4.0 if work.lora.rank else 6.0)


def token_flops(model: ModelConfig, row_length: int, of_matrices: float = 6.0) -> float:
    """`useful_flops` of a model, with `of_matrices` FLOPs for each parameter of a matrix product."""
    matrices = layer_parameters(model) + head_parameters(model)
    return of_matrices * matrices + 3.0 * attention_flops(model, row_length / 2)


def learn_flops(work: Workload, block: int = BLOCK, kernel: str = "xla") -> float:
    """FLOPs of learning one token as implemented: attention by blocks of queries, and recomputation.

    Attention's scores are always recomputed, and layers according to remat. A ratio of responses computes the head once
    more, a ratio of trajectories the complete forward pass.

    Args:
        work: the run's sizes.
        block: queries of a block of attention.
        kernel: of `models.kernels`, which has the cost of attention's backward pass.
    """
    length = work.layout.row_length
    ends = [min(start + block, length) for start in range(0, length, block)]
    seen = sum((end - start) * end for start, end in zip(range(0, length, block), ends)) / length
    matrices, attention = 2.0 * layer_parameters(work.model), attention_flops(work.model, seen)
    # the backward pass does not need a layer's last product, so it is not recomputed
    last = 2.0 * work.model.num_layers * work.model.hidden_size * work.model.intermediate_size
    recomputed = {"none": 0.0, "layers": matrices - last + attention, "dots": attention}[work.remat]
    head = 2.0 * head_parameters(work.model)
    backward = KERNELS[kernel].backward
    if kernel == "xla" and work.remat != "none":
        backward -= 0.5  # a recomputed layer has its scores already
    ratio = {"token": 0.0, "response": head, "trajectory": matrices + attention + head}[work.ratio]
    total = 3.0 * matrices + (1.0 + backward) * attention + recomputed + 3.0 * head + ratio
    return total - (matrices + head) * (work.lora.rank > 0)  # frozen weights have no gradient


def decode_flops(work: Workload) -> float:
    """FLOPs of decoding one token over a full window: 2·N + 4·L·H·Dh·(window + chunk)."""
    matrices = layer_parameters(work.model) + head_parameters(work.model)
    return 2.0 * matrices + attention_flops(work.model, work.capacity + work.decode_chunk)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, by content.

    Attributes:
        parameters: float32 masters of trained parameters.
        frozen: weights beside an adapter, in the learner's layout.
        optimizer: Adam's moments.
        reference: the reference policy, if there is one.
        gradients: float32, while learning.
        weights: of the sampler, unless they share other buffers; they stay during learning.
        cache: keys and values of all slots and prompts.
        working: activations while learning (an estimate).
    """

    parameters: float
    frozen: float
    optimizer: float
    reference: float
    gradients: float
    weights: float
    cache: float
    working: float

    @property
    def resident(self) -> float:
        """Bytes that are always in use."""
        return self.parameters + self.frozen + self.optimizer + self.reference + self.weights + self.cache

    @property
    def total(self) -> float:
        """The maximum, which is during learning."""
        return self.resident + self.gradients + self.working


def memory(work: Workload, mesh: MeshConfig) -> Memory:
    """Bytes of each device on a mesh without open sizes."""
    model, devices = work.model, mesh.data * mesh.fsdp * mesh.tensor
    split, count, trained = mesh.fsdp * mesh.tensor, model.num_parameters, work.trained
    width, lora = _width(model), work.lora.rank > 0
    copied = count
    if lora and mesh.fsdp == 1:  # frozen weights have the same layout for learning and sampling
        copied = layer_parameters(model) if work.lora.merge else 0
    saved = (width - 1) * layer_parameters(model) if work.int8 else 0  # without the scales, a thousandth of the codes
    return Memory(
        parameters=MASTER * trained / split,
        frozen=width * count * lora / split,
        optimizer=work.moments * trained / split,
        reference=MASTER * work.reference * trained / split,
        gradients=GRADIENT * trained / split,
        weights=(width * copied - saved) / mesh.tensor,
        cache=work.all_cache_bytes / devices,
        working=_working(work, mesh, width) / (mesh.data * mesh.fsdp),
    )


def _working(work: Workload, mesh: MeshConfig, width: int) -> float:
    """Activations of one microbatch: those that layers keep, one recomputed layer, the logits of one chunk."""
    model, tokens, tensor = work.model, work.microbatch_tokens, mesh.tensor
    heads, inner = model.num_heads / tensor * model.head_dim, model.intermediate_size / tensor
    block = min(BLOCK, work.layout.row_length)
    scores = work.layout.rows * block * model.num_heads / tensor * work.layout.row_length * (4 + width)
    layer = tokens * width * (6 * model.hidden_size + 4 * inner + 6 * heads)
    products = tokens * width * (2 * model.hidden_size + 2 * inner + 2 * heads)
    kept = {"layers": tokens * model.hidden_size * width, "dots": products, "none": layer}[work.remat]
    logits = 4 * work.layout.rows * min(work.head_chunk, work.layout.row_length) * model.vocab_size / tensor
    logits = 3 * min(logits, LOGIT_BYTES * mesh.data * mesh.fsdp)
    return model.num_layers * kept + 2 * scores + layer + logits


def demand(work: Workload) -> MeshDemand:
    """The memory and the sizes that a mesh has to hold."""
    one = memory(work, MeshConfig(1, 1, 1))
    model = work.model
    return MeshDemand(
        state=one.parameters + one.frozen + one.optimizer + one.reference + one.gradients,
        weights=one.weights,
        slots_bytes=one.cache + one.working,
        rows=work.layout.rows,
        slots=work.slots,
        embed=model.hidden_size,
        split=(model.num_kv_heads, model.intermediate_size, model.vocab_size),
    )


def update_floor(work: Workload, mesh: MeshConfig) -> float:
    """Bytes that an optimizer step of `work.rounds` full microbatches moves on one device, at least.

    Each matrix product and each call of attention reads its inputs once and writes its outputs once, and everything
    else (norms, activations, masks, scores, casts) is fused into them. A microbatch of t tokens, in w bytes each, on
    one of τ tensor shards, moves:

    - weights: w·N/τ for the forward pass, for a recomputed one (remat layers), and for the gradient of the inputs;
      twice if they are gathered over fsdp, since a gather writes what a product reads;
    - activations: t·w·(inputs + outputs) of all products, once forward and twice backward (the gradients of the inputs
      and of the weights); once more if they are recomputed; logits in float32;
    - gradients: w·N/τ written by the products and read by the sum over devices; the sum's shard is read and written in
      float32, and the shard of the masters is read.

    The step then reads the gradients for their norm, and reads or writes masters, gradients and moments once. Frozen
    weights (LoRA) have no gradient; adapters' own products are left out. It is a floor for these products: a kernel
    that computes a loss from hidden states without logits in memory would go below it.
    """
    model, replicas, tensor = work.model, mesh.data * mesh.fsdp, mesh.tensor
    width, split, trained = _width(model), mesh.fsdp * tensor, work.trained
    tokens, frozen = work.microbatch_tokens / replicas, work.lora.rank > 0
    heads, keys = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    attention = (2 * heads + keys) / tensor
    products = 4 * model.hidden_size + (2 * heads + keys + 3 * model.intermediate_size) / tensor
    head = width * model.hidden_size + 4 * model.vocab_size / tensor
    backward = 1 if frozen else 2
    again = {"none": (0, 0), "layers": (1, 1), "dots": (0, 1)}[work.remat]  # products, attention
    extra = {"token": (0, 0), "response": (0, 1), "trajectory": (1, 1)}[work.ratio]  # layers, head
    passes = 2 + again[0] + extra[0]
    activations = (
        width
        * model.num_layers
        * ((1 + backward + again[0] + extra[0]) * products + (3 + again[1] + extra[0]) * attention)
        + (1 + backward + extra[1]) * head
    )
    weights = passes * width * _used_parameters(model) / tensor * (2 if mesh.fsdp > 1 else 1)
    gradients = 2 * width * trained / tensor + (MASTER + GRADIENT) * trained / split
    return work.rounds * (tokens * activations + weights + gradients) + (16 + 2 * work.moments) * trained / split


def decode_floor(work: Workload, mesh: MeshConfig) -> float:
    """Bytes that one device reads for one token in each slot, at least: its weights and its cache in use.

    The plan's cache is full, `work.capacity` tokens a slot. Of an untied embedding only the sampled rows are read, and
    are left out, as are activations and logits.
    """
    model, width = work.model, _width(work.model)
    saved = (width - 1) * layer_parameters(model) if work.int8 else 0
    slots = work.slots / (mesh.data * mesh.fsdp)
    weights = (width * _used_parameters(model) - saved) / mesh.tensor
    return weights + slots * work.read_bytes / mesh.tensor


def _width(model: ModelConfig) -> int:
    return 2 if model.dtype == "bfloat16" else 4


def _used_parameters(model: ModelConfig) -> int:
    """All parameters but the embedding of an untied head."""
    return model.num_parameters - (0 if model.tied_head else head_parameters(model))


def learn_costs(work: Workload, mesh: MeshConfig, flops: float) -> Costs:
    """Costs on one device of an optimizer step of `work.rounds` full microbatches; `flops` are those of one token."""
    model, width = work.model, _width(work.model)
    replicas, tensor = mesh.data * mesh.fsdp, mesh.tensor
    tokens = work.microbatch_tokens / replicas
    count, trained, split = model.num_parameters, work.trained, mesh.fsdp * tensor
    passes = 3 if work.remat == "layers" else 2
    costs = Costs(flops=work.rounds * flops * tokens / tensor, bytes=update_floor(work, mesh))
    activation, layers = tokens * model.hidden_size * width, model.num_layers
    for kind, size, group, apart, times in (
        ("all-gather", width * count / tensor, mesh.fsdp, tensor, passes),
        ("reduce-scatter", width * trained / tensor, mesh.fsdp, tensor, 1),
        ("all-reduce", width * trained / split, mesh.data, split, 1),
        ("all-reduce", activation, tensor, 1, 2 * passes * layers),
    ):
        if group > 1:  # the first group; the mesh's last axis has neighbours
            members = tuple(range(0, group * apart, apart))
            costs.collectives.append(Collective(kind, size, group, members, work.rounds * times))
    return costs


def decode_costs(work: Workload, mesh: MeshConfig) -> Costs:
    """Costs on one device of one token in each slot, over a full window."""
    model, width, tensor = work.model, _width(work.model), mesh.tensor
    slots = work.slots / (mesh.data * mesh.fsdp)
    costs = Costs(flops=slots * decode_flops(work) / tensor, bytes=decode_floor(work, mesh))
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
