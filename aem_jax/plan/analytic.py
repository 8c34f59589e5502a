"""Closed forms: FLOPs and memory of a step from its sizes alone.

They check the costs of compiled programs, and choose the mesh. N is the number
of parameters of matrix products: all but norms, biases, and the embedding of an untied head.
"""

from dataclasses import dataclass

from aem_jax.learner.head import LOGIT_BYTES
from aem_jax.models import ModelConfig
from aem_jax.models.attention import BLOCK
from aem_jax.models.exchange import MEAN_LOADS
from aem_jax.models.kernels import KERNELS
from aem_jax.models.parameters import layer_matrices
from aem_jax.plan.workload import Workload
from aem_jax.sharding import MeshConfig, MeshDemand

MASTER, GRADIENT = 4, 8
"""Bytes of a trained parameter: the float32 master; the sum of gradients and the next gradient."""


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of all layers' matrix products."""
    return sum(row.size for row in layer_matrices(model))


def expert_parameters(model: ModelConfig) -> int:
    """Parameters of all experts."""
    return sum(row.size for row in layer_matrices(model) if row.has_experts)


def active_layer_parameters(model: ModelConfig) -> float:
    """Parameters of all layers' matrix products that one token uses."""
    return layer_parameters(model) - expert_parameters(model) * (1 - active_share(model))


def active_share(model: ModelConfig) -> float:
    return model.mixture.experts_per_token / model.mixture.num_experts if model.mixture else 1.0


def copies(model: ModelConfig) -> int:
    """Experts of a token; 1 for an MLP."""
    return model.mixture.experts_per_token if model.mixture else 1


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
    matrices = active_layer_parameters(model) + head_parameters(model)
    return of_matrices * matrices + 3.0 * attention_flops(model, row_length / 2)


@dataclass(frozen=True)
class Recomputed:
    """What the backward pass computes once more, each 0 or 1.

    Attributes:
        dense: matrix products outside of experts.
        experts: those of experts, and the exchange of tokens before them.
        attention: attention.
    """

    dense: int
    experts: int
    attention: int


def recomputed(work: Workload, expert: int) -> Recomputed:
    """What remat recomputes, with an expert axis of this size: buffers of an exchange are never kept."""
    layers, kept = work.remat == "layers", work.remat == "none"
    return Recomputed(int(layers), int(layers or (not kept and expert > 1)), int(not kept))


def learn_flops(work: Workload, block: int = BLOCK, kernel: str = "xla", expert: int = 1) -> float:
    """FLOPs of learning one token as implemented: attention by blocks of queries, and recomputation.

    Attention's scores are always recomputed, and layers according to remat. A ratio of responses computes the head once
    more, a ratio of trajectories the complete forward pass.

    Args:
        work: the run's sizes.
        block: queries of a block of attention.
        kernel: of `models.kernels`, which has the cost of attention's backward pass.
        expert: size of the mesh's expert axis.
    """
    length = work.layout.row_length
    ends = [min(start + block, length) for start in range(0, length, block)]
    seen = sum((end - start) * end for start, end in zip(range(0, length, block), ends)) / length
    matrices, attention = 2.0 * active_layer_parameters(work.model), attention_flops(work.model, seen)
    # The backward pass does not need a layer's last product, so it is not recomputed. It needs the experts' outputs.
    experts, again = 2.0 * expert_parameters(work.model) * active_share(work.model), recomputed(work, expert)
    last = 2.0 * work.model.num_layers * work.model.hidden_size * work.model.intermediate_size
    last *= work.model.mixture is None
    more = again.dense * (matrices - experts - last) + again.experts * experts + again.attention * attention
    head = 2.0 * head_parameters(work.model)
    backward = KERNELS[kernel].backward
    if kernel == "xla" and work.remat != "none":
        backward -= 0.5  # a recomputed layer has its scores already
    ratio = {"token": 0.0, "response": head, "trajectory": matrices + attention + head}[work.ratio]
    total = 3.0 * matrices + (1.0 + backward) * attention + more + 3.0 * head + ratio
    return total - (matrices + head) * (work.lora.rank > 0)  # frozen weights have no gradient


def decode_flops(work: Workload) -> float:
    """FLOPs of decoding one token over a full window: 2·N + 4·L·H·Dh·(window + chunk)."""
    matrices = active_layer_parameters(work.model) + head_parameters(work.model)
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
        weights: of the sampler, while sampling; 0 if they share the buffers of the frozen weights.
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
        return self.parameters + self.frozen + self.optimizer + self.reference + self.cache

    @property
    def sampling(self) -> float:
        """Bytes in use while sampling."""
        return self.resident + self.weights

    @property
    def learning(self) -> float:
        """Bytes in use while learning; the loop keeps no reference to the sampler's weights, so they are freed."""
        return self.resident + self.gradients + self.working

    @property
    def total(self) -> float:
        """The maximum."""
        return max(self.sampling, self.learning)


def memory(work: Workload, mesh: MeshConfig) -> Memory:
    """Bytes of each device on a mesh without open sizes."""
    model, replicas = work.model, mesh.data * mesh.fsdp * mesh.expert
    split, count, trained = mesh.fsdp * mesh.expert * mesh.tensor, model.num_parameters, work.trained
    width, lora = weight_bytes(model), work.lora.rank > 0
    copied = count
    if lora and mesh.fsdp * mesh.expert == 1:  # frozen weights have the same layout for learning and sampling
        copied = layer_parameters(model) if work.lora.merge else 0
    saved = (width - 1) * layer_parameters(model) if work.int8 else 0  # without the scales, a thousandth of the codes
    experts = (1 if work.int8 else width) * expert_parameters(model) * (copied > 0)
    return Memory(
        parameters=MASTER * trained / split,
        frozen=width * count * lora / split,
        optimizer=work.moments * trained / split,
        reference=MASTER * work.reference * trained / split,
        gradients=GRADIENT * trained / split,
        weights=(width * copied - saved - experts) / mesh.tensor + experts / (mesh.expert * mesh.tensor),
        cache=work.all_cache_bytes / (replicas * mesh.tensor),
        working=(_working(work, mesh, width) + min(mesh.expert, MEAN_LOADS) * exchange(work, mesh.tensor)) / replicas,
    )


def exchange(work: Workload, tensor: int) -> float:
    """Bytes of a microbatch's tokens at their experts, in one layer; 0 without experts.

    With an expert axis every device has room for up to `MEAN_LOADS` times as many.
    """
    model = work.model
    if model.mixture is None:
        return 0.0
    row = 4 * model.hidden_size + 4 * model.intermediate_size / tensor
    return work.microbatch_tokens * model.mixture.experts_per_token * weight_bytes(model) * row


def _working(work: Workload, mesh: MeshConfig, width: int) -> float:
    """Activations of one microbatch: those that layers keep, one recomputed layer, the logits of one chunk."""
    model, tokens, tensor = work.model, work.microbatch_tokens, mesh.tensor
    heads, inner = model.num_heads / tensor * model.head_dim, model.intermediate_size / tensor * copies(model)
    block = min(BLOCK, work.layout.row_length)
    scores = work.layout.rows * block * model.num_heads / tensor * work.layout.row_length * (4 + width)
    layer = tokens * width * (6 * model.hidden_size + 4 * inner + 6 * heads)
    products = tokens * width * (model.hidden_size + 2 * heads)
    if model.mixture is None or mesh.expert == 1:
        products += tokens * width * (copies(model) * model.hidden_size + 2 * inner)
    kept = {"layers": tokens * model.hidden_size * width, "dots": products, "none": layer}[work.remat]
    logits = 4 * work.layout.rows * min(work.head_chunk, work.layout.row_length) * model.vocab_size / tensor
    logits = 3 * min(logits, LOGIT_BYTES * mesh.data * mesh.fsdp * mesh.expert)
    return model.num_layers * kept + 2 * scores + layer + logits


_ACTIVATIONS = 1.2
"""Memory of the compiled programs of sampling, at most, relative to `Memory.sampling`, which has no activations: 1.00
to 1.19 in the rows of docs/plan.md."""


def _with_activations(memory: Memory) -> float:
    return max(_ACTIVATIONS * memory.sampling, memory.learning)


def demand(work: Workload) -> MeshDemand:
    """The memory that a run needs on a mesh, and the sizes that the mesh must divide."""
    model = work.model
    return MeshDemand(
        bytes_of=lambda mesh: _with_activations(memory(work, mesh)),
        rows=work.layout.rows,
        slots=work.slots,
        embed=model.hidden_size,
        split=(model.num_kv_heads, model.intermediate_size, model.vocab_size),
        experts=model.mixture.num_experts if model.mixture else 1,
    )


def weight_bytes(model: ModelConfig) -> int:
    """Bytes of a weight as used."""
    return 2 if model.dtype == "bfloat16" else 4
