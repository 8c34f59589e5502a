"""Presets are consistent, and contradictions are found before the run starts."""

import pytest

from aem_jax.config import validate
from aem_jax.config.presets import DEFAULT, algorithm_names, model_names, read_preset, setting_names
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.models.config import ModelChoice
from aem_jax.overrides import apply, as_values, split

PAPERS = [name for name in setting_names() if name.endswith("-paper")]
COMBINATIONS = [(name,) for name in setting_names() if name not in PAPERS]
COMBINATIONS += [(name, model) for name in PAPERS for model in model_names()]


@pytest.mark.parametrize("names", COMBINATIONS, ids="-".join)
def test_presets_hold_together(names: tuple[str, ...]):
    for more in ((), *((algorithm,) for algorithm in algorithm_names())):
        validate.check(read_preset(*names, *more))


@pytest.mark.parametrize("name", PAPERS)
def test_a_setting_of_the_paper_needs_a_model_and_takes_any(name: str):
    with pytest.raises(ConfigError, match=r"^expected a model, got none; add the preset of one, as in --preset"):
        validate.check(read_preset(name))
    alone = as_values(read_preset(name))
    for model in model_names():
        composed = as_values(read_preset(name, model))
        changed = {key: value for key, value in composed.items() if value != alone[key]}
        assert changed.keys() == {"preset", "model.path", "learner.remat"} and changed["learner.remat"] == "layers"
        assert as_values(read_preset(model, name)) == composed | {"preset": f"{model} + {name}"}


def test_any_model_goes_with_a_setting_of_the_paper():
    for words in ["--model.path", "/models/mine"], ["--model.name", "qwen3-8b"]:
        validate.check(apply(read_preset(PAPERS[0]), split(words)[1]))


@pytest.mark.parametrize(
    ("names", "words", "model"),
    [
        (["alfworld-tiny"], ["--model.name", "tiny-moe"], ModelChoice(name="tiny-moe")),
        (
            ["alfworld-tiny"],
            ["--model.name", "tiny-moe", "--model.num-layers", "3"],
            ModelChoice("", "tiny-moe", num_layers=3),
        ),
        (["alfworld-tiny"], ["--model.name", "tiny"], ModelChoice(num_layers=3)),
        (["alfworld-tiny"], ["--model.path", "m"], ModelChoice("m")),
        (["alfworld-tiny"], ["--model.hidden-size", "64"], ModelChoice(num_layers=3, hidden_size=64)),
        (["alfworld-tiny", "qwen2.5-7b"], [], ModelChoice("Qwen/Qwen2.5-7B-Instruct")),
        (["alfworld-smollm2"], ["--model.name", "tiny"], ModelChoice(dtype="bfloat16")),
        (["alfworld-smollm2"], ["--model.path", "m"], ModelChoice("m", dtype="bfloat16")),
    ],
)
def test_another_model_has_its_own_sizes(names: list[str], words: list[str], model: ModelChoice):
    assert apply(read_preset(*names), split(words)[1]).model == model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rollout.num-slots", "128", "--env.sessions-per-server", "4"], "--rollout.num-slots: expected at most"),
        (["--sampling.temperature", "0.7"], "--learner.temperature: expected 0.7 with --sampling.temperature 0.7, got"),
        (["--sampling.temperature", "0"], "--sampling.temperature: expected above 0 to train, got 0"),
        (["--sampling.temperature", "0", "--learner.temperature", "0.5"], "--learner.temperature: expected 1.0 with"),
        (["--batch.row-length", "8"], "--batch.row-length: expected at least"),
        (
            ["--sampling.weights", "int8", "--lora.rank", "4", "--lora.merge", "False"],
            "--sampling.weights: expected lora.merge with int8 weights, got False",
        ),
        (
            ["--selection.filter-equal-outcomes", "True", "--rollout.group-size", "1"],
            "--selection.filter-equal-outcomes: expected --rollout.group-size of at least 2, got 1",
        ),
        (
            ["--rollout.carry-min-groups", "2"],
            "--learner.importance-cap: expected at least 1 (2 is usual) with --rollout.carry-min-groups, got 0",
        ),
        (
            [
                *("--rollout.carry-min-groups", "2", "--learner.importance-cap", "2"),
                *("--selection.filter-equal-outcomes", "True", "--selection.max-rounds", "3"),
            ],
            "--rollout.carry-min-groups: expected --selection.oversample 1 and --selection.max-rounds 1, got 1.0 and 3",
        ),
        (
            ["--selection.overlong-penalty", "1", "--selection.overlong-buffer", "17"],
            "--selection.overlong-buffer: expected at most --rollout.response-tokens = 16, got 17",
        ),
        *(
            (
                [
                    *("--selection.overlong-penalty", "1", "--selection.overlong-buffer", "17"),
                    *("--selection.overlong-of", "episode", "--rollout.context", context),
                ],
                f"--selection.overlong-of: expected response with --rollout.context {context}, got episode",
            )
            for context in ("window", "compact")
        ),
        (["--sampling.top-p", "0.9"], "--sampling.top-p: expected 1.0 (all tokens) to train, got 0.9"),
        (["--sampling.top-k", "20"], "--sampling.top-k: expected 0 (all tokens) to train, got 20"),
        (["--model.name", "tinny"], "did you mean 'tiny'?"),
        (["--batch.rows", "0"], "--batch.rows: expected"),
        (["--evaluation.every", "-1"], "--evaluation.every: expected"),
        (["--evaluation.size", "0"], "--evaluation.size: expected"),
        (["--metrics.efficiency-every", "-1"], "--metrics.efficiency-every: expected"),
        (["--metrics.wandb-project", "x"], "wandb is not installed"),
    ],
)
def test_contradictions_name_their_fields(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(validate, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        validate.check(apply(read_preset(DEFAULT), split(words)[1]))
    assert message in str(caught.value)


def test_an_evaluation_may_sample_from_the_most_likely_tokens():
    validate.check(apply(read_preset(DEFAULT), split(["--sampling.top-p", "0.9"])[1]), trains=False)


@pytest.mark.parametrize("name", ["weights", "cache"])
def test_a_sampler_in_int8_is_corrected_for_or_not(name: str):
    """One rule for both: the importance weight is optional, and the gap is measured in any case."""
    words = [f"--sampling.{name}", "int8"]
    for more in ([], ["--learner.importance-cap", "2"]):
        validate.check(apply(read_preset(DEFAULT), split([*words, *more])[1]))


def test_an_adapter_apart_can_be_sampled_from_with_a_cache_in_int8():
    words = ["--sampling.cache", "int8", "--lora.rank", "4", "--lora.merge", "False"]
    validate.check(apply(read_preset(DEFAULT), split(words)[1]))


def test_kl_needs_its_reference_kept():
    config = apply(RunConfig(), split(["--learner.kl-coefficient", "0.1", "--checkpoint.keep-first", "False"])[1])
    with pytest.raises(ConfigError, match="--checkpoint.keep-first: expected True with --learner.kl-coefficient"):
        validate.check(config)


def test_a_budget_of_tokens_below_a_row_is_refused():
    words = [
        "--batch.tokens-per-microbatch",
        "2799",
        "--batch.row-length",
        "700",
        "--mesh.data",
        "2",
        "--mesh.fsdp",
        "2",
    ]
    with pytest.raises(ConfigError, match="tokens-per-microbatch: expected at least 2800 .* got 2799"):
        validate.check(apply(read_preset(DEFAULT), split(words)[1]))
