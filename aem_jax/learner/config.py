"""What the learner can be told."""

from dataclasses import dataclass
from typing import Literal

from aem_jax.models.config import dtype_name


@dataclass(frozen=True)
class LearnerConfig:
    """One update: the optimizer, the policy loss, and how much is computed at a time."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: stay, or fall to 0 at total_steps along a line or half a cosine."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0."""
    total_steps: int = 0
    """Optimizer steps (rollout steps × epochs × minibatches) at which a falling schedule reaches 0."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW: decay of the mean of squared gradients."""
    adam_eps: float = 1e-8
    """AdamW: added to the root of the mean of squared gradients."""
    weight_decay: float = 0.0
    """AdamW: decoupled decay of matrices (norm scales are left alone)."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """AdamW: how both means are kept between steps: float32, bfloat16, or int8 (gradients' mean in bfloat16, that of
    their squares in 8 bits with a scale for each row). A parameter and its means take 12, 8 or 7 bytes."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    ratio: Literal["token", "response", "trajectory"] = "token"
    """What is compared with the policy that sampled, and clipped: each token, or (GSPO) the geometric mean over a
    response or over all that a trajectory says. response computes the head of sampled tokens once more, trajectory
    takes one more forward pass for each optimizer step."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float = 0.0
    """What is bad counts at most this many times, however likely it became (PPO's dual clip; 3 is usual); 0: off."""
    importance_cap: float = 0.0
    """Corrects for a sampler whose policy differs from the learner's (--sampling.weights int8, --sampling.cache int8):
    each token's loss is weighted by min(learner's probability / sampler's, cap), 2 is usual, and the clipped ratio is
    then to the learner's own policy before the update. With several optimizer steps a batch that takes another forward
    pass. 0: off."""
    kl_coefficient: float = 0.0
    """Weight of the KL to the reference policy (k3 estimator); 0 holds no reference at all."""
    value_coefficient: float = 0.5
    """With a value head (algorithm.estimator gae): weight of its loss."""
    value_clip: float = 0.5
    """With a value head: what a value may move at most between the optimizer steps of one batch, in units of reward;
    further its loss is flat. 0: off. With one optimizer step a batch it changes nothing."""
    value_learning_rate: float = 5e-3
    """With a value head: its peak learning rate, on the policy's schedule."""
    value_gradient: Literal["head", "all"] = "head"
    """With a value head: what learns from its loss: the head alone, or the policy's weights beneath it as well, whose
    gradient then depends on the size of rewards."""
    aggregation: Literal["token-mean", "trajectory-mean", "response-mean", "constant"] = "token-mean"
    """Averaged over: all tokens alike, means of trajectories, means of responses, or sums over a constant length."""
    constant_length: int = 0
    """Tokens that "constant" divides each trajectory's sum by, whatever its length; a run takes 0 for all that an
    episode may say."""

    temperature: float = 1.0
    """Divides the logits; must equal the sampler's."""
    head_chunk: int = 128
    """Positions of each row whose logits exist at one time."""
    remat: Literal["none", "layers", "dots"] = "none"
    """What the backward pass computes again: nothing, everything inside a layer, or all but its matrix products."""
    attention: Literal["auto", "xla", "splash", "cudnn", "triton"] = "auto"
    """Attention over rows: auto takes splash on TPUs, cudnn on GPUs, xla elsewhere and where a kernel cannot take the
    shapes (which is logged once); triton (GPUs) is taken by name alone."""
    num_minibatches: int = 1
    """Optimizer steps made from one batch, each on its own share of the trajectories."""
    num_epochs: int = 1
    """How often the batch is gone through."""

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
                f"expected importance_cap 0 with ratio {self.ratio}, got {self.importance_cap}: the cap weights tokens "
                "one by one, and a sequence has one ratio for all; take ratio token, or do without the cap"
            )
        if self.dual_clip and not self.dual_clip > 1:
            raise ValueError(f"expected dual_clip of 0 (off) or above 1, got {self.dual_clip}")
        for name in (
            "constant_length",
            "warmup_steps",
            "total_steps",
            "weight_decay",
            "kl_coefficient",
            "value_coefficient",
            "value_clip",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} ≥ 0, got {getattr(self, name)}")
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
