"""The doctor finds deliberate faults, gives advice for each, and continues with the next check."""

import contextlib
import importlib
import io
import json
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aem_jax.bench.measure import summarise
from aem_jax.compilations import compilations
from aem_jax.doctor import attention, command, episodes, machine, parity, process, speed, training
from aem_jax.doctor.config import DoctorConfig
from aem_jax.doctor.finding import CHECKS, Finding
from aem_jax.doctor.page import Page
from aem_jax.envs.protocol import EnvError, Task
from aem_jax.envs.swe.sandbox import host
from aem_jax.errors import ConfigError
from aem_jax.launch import cli
from aem_jax.models import CONFIGS, ModelConfig, decode_attention
from aem_jax.models.attention import row_attention
from aem_jax.models.decode_attention import DecodeAttention, attend_in_place
from aem_jax.models.kernels import KERNELS
from aem_jax.models.ragged import attend_ragged
from aem_jax.rollout.stats import RolloutStats
from aem_jax.trajectory import Ending, Trajectory, Turn

CONFIG = DoctorConfig(model="tiny")
WELL = Finding(True, "all is well")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    """A model that compiles quickly; all tests share it, its programs and this process."""
    monkeypatch.setattr(process, "findings", process.examine_all)
    monkeypatch.setitem(CONFIGS, "tiny", ModelConfig(64, 16, 32, 1, 2, 1, 8, qkv_bias=True))


@pytest.fixture
def own_programs():
    """Uses no programs compiled by other tests, and leaves none to them."""
    caches = (episodes.random_params, episodes.make_sampler, parity._learner)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces all checks by ones that find nothing wrong, and those named by what is given."""
    # As users run it: a process with the tests' own setting is warned that a run does not take it.
    jax.config.update("jax_numpy_rank_promotion", "allow")

    def stub(**others: Callable[[DoctorConfig], Finding]) -> None:
        for name, target in CHECKS.items():
            module, _, function = target.partition(":")
            check = others.get(name.replace("-", "_"), lambda config: WELL)
            monkeypatch.setattr(f"aem_jax.doctor.{module}.{function}", check)

    return stub


def fail(error: BaseException) -> Callable[[DoctorConfig], Finding]:
    def check(config: DoctorConfig) -> Finding:
        raise error

    return check


def run(*words: str) -> int:
    return cli.main(["doctor", *words, "--runtime.compilation-cache", "off"])


# The table, its exit status, its two forms.


def test_every_check_is_a_function_and_every_kernel_has_a_check():
    for target in CHECKS.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(f"aem_jax.doctor.{module}"), function))
    assert [name for name in CHECKS if name.startswith("attention-")] == [
        f"attention-{name}" for name in ("xla", "splash", "cudnn", "decode")
    ]
    assert {f"attention-{name}" for name in KERNELS} <= set(CHECKS)


def test_an_exception_is_a_fault_and_the_next_check_runs(stubbed, capsys):
    lines = "no such gpu\nframe 1\nframe 2"
    stubbed(greedy=fail(RuntimeError(lines)), mesh=lambda config: Finding(None, "one device"))
    assert run("--json") == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["ok"], report["complete"], report["model"]) == (False, True, "tiny")
    by_name = {result["name"]: result for result in report["results"]}
    assert list(by_name) == list(CHECKS)
    assert by_name["greedy"]["text"] == "RuntimeError: no such gpu" and "doctor greedy" in by_name["greedy"]["advice"]
    assert "Traceback" in by_name["greedy"]["facts"]["traceback"]
    assert all(result["ok"] for name, result in by_name.items() if name not in ("greedy", "mesh"))
    assert "✗ greedy" in err and "✓ learner" in err and "– mesh" in err and "→ alone" in err
    assert err.splitlines()[-1].startswith(f"{len(by_name) - 2} ✓, 1 ✗, 1 –") and err.rstrip().endswith(": greedy")


def test_the_exit_status_is_0_without_faults_and_names_select_checks_in_their_order(stubbed, capsys):
    stubbed(greedy=fail(AssertionError("not asked for")))
    assert run("learner", "versions", "learner") == 0
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines()[1:-1]] == ["learner", "versions"] and not err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["greddy"], "unknown check 'greddy'; did you mean 'greedy'?"),
        (["--model", "qwen2.5-0.6b"], "unknown size 'qwen2.5-0.6b'; did you mean"),
        (["--jsn"], "unknown setting --jsn; did you mean --json?"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys):
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (command._StoppedError(), 143)])
def test_an_interrupted_run_prints_its_earlier_findings(stubbed, error: BaseException, status: int, capsys):
    stubbed(memory=fail(error))
    assert run("--json") == status
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert [result["name"] for result in report["results"]] == ["versions", "devices"] and not report["complete"]
    assert "Traceback" not in err and "stopped after 2 of" in err


def test_a_failed_platform_is_a_fault_and_the_checks_run_on_the_cpu(stubbed, monkeypatch: pytest.MonkeyPatch, capsys):
    def broken(config: Any) -> None:
        raise ConfigError("--runtime.platform auto: no cuBLAS\nsecond line")

    stubbed()
    monkeypatch.setattr("aem_jax.distributed.runtime.set_up", broken)
    assert run("versions", "devices", "greedy") == 1
    out = capsys.readouterr().out
    assert "✗ devices" in out and "no cuBLAS; all else is done on the CPU" in out and "✓ greedy" in out
    assert run("devices", "--runtime.platform", "cuda") == 2  # named explicitly: a mistake in the command


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_without_unicode_gets_ascii(encoding: str):
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding, write_through=True) as stream:
        page = Page(stream)
        for ok in (True, False, None):
            page.show(Finding(ok, "8 rows × 256 → α " * 20, advice="raise it → 4", name="learner", seconds=1.0))
        page.foot([WELL], 1.0, 1)
        lines = raw.getvalue().decode("ascii").splitlines()
    assert [line[0] for line in lines if line[0] != " "] == ["+", "x", "-", "1"]
    assert max(map(len, lines)) < 140 and "-> raise it -> 4" in lines[-2]


def test_non_finite_numbers_are_valid_json():
    finding = Finding(False, "NaN", "stop", {"gap": float("nan"), "all": (np.float32(1), jnp.inf)})
    line = json.loads(process.as_line(finding), parse_constant=pytest.fail)
    assert Finding(**line).facts == {"gap": "nan", "all": ["1.0", "inf"]}


# The separate process. Each script is a child with one check replaced.

CHILD = """
import os, signal, sys, time
from aem_jax.doctor import machine, process
{replaced}
sys.exit(process.main(sys.argv[1:]))
"""


def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: str) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(replaced=replaced))
    monkeypatch.setattr(process, "CHILD", (sys.executable, str(script)))
    monkeypatch.setattr(process, "findings", FINDINGS)


FINDINGS = process.findings


def test_a_crash_or_hang_of_the_process_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The check crashes or hangs; the next one runs in another process. Output of a library is not a finding."""
    hanging = tmp_path / "hanging"
    crash = "machine.memory = lambda config: (print('chatter', flush=True), os.abort())"
    hang = f"machine.disk = lambda config: (os.symlink(str(os.getpid()), {str(hanging)!r}), time.sleep(600))"
    children(tmp_path, monkeypatch, f"{crash}\n{hang}")
    now = 0.0

    def clock() -> float:
        """Stands still, except while that process hangs: then each call returns a time beyond any limit."""
        nonlocal now
        if hanging.is_symlink():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(os.readlink(hanging)), 0)
                now += 1e6
        return now

    monkeypatch.setattr(process, "monotonic", clock)
    assert run("versions", "memory", "disk", "sandbox-podman", "--json") == 1
    results = {result["name"]: result for result in json.loads(capsys.readouterr().out)["results"]}
    assert [result["ok"] for result in results.values()] == [True, False, False, None]
    assert (
        results["memory"]["text"] == "the process crashed (SIGABRT)" and "doctor memory" in results["memory"]["advice"]
    )
    assert results["disk"]["text"] == "the process printed nothing for 300 s"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_check_at_once(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """A run stopped by a signal during a check writes its results so far and leaves no process behind."""
    noted, stops = tmp_path / "pid", threading.Event()
    hangs = f"open({str(noted)!r}, 'w').write(str(os.getpid()) + '.'), time.sleep(600)"
    children(tmp_path, monkeypatch, f"machine.memory = lambda config: ({hangs})")

    def stop() -> None:
        while not noted.exists() or not noted.read_text().endswith("."):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    def at_work(page: Page, name: str) -> contextlib.nullcontext:
        if name == "memory" and not stops.is_set():  # all earlier results have been read
            stops.set()
            threading.Thread(target=stop, daemon=True).start()
        return contextlib.nullcontext()

    monkeypatch.setattr(Page, "at_work", at_work)
    before = signal.signal(signal.SIGINT, lambda *_: pytest.fail("the entry point's handler ends the process at once"))
    try:
        assert run("versions", "memory", "--json") == status
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert [result["name"] for result in json.loads(out)["results"]] == ["versions"] and "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()[:-1]), 0)


def test_a_missing_platform_is_a_mistake_in_the_command(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(process, "findings", FINDINGS)
    monkeypatch.delenv("JAX_PLATFORMS")
    assert run("versions", "--runtime.platform", "cuda") == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: --runtime.platform cuda") for line in lines) == 1


# Numbers: sampler, learner, kernels.


def test_every_known_model_can_be_checked():
    """Also those whose layers differ: Gemma 3's windows, the layers of SmolLM3 without rotary positions."""
    for name, config in CONFIGS.items():
        shallow = DoctorConfig(model=name).shallow("float32")
        layers = min(config.num_layers, 2)
        assert (shallow.num_layers, shallow.windows) == (layers, config.windows[:layers]), name


def test_parity_holds_and_fails_for_changed_parameters():
    sampled = parity.sample(CONFIG.shallow("float32"))
    finding = parity._exact(sampled)
    assert finding.ok and finding.facts["tokens"] > 100, finding
    for name in ("qkv_bias", "attention_norm", "down"):
        base = sampled.params["base"]
        other = {"base": {**base, "layers": {**base["layers"], name: base["layers"][name] + 0.05}}}
        wrong = parity._exact(sampled._replace(params=other))
        assert wrong.ok is False and "expected a gap of at most" in wrong.text and "XLA_FLAGS" in wrong.advice, name
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, sampled.params)
    assert parity._exact(sampled._replace(params=nan)).ok is False


def test_a_sampler_without_part_of_its_cache_is_a_fault(own_programs: None, monkeypatch: pytest.MonkeyPatch, capsys):
    attend = decode_attention.chunk_attention
    forgets = lambda q, cache, lengths, *rest: attend(q, cache, jnp.maximum(lengths - 1, 0), *rest)
    monkeypatch.setattr(decode_attention, "chunk_attention", forgets)
    assert run("greedy") == 1
    out = capsys.readouterr().out
    assert "✗ greedy" in out and "tokens are not the argmax" in out and "would learn from wrong ratios" in out


def test_logits_without_numbers_are_not_the_argmax(monkeypatch: pytest.MonkeyPatch):
    ids = np.asarray([[-1, 0, 0]])
    batch = SimpleNamespace(tokens=ids, positions=ids, segment_ids=ids, response_ids=ids)
    monkeypatch.setattr(parity, "play", lambda *_: ([], None))
    monkeypatch.setattr(parity, "packed", lambda *_: batch)
    monkeypatch.setattr(parity, "_behind_the_best", lambda *_: jnp.asarray([0.0, jnp.nan]))
    finding = parity.greedy(CONFIG)
    assert finding.ok is False and "1 of 2 tokens are not the argmax" in finding.text


@pytest.mark.parametrize("check", [parity.int8_weights, parity.lora_merged])
def test_parity_holds_for_int8_weights_and_merged_adapters(check):
    finding = check(CONFIG)
    assert finding.ok and finding.facts["tokens"] > 100, finding


def test_parity_in_bfloat16_holds_and_fails_for_a_wrong_learner(monkeypatch: pytest.MonkeyPatch):
    """An error of the learner alone also raises the measured cost of bfloat16."""
    sampled = parity.sample(CONFIG.shallow("bfloat16"))
    monkeypatch.setattr(parity, "sample", lambda model: sampled)
    finding = parity.bfloat16(CONFIG)
    assert finding.ok and finding.facts["tokens"] > 100, finding
    right = parity.logprobs
    for error in (0.2, 3.0):
        wrong = lambda policy, *rest, error=error: right(policy, *rest) + error * (policy.config.dtype == "bfloat16")
        monkeypatch.setattr(parity, "logprobs", wrong)
        finding = parity.bfloat16(CONFIG)
        assert finding.ok is False and "bfloat16 itself costs the learner" in finding.text, finding


def blind(q, k, v, segment_ids):
    """Correct, except that it attends to other segments of the row."""
    return row_attention(q, k, v, jnp.ones_like(segment_ids))


def deaf(q, k, v, segment_ids):
    """Correct in the forward pass, without a gradient for the keys."""
    return row_attention(q, jax.lax.stop_gradient(k), v, segment_ids)


@pytest.mark.parametrize(("broken", "what"), [(None, ""), (blind, "out"), (deaf, "d_k")])
def test_a_broken_attention_kernel_is_a_fault(broken, what: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(attention, "LENGTHS", {"cpu": (64,)})
    if broken:
        monkeypatch.setitem(KERNELS, "xla", KERNELS["xla"]._replace(attend=broken))  # pyright: ignore
    assert run("attention-xla", "attention-cudnn") == (1 if broken else 0)
    out = capsys.readouterr().out
    assert "– attention-cudnn" in out and "a kernel of GPUs" in out
    finding = attention.xla(CONFIG)
    if broken:
        assert "✗ attention-xla" in out and "expected gaps of at most" in out and "memory errors" in out
        assert finding.facts["64"][what] > 0.1, finding
    else:
        assert "✓ attention-xla" in out and max(finding.facts["64"].values()) < 1e-5


def without_numbers(q, k, v, cache, lengths, chunk, index):
    """Returns NaN."""
    out, chunk = attend_ragged(q, k, v, cache, lengths, chunk, index, interpret=True)
    return out * jnp.nan, chunk


def shifted(q, k, v, cache, lengths, chunk, index):
    """Attends to one cached token less than there are."""
    return attend_ragged(q, k, v, cache, jnp.maximum(lengths - 1, 0), chunk, index, interpret=True)


@pytest.mark.parametrize(
    ("kernel", "broken"),
    [
        (DecodeAttention(partial(attend_ragged, interpret=True), follows_lengths=True), False),
        (DecodeAttention(partial(attend_in_place, implementation="xla"), follows_lengths=True, in_place=True), False),
        (DecodeAttention(shifted, follows_lengths=True), True),
        (DecodeAttention(without_numbers, follows_lengths=True), True),
    ],
)
def test_a_broken_kernel_of_decode_is_a_fault(kernel: DecodeAttention, broken: bool, monkeypatch: pytest.MonkeyPatch):
    assert attention.decode(CONFIG).ok is None  # a CPU has none
    monkeypatch.setattr(attention, "make_decode_attention", lambda *_, **__: kernel)
    finding = attention.decode(CONFIG)
    assert finding.ok is not broken
    assert not finding.facts["gap"] < 0.1 if broken else finding.facts["gap"] < 1e-5
    assert ("--sampling.attention xla" in finding.advice) == broken


# Training steps: devices, programs, servers.


def trajectory(number: int, ending: Ending, tokens: tuple[int, ...] = (3, 4)) -> Trajectory:
    ids, zeros = np.asarray(tokens, np.int32), np.zeros(len(tokens), np.float32)
    turn = Turn(ids, ids, zeros, zeros, 0.0, True)
    return Trajectory(Task(str(number), "scripted", {}), number, 0, (turn,), ending, False)


def test_differing_training_steps_are_a_fault():
    played = [trajectory(n, Ending.TERMINATED) for n in range(3)]
    one = training.Stepped(played, {"loss": 0.5, "grad_norm": 2.0}, {"w": np.ones(3)})
    assert training.compare(one, one, "twice").ok
    others = {
        "1 of 6 sampled tokens differ": one._replace(
            trajectories=[trajectory(0, Ending.TERMINATED, (3, 5)), *played[1:]]
        ),
        "2 of 6 sampled tokens differ": one._replace(trajectories=played[:2]),
        "loss differs": one._replace(stats={"loss": 0.6, "grad_norm": 2.0}),
        "grad_norm differs": one._replace(stats={"loss": 0.5, "grad_norm": float("nan")}),
        "parameters differs": one._replace(params={"w": np.asarray([1.0, 1.0, 1.1])}),
    }
    for text, other in others.items():
        finding = training.compare(one, other, "twice")
        assert finding.ok is False and text in finding.text and "CUDA_VISIBLE_DEVICES=0" in finding.advice


@pytest.mark.parametrize(("count", "sizes"), [(2, (1, 1, 2)), (6, (3, 1, 2)), (8, (2, 2, 2)), (3, (3, 1, 1))])
def test_the_mesh_of_the_check_has_all_devices(
    count: int, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax, "device_count", lambda: count)
    monkeypatch.setattr(training, "make_mesh", lambda config: config)
    mesh: Any = training.every_device(ModelConfig(64, 32, 64, 1, 4, 2, 8))
    assert (mesh.data, mesh.fsdp, mesh.tensor) == sizes


@pytest.mark.parametrize("again", [False, True])
def test_programs_compiled_in_later_steps_are_counted(again: bool, monkeypatch: pytest.MonkeyPatch):
    def step(seed: int) -> None:
        size = 3 + (seed if again else 0)
        jax.jit(lambda x: x + seed)(jnp.zeros(size)) if again or seed == 0 else None

    monkeypatch.setattr(training, "_tiny", lambda dtype: SimpleNamespace(step=step))
    finding = training.recompiles(CONFIG)
    assert finding.ok is not again and (not again or "JAX_LOG_COMPILES" in finding.advice)


class Player:
    """Plays all sessions at once without a model. Repeats those whose server died, unless it gives up."""

    def __init__(self, gives_up: bool) -> None:
        self._gives_up = gives_up

    def play(self, seed: int, pool: Any) -> tuple[list[Trajectory], RolloutStats]:
        sessions, lost = range(pool.capacity), set()
        self._reset(pool, sessions)
        for _ in range(2):
            for session in sessions:
                try:
                    pool.step(session, "go").result()
                except EnvError:
                    lost.add(session)
        if not self._gives_up:
            self._reset(pool, lost)
        broken = lost if self._gives_up else set()
        endings = [Ending.ENV_ERROR if session in broken else Ending.TERMINATED for session in sessions]
        retries = 0 if self._gives_up else len(lost)
        return [trajectory(*pair) for pair in enumerate(endings)], RolloutStats(retries=retries)

    def _reset(self, pool: Any, sessions: Iterable[int]) -> None:
        for session in sessions:
            pool.reset(session, {"seed": session}).result()


def test_a_killed_server_loses_no_episode(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "_tiny", lambda: Player(gives_up=False))
    finding = training.servers(CONFIG)
    assert finding.ok and finding.facts["restarts"] == 1 and finding.facts["retries"] >= 1, finding
    monkeypatch.setattr(training, "_tiny", lambda: Player(gives_up=True))
    finding = training.servers(CONFIG)
    assert finding.ok is False and "of 32 episodes lost, the last error: environment server 0" in finding.text
    assert "ulimit" in finding.advice


def test_a_server_that_does_not_start_is_a_fault(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(training, "server_settings", lambda: ("scripted", {"min_turns": 9, "max_turns": 1}))
    assert run("servers") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "✗ servers" in out and "output: error: expected settings of ScriptedConfig" in out, out
    assert "expected 1 <= min_turns <= max_turns" in out and "ulimit" in out, out


def test_a_complete_training_step_compiles_nothing_again():
    """The real trainer, which `mesh`, `recompiles` and `servers` run."""
    with parity.full_precision():
        trainer = training.Trainer(CONFIG.shape, parity.one_device(), episodes.SLOTS)
        first = trainer.step(0)
        before = compilations()
        second = trainer.step(1)
    assert compilations() == before
    assert first.stats["parity_max"] < 1e-4 and second.stats["parity_max"] < 1e-4
    assert training.compare(first, second, "two steps").ok is False  # the steps have an effect


# The machine.


def test_missing_and_mismatched_packages_are_faults(monkeypatch: pytest.MonkeyPatch, capsys):
    finding = machine.versions(CONFIG)
    assert finding.ok and f"jax {jax.__version__}" in finding.text and machine.missing_packages() is None
    installed = machine._version
    monkeypatch.setattr(
        machine.importlib.metadata, "requires", lambda name: ["numpy>=99", "wandb>=1; extra == 'wandb'"]
    )
    finding = machine.versions(CONFIG)
    assert finding.ok is False and "expected numpy>=99, got" in finding.text and "wandb" not in finding.text
    plugin = SimpleNamespace(name="jax-cuda13-plugin")
    monkeypatch.setattr(machine.importlib.metadata, "distributions", lambda: [plugin])
    monkeypatch.setattr(machine, "_version", lambda name: "0.1" if name == plugin.name else installed(name))
    assert "jax-cuda13-plugin 0.1 beside jaxlib" in machine.versions(CONFIG).text
    monkeypatch.setattr(machine, "_version", lambda name: "" if name == "rich" else installed(name))
    assert run() == 1
    assert capsys.readouterr().err.startswith("x versions: not installed: rich\n  -> pip install")


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Puts an `nvidia-smi` on the PATH that prints this line."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint({line!r})\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("driver", "platforms", "ok", "text"),
    [
        ("580.159.04", "", False, "pip install 'aem_jax[cuda13]'"),
        ("535.54.03", "", False, "pip install 'aem_jax[cuda12]'"),
        ("580.159.04", "cpu", True, "left alone, since the platform is set to cpu"),
    ],
)
def test_a_card_that_jax_does_not_use_is_a_fault_unless_chosen(
    driver, platforms, ok, text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    nvidia_smi(tmp_path, monkeypatch, f"NVIDIA H100 80GB HBM3, {driver}, 81559, Disabled")
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    finding = machine.devices(CONFIG)
    assert finding.ok is ok and text in finding.text + finding.advice and "H100" in finding.text


@pytest.mark.parametrize(
    ("card", "ok", "share"),
    [
        ("81559, Disabled", False, "10.0 GiB for jax of 79.6"),
        ("81559, Enabled", True, "10.0 GiB for jax"),  # jax has a slice, nvidia-smi reports the card
        ("12288, [N/A]", True, "10.0 GiB for jax of 12.0"),
        ("[N/A], [N/A]", True, "10.0 GiB for jax"),  # host and device share one memory
    ],
)
def test_memory_of_a_device_is_compared_with_that_of_its_card(
    card: str, ok: bool, share: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    nvidia_smi(tmp_path, monkeypatch, f"NVIDIA H100 80GB HBM3, 580.159.04, {card}")
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10 * 2**30})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    finding = machine.memory(CONFIG)
    assert finding.ok is ok and finding.text.rstrip(")").endswith(share), finding


def test_the_page_cache_of_a_container_is_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gib = 2**30
    files = {"memory.max": 5 * gib // 2, "memory.current": 2 * gib, "memory.stat": f"inactive_file {7 * gib // 4}"}
    for name, content in files.items():
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr(host, "_control_groups", lambda controller: [tmp_path])
    finding = machine.memory(CONFIG)
    assert finding.ok and "host 2.2 of 2.5 GiB free" in finding.text, finding


def test_too_little_memory_or_disk_space_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert machine.memory(CONFIG).ok
    total, free = machine.host_memory()
    assert 2**28 < free <= total
    monkeypatch.setattr(machine, "host_memory", lambda: (2**33, 2**20))
    assert machine.memory(CONFIG).ok is False
    config = DoctorConfig(model="tiny", runs_dir=str(tmp_path / "not yet" / "there"))
    assert machine.disk(config).ok and not list(tmp_path.iterdir())  # nothing is left behind
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    finding = machine.disk(config)
    assert finding.ok is False and "two checkpoints of tiny" in finding.text
    (tmp_path / "file").write_text("")
    assert "cannot be written" in machine.disk(DoctorConfig(model="tiny", runs_dir=str(tmp_path / "file"))).text


def test_a_missing_sandbox_is_not_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for check, name in ((machine.bubblewrap, "bwrap"), (machine.docker, "docker"), (machine.podman, "podman")):
        finding = check(CONFIG)
        assert finding.ok is None and f"there is no `{name}` on the PATH" in finding.text and "SWE" in finding.advice
    monkeypatch.setattr("aem_jax.envs.swe.sandbox.engine.probe", lambda engine: "")
    assert machine.docker(CONFIG).ok


# Speed.


def test_rates_are_shown_unless_the_model_is_too_large(monkeypatch: pytest.MonkeyPatch):
    rates = [summarise("sampler", what, "8 slots", "tokens/s", 1000, [0.5, 0.5]) for what in ("extend", "decode")]
    monkeypatch.setattr(speed, "measure_sampler", lambda config: rates)
    finding = speed.decode(CONFIG)
    assert finding.ok and finding.text == "decode 2,000 tokens/s; extend 2,000 tokens/s (8 slots)"
    full = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**20})
    monkeypatch.setattr(jax, "local_devices", lambda: [full])
    skipped = speed.decode(DoctorConfig(model="qwen2.5-7b"))
    assert skipped.ok is None and "qwen2.5-7b takes 43 GiB of each device" in skipped.text


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        *((kind, None) for kind in ("NVIDIA L40", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 NVL")),
        *((kind, None) for kind in ("NVIDIA A100 80GB PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "cpu")),
    ],
)
def test_the_data_sheet_is_chosen_by_the_name_of_the_card(kind: str, name: str | None):
    assert speed.data_sheet(kind) is (speed.GPUS[name] if name else None)
