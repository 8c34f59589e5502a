"""What a run can be told: the components' own configs, composed. Nothing below the rim imports this.

A choice is a name here and a function everywhere else; the tables that turn one into the other stand in `algorithm.py`
(advantages) and `build.py` (the rest).
"""

# ruff: noqa: RUF009 (the configs that stand as defaults are frozen)

from dataclasses import dataclass
from typing import Literal

from aem_jax.checkpoint import CheckpointConfig
from aem_jax.credit import AemConfig
from aem_jax.envs.alfworld.env import AlfworldConfig
from aem_jax.envs.alfworld.generator.config import GeneratorConfig
from aem_jax.envs.pool import PoolConfig
from aem_jax.envs.swe.choices import ChoicesConfig
from aem_jax.envs.swe.env import SweConfig
from aem_jax.envs.swe.tasks import TasksConfig
from aem_jax.envs.webshop.env import WebshopConfig
from aem_jax.envs.webshop.shop import ShopConfig
from aem_jax.evaluate import EvaluationConfig
from aem_jax.launch.algorithm import AlgorithmConfig
from aem_jax.learner.config import LearnerConfig
from aem_jax.metrics import MetricsConfig
from aem_jax.models.config import dtype_name
from aem_jax.models.lora import LoraConfig
from aem_jax.rollout.config import RolloutConfig
from aem_jax.sampler.draw import SamplingConfig
from aem_jax.selection import SelectionConfig
from aem_jax.sharding import MeshConfig
from aem_jax.train import TrainConfig
from aem_jax.warmstart import WarmstartConfig


@dataclass(frozen=True)
class ModelChoice:
    """Which decoder: one in Hugging Face's files, or a known size with random weights, any of its sizes changed."""

    path: str = ""
    """Folder of a model in Hugging Face's files, or its name on the Hub: where training begins, tokenizer included.
    Families: Qwen2.5, Qwen3, Llama 3. Empty: random weights of the size below."""
    name: str = "tiny"
    """Known size: tiny, qwen2.5-0.5b, -1.5b, -3b, -7b, -14b or -32b, qwen3-0.6b, -1.7b, -4b, -8b, -14b or -32b,
    llama-3.2-1b or -3b, llama-3.1-8b or -70b."""
    hidden_size: int | None = None
    """Width of the residual stream, if not the named one."""
    intermediate_size: int | None = None
    """Width inside the MLP, if not the named one."""
    num_layers: int | None = None
    """Layers, if not the named number."""
    num_heads: int | None = None
    """Query heads, if not the named number."""
    num_kv_heads: int | None = None
    """Key/value heads, if not the named number; must divide num_heads."""
    head_dim: int | None = None
    """Width of a head, if not the named one; even."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations and of weights as used, if not the named one; masters are float32 in any case."""

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: that of --model.path, else one that is trained for the run."""

    chat_template: Literal["own", "chatml"] = "own"
    """With --model.path: the model's own chat template, or plain ChatML. Qwen3's own drops earlier thoughts, so it goes
    with rollout.context window only."""
    thinking: bool = True
    """What the chat template is told as enable_thinking; with False, Qwen3 answers without a thought."""
    vocab_size: int = 1024
    """Most entries of the vocabulary: bytes, control tokens and what the environment's text earns."""
    whole_words: tuple[str, ...] = ("<action>", "</action>")
    """Strings that are one token each in a tokenizer that is trained, wherever they stand."""
    episodes: int = 200
    """Expert episodes whose text it is trained on."""


@dataclass(frozen=True)
class BatchConfig:
    """Rows that the learner computes at a time."""

    rows: int = 8
    """Rows of a microbatch; a multiple of mesh.data × mesh.fsdp."""
    tokens_per_microbatch: int = 0
    """Tokens of a microbatch, in place of rows: as many rows as they fill, in multiples of mesh.data × mesh.fsdp where
    these are given; 0 takes rows."""
    row_length: int = 0
    """Tokens of a row, into which episodes are packed; 0 takes rollout.context_tokens."""


@dataclass(frozen=True)
class OpenEnvConfig:
    """Any environment behind OpenEnv's messages: its tasks, and where they come from.

    It runs on the servers of env.urls, on those that env.command starts, or on ours around serve.
    """

    serve: str = ""
    """An environment of your own for our servers, as file.py:attribute or module:attribute."""
    settings: str = "{}"
    """What serve is called with: a JSON mapping of keywords."""
    seeds: int = 1000
    """Tasks to train on: the reset keyword seed from 0 to seeds - 1. Evaluation takes others."""
    tasks: str = ""
    """File of tasks to train on, in place of seeds: JSON lines, each a mapping of reset keywords."""
    evaluation_tasks: str = ""
    """The same for evaluation, which takes the first evaluation.size of them: one set, named as the one split of
    evaluation.splits. None of them may be trained on."""
    reset: str = "{}"
    """JSON mapping of reset keywords that all tasks have."""
    actions: tuple[str, ...] = ()
    """Responses among which a random agent chooses, where the environment lists no admissible ones: a baseline, and
    what a tokenizer is trained on where there is no model.path."""

    def __post_init__(self):
        if not 1 <= self.seeds <= 10**9:
            raise ValueError(f"expected seeds from 1 to 1000000000, got {self.seeds}")


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine: what is set before the first computation."""

    compilation_cache: str = "auto"
    """Folder in which compiled programs are kept between runs; auto: $XDG_CACHE_HOME/aem_jax/xla; off: none."""
    platform: str = ""
    """Where to compute: cpu, cuda or tpu; empty: the best that there is."""
    cpu_devices: int = 0
    """Simulated devices on a CPU, to try a mesh without one; 0 leaves it to JAX."""
    distributed: Literal["auto", "on", "off", "mpi4py"] = "auto"
    """Several processes as one run. auto: where SLURM, Open MPI, a TPU pod or a Kubernetes job started several, or
    coordinator is given; on: as JAX finds them, wherever that is; mpi4py: as any MPI says; off: this process alone."""
    coordinator: str = ""
    """HOST:PORT of process 0, where processes are started by hand; the port is any free one of that host."""
    num_processes: int = 0
    """With coordinator: how many processes there are."""
    process_id: int = -1
    """With coordinator: which one this is, from 0."""
    connect_timeout_s: float = 300.0
    """Seconds that processes wait for one another at the start."""
    silence_s: float = 45.0
    """Seconds after which a process that says nothing counts as gone; one that is killed is missed at once."""

    def __post_init__(self):
        if self.cpu_devices < 0:
            raise ValueError(f"expected cpu_devices >= 0, got {self.cpu_devices}")
        if self.connect_timeout_s <= 0 or self.silence_s < 5:
            raise ValueError(
                "expected connect_timeout_s above 0 and silence_s of at least 5, "
                f"got {self.connect_timeout_s} and {self.silence_s}"
            )
        if not self.coordinator:
            if self.num_processes or self.process_id != -1:
                raise ValueError(
                    f"expected coordinator with num_processes {self.num_processes} and process_id {self.process_id}, "
                    "got none; say HOST:PORT of process 0"
                )
            return
        if self.distributed == "mpi4py" or not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(
                f"expected coordinator HOST:PORT, and distributed auto or on beside it, got {self.coordinator!r} and "
                f"{self.distributed}"
            )
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"expected num_processes above 0 and process_id from 0 to num_processes - 1 with coordinator, "
                f"got {self.num_processes} and {self.process_id}"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    name: str = ""
    """Folder of the run in runs_dir; empty: the preset's name and what you changed of it. The same command resumes."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    preset: str = ""
    """Presets to begin from, later ones over earlier ones: names (`python -m aem_jax.launch presets`) or TOML files."""
    seed: int = 0
    """Seed of everything random: weights, games, sampling; from 0 to 2^32 - 1."""
    environment: Literal["alfworld", "webshop", "swe", "swe-choices", "openenv"] = "alfworld"
    """What the agent learns."""
    env: PoolConfig = PoolConfig(num_servers=2, sessions_per_server=64)
    """Environment servers."""
    alfworld: AlfworldConfig = AlfworldConfig()
    """Rules of a household episode."""
    alfworld_data: str = ""
    """Folder of ALFWorld's official data; empty: what $ALFWORLD_DATA names, else games are made."""
    games: GeneratorConfig = GeneratorConfig()
    """Household games to make; of official data its task types choose."""
    webshop: WebshopConfig = WebshopConfig()
    """Rules of a visit to the shop."""
    shop: ShopConfig = ShopConfig()
    """What the shop sells, and what its customers want."""
    bugs: TasksConfig = TasksConfig()
    """Bug-fixing tasks."""
    swe: SweConfig = SweConfig()
    """Rules of an episode of bug-fixing with tools, and what its code may take."""
    choices: ChoicesConfig = ChoicesConfig()
    """Rules of an episode of choosing among edits."""
    openenv: OpenEnvConfig = OpenEnvConfig()
    """Tasks of other people's environments and of your own."""
    model: ModelChoice = ModelChoice()
    """The policy."""
    lora: LoraConfig = LoraConfig()
    """Training adapters instead of all weights."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    mesh: MeshConfig = MeshConfig()
    """The device mesh."""
    warmstart: WarmstartConfig = WarmstartConfig()
    """Learning from demonstrations, before reinforcement learning."""
    train: TrainConfig = TrainConfig()
    """Length of the training, and what is kept."""
    sampling: SamplingConfig = SamplingConfig()
    """How tokens are drawn while training."""
    rollout: RolloutConfig = RolloutConfig()
    """How episodes are played."""
    selection: SelectionConfig = SelectionConfig()
    """Which episodes are learnt from."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Base advantages."""
    aem: AemConfig = AemConfig()
    """Adaptive Entropy Modulation."""
    batch: BatchConfig = BatchConfig()
    """Sizes of a batch."""
    learner: LearnerConfig = LearnerConfig()
    """The update."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Fixed evaluation sets."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    metrics: MetricsConfig = MetricsConfig()
    """Where numbers go."""
    runtime: RuntimeConfig = RuntimeConfig()
    """The machine."""

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:  # a key holds 32 bits: two larger seeds may be one
            raise ValueError(f"expected seed from 0 to {2**32 - 1}, got {self.seed}")


HARMLESS = (
    *("name", "runs_dir", "preset", "rollout.prompt_tokens", "rollout.cache_gib"),
    *("train.", "evaluation.", "checkpoint.", "env.", "metrics.", "runtime."),
)
"""Fields (or groups) that a resumed run may change: they decide where and how long, not what is computed."""


HARMFUL = ("env.wire.", "env.command")
"""Of these, what decides after all what is said and heard."""


def is_harmless(name: str) -> bool:
    """Whether a resumed run may change the field of this dotted name."""
    groups = tuple(each for each in HARMLESS if each.endswith("."))
    return (name.startswith(groups) or name in HARMLESS) and not name.startswith(HARMFUL)
