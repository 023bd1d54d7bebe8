"""Flags become a configuration or an error of usage that says what to write instead."""

import dataclasses
import json
import os
import pathlib

import pytest
from absl import flags as absl_flags

from configs import tiny_cpu
from eep_jax.errors import CheckpointError
from eep_jax.models.families.published import PUBLISHED
from eep_jax.runtime.control.last_words import find_last_words
from launch import flags, program

CONFIG = tiny_cpu.get_config()
GOOD_TOKEN = "sixteen letters."


@pytest.fixture
def parse():
    """Parses a command line with all flags of serving, and restores their values after the test."""
    values = absl_flags.FLAGS
    saved = {name: (values[name].value, values[name].present) for name in values}
    was_parsed = values.is_parsed()
    yield lambda *words: values(["program", *words])
    for name, (value, present) in saved.items():
        values[name].value, values[name].present = value, present
    if not was_parsed:
        values.unparse_flags()


class TestWeights:
    def test_a_checkpoint_brings_its_model(self, parse, tmp_path, monkeypatch):
        model = dataclasses.replace(CONFIG.model, experts=32, name="other")
        (tmp_path / "manifest.json").write_text(json.dumps({"model": dataclasses.asdict(model)}))
        monkeypatch.chdir(tmp_path)
        words = ["--config=tiny_cpu", "--checkpoint=."]
        parse(*words)
        with pytest.raises(flags.UsageError, match=r"--config=tiny_cpu.*raise slots_per_rank"):
            flags.run_config()
        parse(*words, "--override=cluster.redundancy=1", "--override=model.eos_token=5")
        found = flags.run_config()
        assert found.model == dataclasses.replace(model, eos_token=5)
        assert found.checkpoint == str(tmp_path) and found.random_weights is None
        assert f"--checkpoint={tmp_path}" in flags.forwarded()

    def test_the_model_of_a_hugging_face_directory_is_read_too(self, parse, tmp_path):
        fields, _ = PUBLISHED["Mixtral-8x7B"]
        (tmp_path / "config.json").write_text(json.dumps(fields))
        parse("--config=tiny_cpu", f"--checkpoint={tmp_path}")
        assert flags.run_config().model.expert_hidden == 14336

    def test_a_directory_of_neither_is_named(self, parse, tmp_path):
        parse("--config=tiny_cpu", f"--checkpoint={tmp_path}")
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            flags.run_config()

    def test_random_weights_take_the_place_of_a_checkpoint(self, parse):
        parse("--config=tiny_cpu", "--random_weights", "--random_seed=3")
        found = flags.run_config()
        assert (found.checkpoint, found.random_weights) == ("", 3)
        assert flags.forwarded()[-2:] == ["--random_weights", "--random_seed=3"]
        parse("--random_weights", "--checkpoint=x")
        with pytest.raises(flags.UsageError, match="one of them"):
            flags.run_config()


class TestOverride:
    def test_values_that_fit_only_together_are_replaced_together(self):
        texts = ("platform=gpu", "engine.dtype=bfloat16", "cluster.slots_per_rank=4")
        found = flags.override(CONFIG, *texts, "cluster.redundancy=1")
        assert (found.platform, found.cluster.slots_per_rank) == ("gpu", 4)

    @pytest.mark.parametrize(
        ("text", "read", "value"),
        [
            ("cluster.ranks=8", lambda c: c.cluster.ranks, 8),
            ("cluster.policy=degrade", lambda c: c.cluster.policy, "degrade"),
            ("engine.combine=per_rank", lambda c: c.engine.combine, "per_rank"),
            ("model.norm_eps=1e-5", lambda c: c.model.norm_eps, 1e-5),
            ("model.rope_theta=5", lambda c: c.model.rope_theta, 5.0),
            ("model.norm_topk_prob=False", lambda c: c.model.norm_topk_prob, False),
            ("model.norm_topk_prob=true", lambda c: c.model.norm_topk_prob, True),
            ("cluster.sources=peer,backup", lambda c: c.cluster.sources, ("peer", "backup")),
            ("name=mine", lambda c: c.name, "mine"),
            ("checkpoint=/a=b", lambda c: c.checkpoint, "/a=b"),
            ("checkpoint=", lambda c: c.checkpoint, ""),
            ("random_weights=7", lambda c: c.random_weights, 7),
            ("device.memory_fraction=0.25", lambda c: c.device.memory_fraction, 0.25),
        ],
    )
    def test_one_value_is_replaced_and_has_its_type(self, text, read, value):
        found = flags.override(CONFIG, text)
        assert read(found) == value and type(read(found)) is type(value)
        assert read(CONFIG) != value or text == "model.norm_topk_prob=true"

    @pytest.mark.parametrize("text", ["random_weights=", "random_weights=None"])
    def test_a_value_that_may_be_none_is_taken_back(self, text):
        seeded = dataclasses.replace(CONFIG, random_weights=7)
        assert flags.override(seeded, text) == CONFIG

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("cluster.ranks", "part.name=value"),
            ("ranks=3", "'cluster'"),
            ("cluster.rank=3", "'ranks'"),
            ("gizmo.ranks=3", "'cluster'"),
            ("name.ranks=3", "no 'ranks'"),
            ("=3", "no ''"),
            ("cluster=3", "has parts"),
            ("model.latent=3", "has parts"),
            ("cluster.ranks=three", "of type int"),
            ("cluster.ranks=2.0", "of type int"),
            ("cluster.ranks=", "of type int"),
            ("model.norm_eps=small", "of type float"),
            ("model.norm_topk_prob=maybe", "true or false"),
            ("cluster.policy=hope", "fail_closed"),
            ("engine.combine=per_token", "per_choice"),
            ("cluster.ranks=0", "must be positive"),
            ("cluster.ranks=1", "redundancy"),
            ("cluster.ranks=2", "raise slots_per_rank"),
            ("engine.row_tile=7", "multiple"),
            ("engine.batch_slots=8", "batch_slots is now called batch_rows"),
            ("random_weights=some", "of type int"),
            ("device.memory_fraction=1", "between 0 and 1"),
            ("platform=gpu", "set engine.dtype=bfloat16"),
            ("engine.dispatch_dtype=float8_e4m3fn", "set engine.dtype=bfloat16"),
        ],
    )
    def test_an_unusable_value_is_named_with_the_way_out(self, text, says):
        with pytest.raises(flags.UsageError) as caught:
            flags.override(CONFIG, text)
        assert says in str(caught.value)
        assert str(caught.value).startswith(f"--override={text!r}")


class TestRunConfig:
    def test_the_named_configuration_with_overrides_in_order(self, parse):
        parse(
            "--config=tiny_cpu", "--override=name=a", "--override=name=b", "--port=0", "--host=::1"
        )
        config = flags.run_config()
        assert (config.name, config.serve.port, config.serve.host) == ("b", 0, "::1")
        assert config.model == CONFIG.model

    def test_what_is_not_said_stays(self, parse):
        parse()
        assert flags.run_config() == CONFIG

    @pytest.mark.parametrize("name", ["huge", "", "tiny_cpu.py", "../launch/flags", "__init__"])
    def test_an_unknown_configuration_names_those_there_are(self, parse, name):
        parse(f"--config={name}")
        with pytest.raises(flags.UsageError, match=r"not one of \[.*'tiny_cpu'"):
            flags.run_config()

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("x = 1", r"does not define get_config\(\) -> RunConfig; see .*tiny_cpu.py"),
            ("import nothing_there", "line 1: ModuleNotFoundError: No module named"),
            ("def get_config():\n    raise OSError('full')", "line 2: OSError: full"),
            ("def get_config(:", "line 1: SyntaxError"),
            ("def get_config():\n    return {}", r"get_config\(\) returned {}, not a RunConfig"),
        ],
    )
    def test_a_file_that_gives_no_configuration_is_one_line(self, parse, tmp_path, text, says):
        path = tmp_path / "mine.py"
        path.write_text(text)
        parse(f"--config={path}")
        with pytest.raises(flags.UsageError, match=says) as caught:
            flags.run_config()
        assert f"--config='{path}'" in str(caught.value) and "\n" not in str(caught.value)

    def test_other_processes_get_the_absolute_path_of_a_file(self, parse, tmp_path, monkeypatch):
        source = pathlib.Path(tiny_cpu.__file__).read_text()
        (tmp_path / "mine.py").write_text(source.replace('"tiny_cpu"', '"mine"'))
        monkeypatch.chdir(tmp_path)
        parse("--config=./mine.py", "--override=model.latent.kv_rank=3")
        with pytest.raises(flags.UsageError, match="NoneType has no 'kv_rank'"):
            flags.run_config()
        absl_flags.FLAGS["override"].value = []
        parse("--config=./mine.py")
        assert flags.run_config().name == "mine"
        assert f"--config={tmp_path / 'mine.py'}" in flags.forwarded()

    def test_another_process_is_given_the_same_configuration(self, parse):
        parse("--override=name=a", "--override=cluster.lease_ms=4000", "--port=0", "--host=h")
        config, words = flags.run_config(), flags.forwarded()
        absl_flags.FLAGS["override"].value = []
        absl_flags.FLAGS["port"].value = None
        parse(*words)
        assert flags.run_config() == config

    def test_the_part_of_gpu_memory_may_be_a_flag(self, parse):
        parse("--device_memory_fraction=0.3")
        assert flags.run_config().device.memory_fraction == 0.3
        assert "--device_memory_fraction=0.3" in flags.forwarded()
        parse("--device_memory_fraction=1.5")
        with pytest.raises(flags.UsageError, match=r"--device_memory_fraction: .*=1.5 must be"):
            flags.run_config()

    @pytest.mark.parametrize("words", [["--port=70000"], ["--port=x"], ["--rank=-1"], ["--what=1"]])
    def test_absl_refuses_what_is_out_of_range(self, parse, words):
        with pytest.raises(absl_flags.Error):
            parse(*words)


class TestGpus:
    @pytest.fixture(autouse=True)
    def two_gpus(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")

    def test_other_processes_get_the_list_of_gpus(self, parse):
        parse("--config=tiny_gpu")
        assert "--gpus=4,6" in flags.forwarded()
        parse("--config=tiny_gpu", "--gpus=6")
        assert "--gpus=6" in flags.forwarded()

    def test_a_run_on_cpu_asks_for_none(self, parse, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        parse("--config=tiny_cpu")
        assert not [word for word in flags.forwarded() if "gpus" in word]

    @pytest.mark.parametrize("words", [[], ["--gpus="], ["--gpus=-1"]])
    def test_without_one_the_error_says_where_it_looked_and_what_to_do(
        self, parse, monkeypatch, words
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        parse("--config=tiny_gpu", *words)
        with pytest.raises(flags.UsageError, match=r"--gpus=0,1.*platform cpu") as caught:
            flags.forwarded()
        assert (words or ["CUDA_VISIBLE_DEVICES='-1'"])[0].partition("=")[0] in str(caught.value)


class TestToken:
    @pytest.fixture(autouse=True)
    def no_variable(self, monkeypatch):
        monkeypatch.delenv(flags.TOKEN_VARIABLE, raising=False)

    def test_comes_from_the_run_directory(self, tmp_path):
        (tmp_path / "token").write_text(GOOD_TOKEN + "\n")
        assert flags.read_token(tmp_path) == GOOD_TOKEN

    def test_the_environment_wins(self, tmp_path, monkeypatch):
        (tmp_path / "token").write_text("another long token")
        monkeypatch.setenv(flags.TOKEN_VARIABLE, GOOD_TOKEN)
        assert flags.read_token(tmp_path) == GOOD_TOKEN

    def test_without_one_both_places_are_named(self, tmp_path):
        with pytest.raises(flags.UsageError) as caught:
            flags.read_token(tmp_path)
        assert flags.TOKEN_VARIABLE in str(caught.value) and str(tmp_path) in str(caught.value)

    @pytest.mark.parametrize("token", ["", "short", "x" * 15])
    def test_a_short_one_is_refused_and_not_shown(self, tmp_path, token):
        (tmp_path / "token").write_text(token)
        with pytest.raises(flags.UsageError, match=f"has {len(token)} characters") as caught:
            flags.read_token(tmp_path)
        assert not token or token not in str(caught.value).replace(str(tmp_path), "")

    def test_no_flag_takes_it(self):
        assert not [name for name in absl_flags.FLAGS if "token" in name]


class TestRunDir:
    def test_must_exist(self, parse, tmp_path):
        parse(f"--run_dir={tmp_path}")
        assert flags.required_run_dir() == tmp_path
        parse(f"--run_dir={tmp_path / 'none'}")
        with pytest.raises(flags.UsageError, match="must name the directory of a run"):
            flags.required_run_dir()

    def test_is_absolute(self, parse, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        parse("--run_dir=.")
        assert flags.required_run_dir() == pathlib.Path(tmp_path)


class TestMain:
    def test_an_error_of_usage_is_one_line_and_status_2(self, capsys):
        def main():
            raise flags.UsageError("write this instead")

        assert program.main_with_usage(main)(["program"]) == program.EXIT_USAGE
        assert capsys.readouterr().err == "error: write this instead\n"

    def test_a_child_of_a_launcher_marks_it_as_its_last_words(self, parse, capsys):
        parse("--run_dir=.", f"--parent_pid={os.getpid()}")
        program.print_end("write this instead")
        log = f"{capsys.readouterr().err}W rank 2 error: no more"
        assert find_last_words(log, os.getpid()) == "write this instead"
        assert find_last_words(log, 1) == ""

    def test_other_errors_are_not_hidden(self):
        def main():
            raise ValueError("a mistake of ours")

        with pytest.raises(ValueError, match="of ours"):
            program.main_with_usage(main)(["program"])

    def test_words_without_dashes_are_refused(self, capsys):
        assert program.main_with_usage(lambda: 0)(["program", "config=x"]) == program.EXIT_USAGE
        assert "config=x" in capsys.readouterr().err

    def test_the_status_of_main_is_passed_on(self):
        assert program.main_with_usage(lambda: 7)(["program"]) == 7


def test_every_value_of_the_configuration_can_be_overridden_with_itself():
    for text in each_value(CONFIG, ""):
        assert flags.override(CONFIG, text) == CONFIG


def each_value(config, path: str):
    """`part.name=value` of all values, also of parts of parts."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from each_value(value, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}={value}"
