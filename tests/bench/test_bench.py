"""Benchmarks measure the stated quantities and end in one JSON line. No test checks their numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from envs.swe.sandboxes import working_bubblewrap

from aem_jax.bench.chat import ByteChat
from aem_jax.bench.measure import Ceilings, Sizes, ceilings, roofline, summarise, timed
from aem_jax.bench.page import differences, ratios, read_earlier
from aem_jax.bench.rollout import CountedSampler
from aem_jax.bench.sandboxes import PHASES
from aem_jax.bench.trace import as_text, profile, read_profile
from aem_jax.errors import ConfigError
from aem_jax.launch import cli
from aem_jax.models import CONFIGS, ModelConfig, Policy
from aem_jax.plan.costs import Costs, costs
from aem_jax.plan.hlo import read
from aem_jax.sampler import SamplingConfig

SMALL = ["--slots", "8", "--prompt-tokens", "8", "--new-tokens", "4", "--row-length", "32", "--trajectories", "8",
         "--turns", "2", "--contexts", "8", "24", "--context-chunk", "4", "--sessions", "2", "--repeats", "2",
         "--load-steps", "40", "--sandboxes", "bubblewrap", "--at-once", "1", "3",
         "--sandbox-commands", "2", "--runtime.compilation-cache", "off"]  # fmt: skip
ROLLOUT = ["--rollout.groups-per-step", "3", "--rollout.num-slots", "4", "--rollout.response-tokens", "6",
           "--rollout.context-tokens", "256", "--rollout.windows", "--rollout.prompt-tokens", "64",
           "--rollout.extend-buckets", "32", "--rollout.decode-chunk", "4", "--scripted.prompt-chars", "9",
           "--scripted.observation-chars", "2", "--scripted.max-turns", "4", "--scripted.latency-ms", "2",
           "--response-mean", "4"]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    """A model that compiles quickly. Its copies and products are too small to be meaningful, but fast."""
    monkeypatch.setitem(CONFIGS, "tiny", ModelConfig(64, 16, 32, 1, 2, 1, 8))
    monkeypatch.setattr("aem_jax.bench.measure.SIZES", {"cpu": Sizes(2**20, 64)})
    ceilings.cache_clear()
    yield
    ceilings.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("sampler", 2),
        ("learner", 1),
        ("advantage", 2),
        ("envs", 2),
        ("load", 1),
        ("context", 3),
        ("rollout", 4),
        ("carry", 4),
        ("gateway", 2),
        ("sandboxes", 3),
    ],
)
def test_a_benchmark_ends_in_one_json_line(name: str, count: int, capsys):
    if name == "sandboxes":
        working_bubblewrap()
    assert cli.main(["bench", name, *SMALL, *(ROLLOUT if name in ("rollout", "carry", "gateway") else [])]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    run = json.loads(line)
    assert run["config"]["slots"] == 8 and run["versions"]["jax"]
    assert [result["name"] for result in run["results"]] == [name] * count
    for result in run["results"]:
        low, high = result["quartiles"]
        assert 0 < result["worst"] <= low <= result["median"] <= high <= result["best"] and result["repeats"] >= 2
        assert (result["roofline"] is None) == (name in ("envs", "load", "carry", "gateway", "sandboxes"))
        assert result["roofline"] is None or result["roofline"]["bytes"] > 0
    if name == "learner":
        assert run["results"][0]["roofline"]["mfu"] > 0
        facts = run["results"][0]["facts"]
        assert 0.2 < facts["memory_gib"] / facts["planned_gib"] < 5
    if name == "sandboxes":
        assert run["results"][0]["repeats"] == 3
        for result in run["results"][1:]:
            facts = result["facts"]
            assert facts["lost"] == 0 and all(facts[f"{p}_p99_ms"] >= facts[f"{p}_p50_ms"] > 0 for p in PHASES)
    if name == "gateway":
        facts = run["results"][1]["facts"]
        assert (facts["recompiles"], facts["env_errors"], facts["same_episodes"]) == (0, 0, 1)
        assert facts["times_of_environments"] > 0 and facts["first_token_ms_p99"] >= facts["first_token_ms_mean"] > 0
    if name == "carry":
        for side, facts in enumerate(result["facts"] for result in run["results"]):
            assert facts["env_errors"] == 0 and 0 < facts["device_busy"] <= 1 and 0 <= facts["recomputed_share"] < 1
            if side % 2 == 0:  # every group is waited for
                assert facts["groups_carried"] == facts["age_max"] == 0
    if name == "rollout":
        lockstep, continuous = (run["results"][i] for i in (0, 2))
        assert (lockstep["what"], continuous["what"]) == ("episodes, lockstep", "episodes, continuous")
        assert continuous["facts"]["times_as_fast_as_lockstep"] > 0
        for facts in (lockstep["facts"], continuous["facts"]):
            assert facts["recompiles"] == 0 and facts["env_errors"] == 0 and 0 < facts["device_busy"] <= 1
            assert 3 <= facts["turns_mean"] <= facts["turns_max"] <= 4 and facts["response_tokens_max"] <= 6


def test_an_unknown_mode_is_refused(capsys):
    assert cli.main(["bench", "rollout", *SMALL, "--modes", "lockstop"]) == 2
    assert "--modes: expected one of lockstep, continuous, got 'lockstop'" in capsys.readouterr().err


def test_an_attention_that_the_device_lacks_is_refused_in_one_line(capsys):
    assert cli.main(["bench", "learner", *SMALL, "--learner.attention", "cudnn"]) == 2
    assert "--learner.attention: expected auto, xla on a CPU, got cudnn" in capsys.readouterr().err


Rows = Sequence[tuple[str, float, float, dict[str, str]]]


def plane(name: str, lines: Mapping[str, Rows]) -> SimpleNamespace:
    """A plane in the form of the profiler's data, in nanoseconds."""
    events = lambda rows: [SimpleNamespace(name=n, start_ns=s, end_ns=e, stats=t.items()) for n, s, e, t in rows]
    return SimpleNamespace(name=name, lines=[SimpleNamespace(name=line, events=events(lines[line])) for line in lines])


def test_the_time_of_an_operation_excludes_the_operations_inside_it():
    rows: Rows = [("while", 0, 100, {}), ("dot", 10, 40, {}), ("add", 40, 60, {}), ("dot", 150, 200, {})]
    step: Rows = [("step", 0, 500, {})]
    gpu = plane("/device:GPU:0", {"Steps": step, "Stream #7": rows, "Stream #8": [("copy", 50, 70, {})]})
    host = plane("/host:CPU", {"python": step, "xla": [("call", 0, 9, {}), ("Op", 5, 8, {"hlo_op": "fusion.1"})]})
    profile = read_profile(SimpleNamespace(planes=[host, gpu]))
    assert [(one.name, round(1e9 * one.seconds), one.count) for one in profile.operations] == [
        ("dot", 80, 2),
        ("while", 50, 1),
        ("add", 20, 1),
        ("copy", 20, 1),
    ]
    assert (round(1e9 * profile.busy), round(1e9 * profile.span)) == (150, 200)
    lines = as_text("decode", profile).splitlines()
    assert "none ran in 25.0% of it; 5 runs of 4 operations" in lines[0]
    assert "47.1%" in lines[1] and "2 x  dot" in lines[1]
    alone = read_profile(SimpleNamespace(planes=[host, plane("/device:GPU:0", {"Steps": step})]))
    assert [operation.name for operation in alone.operations] == ["fusion.1"]
    with pytest.raises(ValueError, match="expected operations"):
        read_profile(SimpleNamespace(planes=[]))


def test_profile_describes_a_call_or_the_error(tmp_path: Path):
    function = jax.jit(lambda x: x @ x)
    x = np.ones((64, 64), np.float32)
    function(x)
    text = profile(lambda: function(x).block_until_ready(), str(tmp_path), "product")
    assert text.startswith("product: ") and " ms from first to last operation" in text, text
    assert "no profile (RuntimeError: gone)" in profile(lambda: raise_(RuntimeError("gone\nfar")), str(tmp_path), "x")


def raise_(error: Exception) -> None:
    raise error


def test_the_median_rate_is_work_over_the_median_time(monkeypatch: pytest.MonkeyPatch):
    # warm-up, then calls of 1, 4 and 2 seconds: 10 units give 10/s at best, 5/s at the median, 2.5/s at worst
    clock = iter([0.0, 1.0, 10.0, 14.0, 20.0, 22.0])
    monkeypatch.setattr("aem_jax.bench.measure.time.perf_counter", lambda: next(clock))
    calls = []
    seconds = timed(lambda: calls.append(0), repeats=3)
    result = summarise("x", "y", "z", "units/s", 10, seconds)
    assert (result.best, result.median, result.worst) == (10.0, 5.0, 2.5)
    assert result.quartiles == pytest.approx((10 / 3, 10 / 1.5))  # half way between neighbours of three
    assert len(calls) == 4
    assert summarise("x", "y", "z", "units/s", 10, [4.0]).quartiles == (2.5, 2.5)


def test_the_roofline_is_the_longer_of_two_times():
    device = Ceilings(bandwidth=100.0, peak=1000.0, dtype="float32")
    # 500 FLOPs take 0.5 s, 200 bytes 2 s: bound by memory, 10 units could take 2 s; they took 4
    slow = roofline(Costs(flops=500.0, bytes=200.0), device, 10, 4.0)
    assert (slow.rate, slow.bound, slow.share, slow.mfu) == (5.0, "memory", 0.5, None)
    fast = roofline(Costs(flops=4000.0, bytes=200.0), device, 10, 8.0, useful=2000.0)
    assert (fast.bound, fast.share, fast.mfu) == ("compute", 0.5, 0.25)
    with pytest.raises(ValueError, match="neither"):
        roofline(Costs(), device, 10, 4.0)


def test_ceilings_are_measured():
    measured = ceilings("float32", Sizes(2**20, 64))
    assert measured.bandwidth > 0 and measured.peak > 0 and measured.dtype == "float32"


def test_the_costs_of_a_counted_sampler_are_the_sum_of_its_calls():
    """Two extends, and decodes of three steps and one, compared with separate counts of these programs."""
    policy = Policy(ModelConfig(32, 16, 32, 1, 2, 1, 8))
    params = policy.init(jax.random.key(0))
    sampler = CountedSampler(policy, SamplingConfig(), [-1], capacity=32, slack=8)
    state, zeros = sampler.init(2), np.zeros((2, 8), np.int32)
    for _ in range(2):
        state = sampler.extend(params, state, zeros, np.array([8, 5], np.int32))
    state, _ = sampler.decode(params, state, np.array([3, 1], np.int32), 4)
    state, _ = sampler.decode(params, state, np.array([1, 0], np.int32), 4)
    total, empty = sampler.costs(), sampler.abstract(2)
    extend = costs(read(sampler.lower_extend(params, empty, 8).compile()))
    decode = read(sampler.lower_decode(params, empty, 4).compile())
    decodes = [costs(decode, rounds) for rounds in (3, 1)]
    assert total.flops == pytest.approx(2 * extend.flops + sum(cost.flops for cost in decodes))
    assert total.bytes == pytest.approx(2 * extend.bytes + sum(cost.bytes for cost in decodes))
    # one step by hand: 2 slots × 2·(layer matrices + head) FLOPs, plus attention
    step = 2 * 2 * (16 * (6 * 8 + 3 * 32) + 32 * 16)
    assert step < decodes[1].flops < 1.5 * step
    sampler.reset_calls()
    assert sampler.costs().flops == 0


def test_response_lengths_of_random_weights_are_geometric():
    """A uniform policy over 512 ids samples 16 tokens on average, and some responses are several times as long."""
    chat = ByteChat(512, 16)
    assert len(chat.stop_ids) == 32
    sampled = np.random.default_rng(0).integers(0, 512, 100_000)
    ends = np.flatnonzero(np.isin(sampled, chat.stop_ids))
    lengths = np.diff(ends)
    assert np.mean(lengths) == pytest.approx(16, rel=0.05) and np.quantile(lengths, 0.99) > 64
    for ids in (chat.prompt_ids([{"role": "user", "content": "hello"}]), chat.delta_ids("obs")):
        assert not set(ids) & set(chat.stop_ids) and all(0 <= token < 512 for token in ids)
    assert chat.delta_ids("obs", closed=False) == [0, *chat.delta_ids("obs")]
    assert len(chat.decode([5, 40, 41])) == 2
    with pytest.raises(ValueError, match="mean response of more than 1 and at most 32 tokens"):
        ByteChat(32, 100)


def result(what: str, median: float, shape: str = "8 slots") -> dict[str, object]:
    return {"name": "sampler", "what": what, "shape": shape, "unit": "tokens/s", "median": median}


def test_rates_of_two_runs_are_compared_where_both_have_them():
    versions = {"jax": "0.10.2", "devices": "1 x cpu"}
    now = {"versions": versions, "results": [result("decode", 30.0), result("extend", 5.0), result("new", 1.0)]}
    then = {
        "versions": {**versions, "jax": "0.11.0"},
        "results": [result("extend", 2.0, "4 slots"), result("decode", 20.0)],
    }
    assert [(rate.what, rate.ratio, rate.note) for rate in ratios(now, then)] == [
        ("decode", 1.5, ""),
        ("extend", 2.5, "then at: 4 slots"),
    ]
    assert differences(now, then) == ["jax: now 0.10.2, then 0.11.0"]


def test_an_earlier_run_is_read_and_shown(tmp_path, capsys):
    earlier = tmp_path / "earlier.json"
    assert cli.main(["bench", "advantage", *SMALL]) == 0
    earlier.write_text("some log\n" + capsys.readouterr().out)
    assert cli.main(["bench", "advantage", *SMALL, "--compare", str(earlier)]) == 0
    printed = capsys.readouterr()
    assert "now / then" in printed.err and len(printed.out.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "no json", "[1, 2]", '{"results": 3}', '{"results": [{"name": "x"}]}'])
def test_a_file_without_results_is_refused(text: str, tmp_path):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected the JSON line that bench prints"):
        read_earlier(str(path))
    with pytest.raises(ConfigError, match="expected a file that can be read"):
        read_earlier(str(tmp_path / "missing"))
