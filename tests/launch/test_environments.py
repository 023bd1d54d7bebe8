"""Environment of ranks: their GPU, their part of its memory, and the user's variables untouched."""

import pathlib
import subprocess
import sys

import pytest

from eep_jax.library.environment import cpu_environment
from launch import rank as rank_module
from launch.environments import local
from launch.environments.local import (
    GPU_XLA_FLAGS,
    GpuShare,
    add_flags,
    gpu_rank_environment,
    gpu_share,
    parse_gpus,
    visible_gpus,
)
from launch.flags import UsageError

CACHE = pathlib.Path("/run/compile_cache")
LISTED = "GPU 0: NVIDIA H100 (UUID: GPU-aa)\nGPU 1: NVIDIA H100 (UUID: GPU-bb)\n"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


class TestGpuShare:
    @pytest.mark.parametrize(
        ("ranks", "gpus", "found"),
        [
            (4, ("0",), [("0", 0.15)] * 4),
            (4, ("0", "1"), [("0", 0.3), ("1", 0.3)] * 2),
            (3, ("5", "7"), [("5", 0.3), ("7", 0.6), ("5", 0.3)]),
            (2, ("0", "1", "2"), [("0", 0.6), ("1", 0.6)]),
        ],
    )
    def test_ranks_go_around_the_gpus_and_share_each_fairly(self, ranks, gpus, found):
        shares = [gpu_share(rank, ranks, gpus, 0.6) for rank in range(ranks)]
        assert [(s.gpu, pytest.approx(s.memory_fraction)) for s in shares] == found

    def test_without_a_gpu_there_is_nothing_to_share(self):
        with pytest.raises(ValueError, match="no NVIDIA GPU"):
            gpu_share(0, 4, (), 0.6)


class TestVisibleGpus:
    def listing(self, monkeypatch, stdout="", error=None):
        def run(command, **_):
            assert command == ["nvidia-smi", "-L"]
            if error:
                raise error
            return subprocess.CompletedProcess(command, 0, stdout, "")

        monkeypatch.setattr(local.subprocess, "run", run)

    def test_all_that_the_driver_lists(self, monkeypatch):
        self.listing(monkeypatch, LISTED)
        assert visible_gpus() == ("0", "1")

    def test_the_variable_wins_also_where_it_names_none(self, monkeypatch):
        self.listing(monkeypatch, LISTED)
        for value, found in (("3,GPU-bb", ("3", "GPU-bb")), ("", ()), ("-1", ())):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
            assert visible_gpus() == found

    @pytest.mark.parametrize(
        "error", [FileNotFoundError(2, "no such file"), subprocess.TimeoutExpired("nvidia-smi", 1)]
    )
    def test_a_machine_without_a_driver_has_none(self, monkeypatch, error):
        self.listing(monkeypatch, error=error)
        assert visible_gpus() == ()

    def test_words_of_a_driver_that_fails_are_no_gpus(self, monkeypatch):
        self.listing(monkeypatch, "Failed to initialize NVML: Driver/library version mismatch\n")
        assert visible_gpus() == ()

    def test_names_are_read_as_cuda_reads_them(self):
        assert parse_gpus(" 0, 2 ,") == ("0", "2") and parse_gpus("1,-1,2") == ("1",)


class TestGpuEnvironment:
    def test_a_rank_sees_its_gpu_alone_and_takes_its_part(self):
        found = gpu_rank_environment(GpuShare("3", 0.15), CACHE)
        assert found["CUDA_VISIBLE_DEVICES"] == "3" and found["JAX_PLATFORMS"] == "cuda,cpu"
        assert found["XLA_CLIENT_MEM_FRACTION"] == "0.1500"
        assert found["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "", "JAX refuses both names at once"
        assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in found
        assert set(GPU_XLA_FLAGS) == set(found["XLA_FLAGS"].split())

    def test_executables_are_kept_for_the_process_that_returns(self, monkeypatch):
        found = gpu_rank_environment(GpuShare("0", 0.5), CACHE)
        assert found["JAX_COMPILATION_CACHE_DIR"] == str(CACHE)
        assert found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
        assert found["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] == "-1"
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
        found = gpu_rank_environment(GpuShare("0", 0.5), CACHE)
        assert found["JAX_COMPILATION_CACHE_DIR"] == "/mine"

    def test_flags_of_the_user_stay_and_win(self, monkeypatch):
        monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/d --xla_gpu_graph_min_graph_size=5")
        words = gpu_rank_environment(GpuShare("0", 0.5), CACHE)["XLA_FLAGS"].split()
        assert words[:2] == ["--xla_dump_to=/d", "--xla_gpu_graph_min_graph_size=5"]
        assert words[2:] == [GPU_XLA_FLAGS[0]]

    def test_a_flag_is_compared_by_its_whole_name(self):
        assert add_flags("--a=1 --bc", ("--a=2", "--b=3", "--bc=4")) == "--a=1 --bc --b=3"
        assert add_flags("", ("--a=2",)) == "--a=2"

    def test_variables_are_those_that_jax_reads(self):
        """An unknown name would be ignored without a word."""
        names = gpu_rank_environment(GpuShare("0", 0.5), CACHE)
        code = "import jax, jaxlib.xla_client as c\nprint(c.generate_pjrt_gpu_plugin_options())\n"
        code += "\n".join(
            f"print(jax.config.{name.lower()})" for name in names if name.startswith("JAX_P")
        )
        code += "\nprint(jax.config.jax_compilation_cache_dir)"
        found = subprocess.run(
            [sys.executable, "-c", code], env=names, capture_output=True, text=True, timeout=60
        )
        assert found.returncode == 0, found.stderr
        options, *values = found.stdout.splitlines()
        assert "'memory_fraction': 0.5" in options
        assert set(values) == {"0.0", "-1", "cuda,cpu", str(CACHE)}


def test_a_cpu_rank_computes_on_one_thread_and_uses_no_cache_of_the_user(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/d")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    assert cpu_environment() == {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_dump_to=/d --xla_cpu_multi_thread_eigen=false",
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


class TestBackend:
    def test_what_the_configuration_says_is_right(self):
        rank_module.require_backend("cpu")

    def test_another_one_is_refused_with_the_way_out(self):
        with pytest.raises(UsageError, match=r"platform 'gpu', JAX computes on 'cpu'.*cuda13"):
            rank_module.require_backend("gpu")

    def test_one_that_cannot_be_loaded_is_an_error_of_usage(self, monkeypatch):
        def fails():
            raise RuntimeError("Unable to initialize backend 'cuda'")

        monkeypatch.setattr("jax.default_backend", fails)
        with pytest.raises(UsageError, match=r"nothing: Unable to initialize backend.*cuda12"):
            rank_module.require_backend("gpu")
