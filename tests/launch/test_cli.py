"""The command line from a user's view: help, presets, precedence, names of runs, one-line errors."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from aem_jax.config import saved
from aem_jax.config.algorithms import READ_BY
from aem_jax.config.presets import (
    DEFAULT,
    algorithm_names,
    describe_preset,
    preset_names,
    read_preset,
    setting_names,
)
from aem_jax.config.run import CONDITIONS, RunConfig, may_change, without_effect
from aem_jax.envs.registry import TRAINED
from aem_jax.errors import ConfigError
from aem_jax.help import setting_groups
from aem_jax.launch import cli
from aem_jax.overrides import annotations, apply, as_values, choose, flag, split

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Configs passed to `train` and `evaluate`, which are replaced by recorders."""
    seen: list[RunConfig] = []
    stand_in = types.SimpleNamespace(
        train=lambda config: seen.append(config) or 0, evaluate=lambda config, step: seen.append(config) or 0
    )
    for module in ("training", "evaluation"):
        monkeypatch.setitem(sys.modules, f"aem_jax.launch.{module}", stand_in)  # pyright: ignore[reportArgumentType]
    return seen


def run_cli(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aem_jax.launch", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


def test_no_arguments_train_the_default_preset(trained):
    assert cli.main([]) == 0
    (config,) = trained
    assert (config.preset, config.name) == (DEFAULT, DEFAULT) == ("alfworld-tiny", "alfworld-tiny")


def test_the_folder_of_official_data_is_part_of_the_config(trained, monkeypatch: pytest.MonkeyPatch):
    """The variable is resolved once, so that a resumed run cannot silently change its games."""
    monkeypatch.setenv("ALFWORLD_DATA", "/data/alfworld")
    assert cli.main([]) == cli.main(["--alfworld.data", "/mine"]) == 0
    assert [as_values(config)["alfworld.data"] for config in trained] == ["/data/alfworld", "/mine"]
    assert trained[0].name == DEFAULT


def test_precedence_is_defaults_then_preset_then_command_line(trained, tmp_path: Path):
    mine = tmp_path / "mine.toml"
    mine.write_text("seed = 3\n[train]\nnum_steps = 7\n[aem]\nstrength = 0.5\n[learner]\nlearning_rate = 1e-3\n")
    assert cli.main(["train", "--preset", str(mine), "--aem.strength", "0", "--seed=4"]) == 0
    (config,) = trained
    assert config.train.num_steps == 7  # preset over default
    assert config.learner.learning_rate == 1e-3
    assert (config.aem.strength, config.seed) == (0.0, 4)  # command line over preset
    assert config.aem.min_range == RunConfig().aem.min_range  # default
    assert config.preset == str(mine) and config.name == "mine-aem.strength-0-seed-4"


def test_every_field_can_be_given_on_the_command_line():
    """A config written as command-line words is read back as the same config."""
    config = read_preset(DEFAULT)
    options = {}
    for name, value in as_values(config).items():
        words = [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
        options[name] = words
    assert set(options) == set(annotations(RunConfig()))
    assert apply(RunConfig(), options) == config


def test_hyphens_and_underscores_are_alike():
    dashes = apply(RunConfig(), split(["--learner.learning-rate", "0.5"])[1])
    underscores = apply(RunConfig(), split(["--learner.learning_rate=0.5"])[1])
    assert dashes == underscores and dashes.learner.learning_rate == 0.5


def test_lists_take_words_up_to_the_next_option():
    config = apply(RunConfig(), split(["--env.urls", "ws://a:1", "ws://b:2", "--seed", "1"])[1])
    assert config.env.urls == ("ws://a:1", "ws://b:2") and config.seed == 1


def test_the_last_of_an_option_given_twice_counts():
    assert apply(RunConfig(), split(["--seed", "1", "--seed", "2"])[1]).seed == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["resume"], "unknown command 'resume'; the command that started a run resumes it"),
        (["--preset", "alfword-tiny"], "unknown preset 'alfword-tiny'; did you mean 'alfworld-tiny'?"),
        (["--preset", "no/such.toml"], "no preset file no/such.toml; presets are"),
        (["--preset", "alfworld-tiny", "gpso"], "unknown preset 'gpso'; did you mean 'gspo'?"),
        (
            ["--preset", "alfworld-qwen2.5-7b", "gspo"],
            "preset 'alfworld-qwen2.5-7b'; setting and model are two presets: --preset alfworld-paper qwen2.5-7b",
        ),
        (["--preset", "swe-qwen3-32b"], "two presets: --preset swe-paper qwen3-32b"),
        (["--preset", "webshop-qwen2.5-1.5b"], "two presets: --preset webshop-paper qwen2.5-1.5b"),
        (["--preset", "qwen2.5-7b"], "expected a preset of a setting beside qwen2.5-7b, got none; as in --preset alfw"),
        (["--preset", "webshop-paper"], "expected a model, got none; add the preset of one"),
        (["--model.path", "m", "--model.num-layers", "3"], "--model.num-layers: expected none with --model.path"),
        (["--preset", "--seed", "1"], "--preset: expected one or more names, got nothing"),
        (
            ["--preset", "gspo", "--learner.importance-cap", "2"],
            "--learner.importance-cap: expected importance_cap 0 with ratio response",
        ),
        (["--aem.strenght", "0"], "unknown setting --aem.strenght; did you mean --aem.strength?"),
        (["--strength", "0"], "unknown setting --strength; did you mean --aem.strength?"),
        (
            ["--learner.learning_rat", "0"],
            "unknown setting --learner.learning-rat; did you mean --learner.learning-rate?",
        ),
        (["--aem", "0"], "--aem is a group of fields"),
        (
            ["--environment", "alfwrold"],
            "expected one of alfworld, webshop, swe, swe-choices, harbor, openenv, harness, got 'alfwrold'",
        ),
        (
            ["--environment", "echo"],
            "--environment: expected one of alfworld, webshop, swe, swe-choices, harbor, openenv",
        ),
        (
            ["--webshop.mode", "text"],
            "--webshop.mode is a setting of environment webshop, and --environment is alfworld here; "
            "set --environment to webshop, or leave it out",
        ),
        (["--alfworld.reward-own", "1"], "unknown setting --alfworld.reward-own; did you mean --alfworld.reward-won?"),
        (["--games.things", "2", "3"], "unknown setting --games.things; did you mean --alfworld.games.things?"),
        (["serve", "openenv"], "unknown environment 'openenv'"),
        (["serve", "echo", "--html", "True"], "--html: expected an environment with a web site, of webshop, got echo"),
        (["--aem.strength", "much"], "--aem.strength: expected a number, got 'much'"),
        (["--aem.strength", "-1"], "--aem.strength: expected"),
        (["--seed"], "--seed: expected a whole number, got no value"),
        (["--seed", "1", "2"], "--seed: expected a whole number, got '1 2'"),
        (["--algorithm.estimator", "gpro"], "did you mean 'grpo'?"),
        (["--model.name", "qwen3-8"], "did you mean 'qwen3-8b'?"),
        (["-s", "1"], "unknown option '-s'"),
        (["train", "now"], "expected options after train, got 'now'"),
        (["--name", "../x"], "--name: expected"),
        (["serve"], "expected one environment"),
        (["serve", "alfwrold"], "unknown environment 'alfwrold'; did you mean 'alfworld'?"),
        (["serve", "alfworld", "--prot", "1"], "unknown setting --prot; did you mean --port?"),
        (["serve", "alfworld", "--settings", "{"], "expected settings as a JSON mapping"),
        (["bench", "samplr"], "unknown benchmark 'samplr'; did you mean 'sampler'?"),
        (["presets", "x"], "expected nothing after presets"),
        (["--help", "rolout"], "--help: unknown group 'rolout'; did you mean 'rollout'?"),
        (["--help", "zzz"], "--help: unknown group 'zzz'; groups are alfworld, alfworld.games, env,"),
        (["--help", "webshop"], "--help: --webshop is a setting of environment webshop, and --environment is alfworld"),
        (["evaluate", "--name", "never-trained"], "no run in runs/never-trained"),
        (["analyze", "runs/never-trained"], "no run in runs/never-trained"),
        (["--tokenizer.vocab-size", "10"], "--tokenizer.vocab-size: expected vocab_size >= 261"),
        (["export", "s3://bucket/model"], "expected the path of a folder to write to, got 's3://bucket/model'"),
        (["export", ""], "expected the path of a folder to write to, got ''"),
        (["analyze"], "expected one run's folder, got 0"),
        (["analyze", "runs/x", "--draw", "9"], "did you mean --draws?"),
        (["analyze", "runs/x", "--draws", "1"], "--draws: expected draws of at least 2, got 1"),
        (["--runs-dir", "a\udcff"], "expected words in UTF-8, got 'a\\udcff'"),
        (["--model.path", "a\udcff"], "expected words in UTF-8, got 'a\\udcff'"),
        (["--warmstart.init-from", "x", "--lora.rank", "2"], "--warmstart.init-from: expected none with --lora.rank"),
    ],
)
def test_mistakes_get_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert message in printed.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[aem]\nstrenght = 1\n", "mine.toml: unknown setting 'aem.strenght'; did you mean 'aem.strength'?"),
        ("[emv]\nnum_servers = 1\n", "mine.toml: unknown setting 'emv.num_servers'; did you mean 'env.num_servers'?"),
        ("[aem]\nstrength = 'x'\n", "mine.toml: 'aem.strength': expected a number, got 'x'"),
        ("[aem\n", "mine.toml: "),
    ],
)
def test_a_preset_file_is_held_to_the_same(text: str, message: str, tmp_path: Path, capsys):
    (tmp_path / "mine.toml").write_text(text)
    assert cli.main(["--preset", str(tmp_path / "mine.toml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_process_ends_with_status_2_and_no_traceback():
    result = run_cli("--aem.strenght", "0")
    assert result.returncode == 2
    assert (
        result.stdout == "" and result.stderr == "error: unknown setting --aem.strenght; did you mean --aem.strength?\n"
    )


def printed_settings(capsys, *words: str) -> tuple[list[str], str]:
    """(the options with an explanation, the full text) of a help page."""
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    return re.findall(r"^  (--\S+)", text, re.MULTILINE), text


def test_help_explains_every_field_with_the_preset_s_defaults(capsys):
    explained, text = printed_settings(capsys, "--help", "all")
    assert explained == [flag(setting.name) for group in setting_groups(RunConfig()) for setting in group.settings]
    assert sorted(explained) == sorted(map(flag, annotations(RunConfig())))
    assert "(default: alfworld-tiny)" in text
    for command in cli.COMMANDS:
        assert command in text


def test_help_names_the_settings_without_effect(capsys):
    everything, _ = printed_settings(capsys, "--help", "all")
    explained, text = printed_settings(capsys, "--help")
    _, named = text.split("without effect in this run")
    assert set(explained) < set(everything)
    for option in set(everything) - set(explained):
        assert option in named or (option.startswith("--env.field-mapping.") and "--env.field-mapping" in named)
    assert "with --lora.rank: --lora.alpha, --lora.targets, --lora.merge" in named and "--lora.rank" in explained
    assert "--learner.value-clip" in printed_settings(capsys, "--preset", "ppo", "--help")[0]
    _, text = printed_settings(capsys, "--preset", "gagpo", "--help")
    assert "--algorithm.scope" in text.split("without effect in this run")[1]
    assert "--env.field-mapping.text-field" in printed_settings(capsys, "--environment", "openenv", "--help")[0]


def test_help_of_the_default_run_is_short(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, text = printed_settings(capsys, "--help")
    assert len(text.splitlines()) <= 450 and max(map(len, text.splitlines())) <= 80


def test_settings_of_what_is_off_have_no_effect():
    words = ["--aem.strength", "0", "--learner.covariance", "clip", "--algorithm.estimator", "rloo"]
    unused = {name for names in without_effect(apply(RunConfig(), split(words)[1])).values() for name in names}
    assert {"aem.scope", "aem.variant", "learner.covariance_penalty", "algorithm.ddof", "algorithm.eps"} <= unused
    assert not {"learner.covariance_range", "learner.covariance_share", "algorithm.scope"} & unused


def test_conditions_of_an_effect_name_settings():
    known = [f"{name}." for name in annotations(RunConfig())]
    names = [name for names, _, _ in CONDITIONS for name in names.split()]
    assert [name for name in names if not any(setting.startswith(f"{name}.") for setting in known)] == []
    assert len({option for _, option, _ in CONDITIONS}) == len(CONDITIONS)


@pytest.mark.parametrize(
    ("names", "explained"),
    [
        (["aem"], ["--aem.strength", "--aem.min-range", "--aem.scope", "--aem.variant"]),
        (["learner.clip-low", "learner.clip_high"], ["--learner.clip-low", "--learner.clip-high"]),
        (["lora"], ["--lora.rank", "--lora.alpha", "--lora.targets", "--lora.merge"]),
    ],
)
def test_help_explains_a_group_or_a_setting(names: list[str], explained: list[str], capsys):
    assert printed_settings(capsys, "--help", *names)[0] == explained
    assert printed_settings(capsys, "-h", *names)[0] == explained


def test_help_lists_the_settings_of_the_chosen_environment_alone(capsys):
    for words, name in ([], "alfworld"), (["--environment", "swe-choices"], "swe-choices"):
        assert cli.main([*words, "--help"]) == 0
        text = capsys.readouterr().out
        assert [other for other in TRAINED if f"--{other}." in text] == [name]
        assert all(other in text for other in TRAINED)
    assert cli.main(["plan", "--preset", "webshop-tiny", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--webshop.shop.made.products" in text and "--alfworld." not in text and "--topology" in text


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "-h"],
        ["analyze", "-h"],
        ["export", "-h"],
        ["serve", "--help"],
        ["serve", "alfworld", "--help"],
        ["bench", "--help"],
        ["presets", "--help"],
    ],
)
def test_every_command_has_help(words: list[str], capsys):
    assert cli.main(words) == 0
    assert "usage: python -m aem_jax.launch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "known"),
    [
        ("serve", "swe-choices"),
        ("endpoint", "a GGUF file"),
        ("bench", "sandboxes, learner"),
        ("doctor", "parity-float32"),
    ],
)
def test_help_says_what_may_follow_a_command(command: str, known: str, capsys):
    assert cli.main([command, "--help"]) == 0
    assert known in capsys.readouterr().out.partition("settings:")[0]


def test_no_field_is_without_an_explanation():
    for choice in TRAINED:
        for group in setting_groups(choose(RunConfig(), {"environment": choice})):
            assert group.text or not group.name, group.name
            assert [setting.name for setting in group.settings if not setting.text] == []


def test_help_loads_nothing_that_takes_seconds():
    code = (
        "import sys; from aem_jax.launch.cli import main; main(['--help']); "
        "print('LOADED', *{name.split('.')[0] for name in sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(result.stdout.rpartition("LOADED")[2].split())
    assert not loaded & {"transformers", "tokenizers", "grain", "tensorboardX", "matplotlib", "torch", "wandb"}


def test_every_preset_is_sound_and_says_what_it_is():
    assert DEFAULT in setting_names()
    for name in setting_names():
        assert read_preset(name).preset == name
    for name in algorithm_names():
        assert read_preset(name).preset == f"{DEFAULT} + {name}"
    for name in preset_names():
        assert describe_preset(name)
    assert len(set(preset_names())) == len(preset_names())


def test_presets_are_listed(capsys):
    assert cli.main(["presets"]) == 0
    listed = capsys.readouterr().out
    for name in preset_names():
        assert f"\n  {name} " in listed
    order = [listed.index(f"\n{kind}") for kind in ("models, ", "algorithms, ")]
    assert listed.startswith("settings:\n") and order == sorted(order)


def test_an_algorithm_goes_with_any_environment(trained, tmp_path: Path):
    mine = tmp_path / "mine.toml"
    mine.write_text("seed = 3\n[learner]\nclip_low = 0.5\nlearning_rate = 0.25\n")
    assert cli.main(["--preset", str(mine), "gspo", "--learner.clip-high", "0.1"]) == 0
    assert cli.main(["--preset", "gspo"]) == cli.main(["--preset", "gspo", str(mine)]) == 0
    composed, alone, other_way = trained
    assert (composed.seed, composed.learner.learning_rate) == (3, 0.25)
    assert (composed.learner.ratio, composed.learner.clip_low, composed.learner.clip_high) == ("response", 3e-4, 0.1)
    assert composed.name == "mine-gspo-learner.clip-high-0.1"
    assert (alone.preset, alone.name) == ("alfworld-tiny + gspo", "alfworld-tiny-gspo")
    assert alone.rollout == read_preset(DEFAULT).rollout
    assert other_way.learner.clip_low == 0.5  # the last value wins


def test_nothing_is_left_of_an_algorithm_under_another():
    for name in algorithm_names():
        alone = read_preset(DEFAULT, name)
        for other in algorithm_names():
            over = read_preset(DEFAULT, other, name)
            for field in ("ratio", "clip_low", "clip_high", "dual_clip", "aggregation"):
                assert getattr(alone.learner, field) == getattr(over.learner, field), (name, other, field)
            for field in ("filter_equal_outcomes", "oversample", "max_rounds", "truncated"):
                assert getattr(alone.selection, field) == getattr(over.selection, field), (name, other, field)
            read = {name for name, readers in READ_BY.items() if alone.algorithm.estimator in readers}
            for field in {"estimator"} | read:
                assert getattr(alone.algorithm, field) == getattr(over.algorithm, field), (name, other, field)


def test_a_change_that_matters_names_another_run():
    def name(*words: str) -> str:
        options = split(words)[1]
        return saved.run_name(apply(read_preset(DEFAULT), options), options)

    assert name() == "alfworld-tiny"
    assert name("--train.num-steps", "3", "--env.num-servers", "4") == "alfworld-tiny"
    assert name("--aem.strength", "0") == "alfworld-tiny-aem.strength-0"
    assert name("--seed", "1", "--aem.strength", "0") == name("--aem.strength", "0", "--seed", "1")
    assert name("--aem.strength", "0", "--name", "plain") == "plain"
    long = name(
        "--alfworld.games.task-types", "pick_and_place_simple", "look_at_obj_in_light", "pick_two_obj_and_place"
    )
    assert len(long) <= 80 and long != name(
        "--alfworld.games.task-types", "pick_and_place_simple", "look_at_obj_in_light"
    )


def test_the_resolved_config_is_saved_and_read_back_exactly(tmp_path: Path):
    config = apply(read_preset(DEFAULT), split(["--env.urls", "ws://a:1", "--model.num-layers", "3"])[1])
    saved.save(config, tmp_path / "run")
    assert saved.load(tmp_path / "run") == config


def test_a_resumed_run_may_change_what_is_harmless(tmp_path: Path):
    begun = read_preset(DEFAULT)
    longer = apply(begun, split(["--train.num-steps", "999", "--env.num-servers", "2", "--runtime.platform", "cpu"])[1])
    saved.check_resumable(begun, longer, tmp_path)
    with pytest.raises(ConfigError, match=r"begun with --seed 0, got 5 \(and --aem\.strength\)") as caught:
        saved.check_resumable(begun, apply(begun, split(["--aem.strength", "0", "--seed", "5"])[1]), tmp_path)
    assert "another --name" in str(caught.value)
    with pytest.raises(ConfigError, match="begun with --environment alfworld, got webshop; give the same values"):
        saved.check_resumable(begun, apply(begun, split(["--environment", "webshop"])[1]), tmp_path)


def test_a_resumed_run_may_move_its_sandboxes_but_not_leave_their_images(tmp_path: Path):
    begun = apply(read_preset("swe-paper"), split(["--swe.runtime", "docker"])[1])
    moved = ["--swe.runtime", "kubernetes", "--swe.kubernetes.namespace", "mine", "--swe.host.memory-mib", "4096"]
    saved.check_resumable(begun, apply(begun, split(moved)[1]), tmp_path)
    for words in (["--swe.runtime", "bubblewrap"], ["--swe.container.image", "other"], ["--swe.memory-mib", "999"]):
        with pytest.raises(ConfigError, match=f"begun with {words[0]}"):
            saved.check_resumable(begun, apply(begun, split(words)[1]), tmp_path)


def test_harmless_fields_exist():
    from aem_jax.config.run import ENGINES, MAY_CHANGE

    presets = (RunConfig(), read_preset("swe-paper"), read_preset("harbor-tiny"))
    names = [name for preset in presets for name in annotations(preset)]
    assert set(ENGINES) <= set(names)
    for prefix in MAY_CHANGE:
        assert any(name == prefix or (prefix.endswith(".") and name.startswith(prefix)) for name in names), prefix
    assert not may_change("seed") and not may_change("aem.strength")


def test_evaluate_begins_from_the_run_s_own_config(trained, tmp_path: Path):
    config = apply(read_preset(DEFAULT), split(["--rollout.group-size", "4"])[1])
    saved.save(config, tmp_path / "mine")
    assert cli.main(["evaluate", "--name", "mine", "--runs-dir", str(tmp_path), "--sampling.temperature", "0"]) == 0
    (asked,) = trained
    assert asked.rollout.group_size == 4 and asked.sampling.temperature == 0.0
    assert (asked.name, asked.runs_dir) == ("mine", str(tmp_path))


def test_a_choice_of_a_checkpoint_is_checked(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["evaluate", "--name", "never-trained", "--step", "bets"]) == 2
    assert cli.main(["export", "out", "--name", "never-trained", "--step"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: --step: expected a whole number or one of latest, best, got 'bets'"
    assert second == "error: --step: expected a whole number or one of latest, best, got ''"


def test_options_with_which_checkpoints_cannot_be_read_are_refused(tmp_path: Path, capsys):
    saved.save(apply(read_preset("alfworld-tiny"), {"model.dtype": ["bfloat16"]}), tmp_path / "run")
    words = ["evaluate", "--runs-dir", str(tmp_path), "--name", "run", "--model.dtype", "float32"]
    for option, value, known in [
        ("--model.num-layers", "2", "3"),
        ("--model.name", "tiny-moe", "tiny"),
        ("--lora.rank", "2", "0"),
        ("--algorithm.estimator", "gae", "grpo"),
    ]:
        assert cli.main([*words, option, value]) == 2
        expected = f"error: {option}: expected {known}, with which {tmp_path / 'run'} was trained, got {value}\n"
        assert capsys.readouterr().err == expected


def test_a_config_of_another_version_says_which_file(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"sede": 1}')
    with pytest.raises(ConfigError, match=r"config\.json: unknown setting 'sede'; did you mean 'seed'\?; .*version"):
        saved.load(tmp_path)


@pytest.mark.parametrize(("where", "status"), [("| head -n 1", 0), (">&-", 0), (">&- 2>&- <&-", 0), (">/dev/full", 2)])
def test_help_may_be_left_unread_or_have_nowhere_to_go(where: str, status: int):
    command = f"{sys.executable} -m aem_jax.launch --help {where}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert done.stdout.startswith("usage") == ("|" in where)


def test_a_closed_output_is_not_the_next_file_that_is_opened():
    code = "import sys, aem_jax.launch.__main__; print(open(sys.executable).fileno(), file=sys.stderr)"
    done = subprocess.run(f"{sys.executable} -c '{code}' >&-", shell=True, capture_output=True, text=True, cwd=ROOT)
    assert int(done.stderr) > 2
