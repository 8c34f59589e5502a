"""The learner's settings."""

from dataclasses import dataclass
from typing import Literal

from aem_jax.models.config import dtype_name


@dataclass(frozen=True)
class LearnerConfig:
    """Settings of an update: the optimizer, the losses, and the sizes of the computation."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant, or linear or cosine decay to 0 at total_steps."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly."""
    total_steps: int = 0
    """Optimizer steps (rollout steps × epochs × minibatches) at which a decaying schedule reaches 0."""
    beta1: float = 0.9
    """AdamW: decay rate of the first moment."""
    beta2: float = 0.95
    """AdamW: decay rate of the second moment."""
    adam_eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: float = 0.0
    """AdamW: decoupled weight decay of matrices, not of norm scales and biases."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """AdamW: dtype in which both moments are stored. A parameter and its moments take 12 bytes in float32, 8 in
    bfloat16, in which second moments are rounded stochastically."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""

    ratio: Literal["token", "response", "trajectory"] = "token"
    """The unit of the clipped probability ratio: a token, or (GSPO) a response or a trajectory, with the geometric mean
    over its tokens. response computes the head of sampled tokens once more; trajectory costs one more forward pass for
    each optimizer step."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float = 0.0
    """PPO's dual clip: bound on the ratio for negative advantages; 3 is usual, 0 disables."""
    importance_cap: float = 0.0
    """Truncated importance sampling, for a sampler whose policy differs from the learner's (--sampling.weights int8,
    --sampling.cache int8) or is an earlier one (--rollout.carry-min-groups): each token's loss is weighted by
    min(learner's probability / sampler's, cap), and the clipped ratio is to the learner's own policy before the update.
    With several optimizer steps a batch it costs another forward pass. 2 is usual, 0 disables."""
    kl_coefficient: float = 0.0
    """Weight of the KL to the reference policy (k3 estimator); 0 keeps no reference policy in memory."""
    balance_coefficient: float = 0.0
    """Mixtures of experts: weight of the balancing loss; 0 disables."""
    routing_replay: bool = True
    """Mixtures of experts: each token goes to the experts that the sampler routed it to. False: to those of the
    learner's own router, which rounding makes differ at some tokens."""
    entropy_coefficient: float = 0.0
    """Weight of an entropy bonus: the mean entropy of tokens; 0 disables."""
    covariance: Literal["off", "clip", "kl"] = "off"
    """Entropy control at tokens whose log-probability and advantage covary: clip (Clip-Cov) leaves some out of the
    loss, kl (KL-Cov) penalises their change."""
    covariance_share: float = 2e-4
    """Share of a batch's tokens that are selected, at least one; 2e-3 is also usual for kl."""
    covariance_range: tuple[float, float] = (1.0, 5.0)
    """clip: tokens are drawn from those with a covariance between these, in units of the advantage times nats."""
    covariance_penalty: float = 1.0
    """kl: weight of the absolute change of log-probability since the first optimizer step on a batch; it takes several
    steps a batch, and another forward pass."""
    value_coefficient: float = 0.5
    """Value head (algorithm.estimator gae): weight of its loss."""
    value_clip: float = 0.5
    """Value head: PPO's clip on the change of a value between the optimizer steps of one batch, in units of reward. No
    effect with one optimizer step a batch; 0 disables."""
    value_learning_rate: float = 5e-3
    """Value head: peak learning rate, on the policy's schedule."""
    value_gradient: Literal["head", "all"] = "head"
    """Value head: parameters that its loss trains, either the head alone (head) or also the policy's weights (all).
    With all, their gradient depends on the size of rewards."""
    aggregation: Literal["token-mean", "trajectory-mean", "response-mean", "constant"] = "token-mean"
    """Average in the loss: over tokens, trajectories or responses, or sums divided by a constant length."""
    constant_length: int = 0
    """aggregation constant: divisor of each trajectory's sum; 0 uses the token budget of an episode's responses."""

    temperature: float = 1.0
    """Divides the logits; must equal the sampler's temperature."""
    head_chunk: int = 128
    """Positions of each row whose logits are in memory at one time. Each chunk reads the head's weights, and reads and
    writes their gradient: on accelerators, a chunk of fewer positions (of all rows of a device) than the hidden size
    mostly moves weights."""
    remat: Literal["none", "layers", "dots"] = "none"
    """Rematerialisation in the backward pass: nothing, whole layers, or everything but matrix products."""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Attention kernel: auto selects splash on TPUs, cudnn on GPUs, and xla elsewhere or where a kernel does not
    support the shapes (logged once)."""
    num_minibatches: int = 1
    """Optimizer steps of a batch and epoch, each on its share of the trajectories."""
    num_epochs: int = 1
    """Passes over each batch."""

    def __post_init__(self):
        object.__setattr__(self, "moments", dtype_name(self.moments, ("float32", "bfloat16"), "moments"))
        _positive(self, "learning_rate", "adam_eps", "max_grad_norm", "temperature", "head_chunk")
        _positive(self, "num_minibatches", "num_epochs", "value_learning_rate")
        if not 0 <= self.clip_low <= 1 or not self.clip_high >= 0:
            raise ValueError(f"expected clip_low in [0, 1] and clip_high ≥ 0, got {self.clip_low} and {self.clip_high}")
        if self.importance_cap and not self.importance_cap >= 1:
            raise ValueError(f"expected importance_cap of 0 (off) or at least 1, got {self.importance_cap}")
        if self.importance_cap and self.ratio != "token":
            raise ValueError(
                f"expected importance_cap 0 with ratio {self.ratio}, got {self.importance_cap}: the cap weights single "
                "tokens, and a sequence has one ratio; set ratio to token, or importance_cap to 0"
            )
        if self.dual_clip and not self.dual_clip > 1:
            raise ValueError(f"expected dual_clip of 0 (off) or above 1, got {self.dual_clip}")
        for name in (
            "constant_length",
            "warmup_steps",
            "total_steps",
            "weight_decay",
            "kl_coefficient",
            "balance_coefficient",
            "entropy_coefficient",
            "covariance_penalty",
            "value_coefficient",
            "value_clip",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} ≥ 0, got {getattr(self, name)}")
        if not 0 < self.covariance_share <= 1:
            raise ValueError(f"expected covariance_share in (0, 1], got {self.covariance_share}")
        if self.covariance == "kl" and self.num_minibatches * self.num_epochs == 1:
            raise ValueError(
                "expected several optimizer steps a batch with covariance kl, which penalises changes between them, "
                "got one; raise num_minibatches or num_epochs, or use clip"
            )
        if not self.covariance_range[0] < self.covariance_range[1]:
            raise ValueError(f"expected covariance_range of a lower and a higher number, got {self.covariance_range}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected {name} in [0, 1), got {getattr(self, name)}")
        if self.schedule != "constant" and self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"expected total_steps above warmup_steps = {self.warmup_steps} for schedule {self.schedule!r}, "
                f"got {self.total_steps}; set it to the run's number of optimizer steps"
            )


def _positive(config: LearnerConfig, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"expected {name} > 0, got {getattr(config, name)}")
