"""The doctor names each fault of a machine with its remedy, and survives broken parts."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from configs import qwen3_30b_a3b_h100x4, small_moe_h100x1, tiny_cpu, tiny_gpu
from eep_jax.errors import HeapError
from eep_jax.heap.cuda.libcuda import GpuFacts, survey
from eep_jax.models.expert_bank import slab_layout
from eep_jax.models.memory import memory_per_rank
from launch.doctor.checks import check
from launch.doctor.finding import Level, numbers
from launch.doctor.machine import OPTIONAL, Machine
from launch.doctor.probe import PACKAGES, _container_free, ask
from tests.support.fake_cuda import put_fake_driver

ROOT = pathlib.Path(__file__).parents[2]
CPU, GPU = tiny_cpu.get_config(), tiny_gpu.get_config()
HOPPER = GpuFacts(
    name="NVIDIA H100",
    total_bytes=80 << 30,
    capability=(9, 0),
    maps_memory=True,
    exports_fds=True,
    peers=(),
)
JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "127.0.0.5",
    "SLURM_NTASKS": "4",
}


def a_machine(**changes) -> Machine:
    """One without a fault, with four GPUs."""
    right = Machine(
        python=(3, 12, 1),
        kernel=(6, 1),
        packages=dict.fromkeys(PACKAGES, "13.0") | {"jax": "0.11.2", "jaxlib": "0.11.2"},
        jax_backend="gpu",
        jax_devices=4,
        cpus=64,
        memory_bytes=256 << 30,
        memory_free_bytes=200 << 30,
        backup_free_bytes=100 << 30,
        open_files=65_536,
        ports={"127.0.0.1:8000": ""},
        driver="580.65",
        cuda=13_000,
        gpus=gpus(),
        slurm={"sbatch": "slurm 23.11.4", "srun": "slurm 23.11.4", "scontrol": "slurm 23.11.4"},
        slurm_variables=JOB,
    )
    return dataclasses.replace(right, **changes)


def wrong(config=GPU, **changes) -> dict[str, Level]:
    found = check(a_machine(**changes), config)
    assert all(f.fix for f in found if f.level is not Level.OK), "a fault without a way out"
    return {f.subject: f.level for f in found if f.level is not Level.OK}


def gpus(**changes) -> tuple[GpuFacts, ...]:
    apart = (dataclasses.replace(HOPPER, peers=tuple({0, 1, 2, 3} - {g})) for g in range(4))
    return tuple(dataclasses.replace(gpu, **changes) for gpu in apart)


def packages(**versions) -> dict[str, str | None]:
    return a_machine().packages | versions


@pytest.mark.parametrize("config", [CPU, GPU], ids=lambda c: c.name)
def test_a_machine_without_a_fault_has_none(config):
    assert wrong(config) == {}


@pytest.mark.parametrize(
    ("changes", "subject", "level"),
    [
        ({"python": (3, 11, 9)}, "Python", Level.FAIL),
        ({"packages": packages(flax=None)}, "packages", Level.FAIL),
        ({"packages": packages(jax="0.10.9", jaxlib="0.10.9")}, "JAX", Level.FAIL),
        ({"packages": packages(jax="0.13.0", jaxlib="0.13.0")}, "JAX", Level.FAIL),
        ({"packages": packages(jax="0.12.0")}, "jaxlib", Level.WARN),
        ({"jax_error": "ImportError: no"}, "JAX runs", Level.FAIL),
        ({"jax_backend": "cpu"}, "JAX runs", Level.FAIL),
        ({"kernel": (4, 18)}, "Linux", Level.FAIL),
        ({"pidfds": False}, "Linux", Level.FAIL),
        ({"memory_files": False}, "shared memory", Level.FAIL),
        ({"backup_free_bytes": 1 << 20}, "backups", Level.WARN),
        ({"backup_free_bytes": None}, "backups", Level.WARN),
        ({"open_files": 256}, "open files", Level.WARN),
        ({"memlock_bytes": 0}, "locked memory", Level.WARN),
        ({"cpus": 2}, "CPU cores", Level.WARN),
        ({"ports": {"n0:8000": "Address already in use"}}, "port n0:8000", Level.FAIL),
        ({"gpus": ()}, "GPUs", Level.FAIL),
        ({"gpu_error": "CUDA_ERROR_NO_DEVICE", "gpus": ()}, "GPUs", Level.FAIL),
        ({"cuda": 12_080}, "GPU driver", Level.FAIL),
        ({"gpus": gpus(capability=(8, 0))}, "GPU compute capability", Level.FAIL),
        ({"gpus": gpus(maps_memory=False)}, "GPU virtual memory", Level.FAIL),
        ({"gpus": gpus(exports_fds=False)}, "GPU file descriptors", Level.FAIL),
        ({"gpus": gpus(peers=())}, "GPU peer access", Level.FAIL),
        ({"slurm": {}}, "SLURM", Level.FAIL),
        ({"slurm": dict.fromkeys(["sbatch", "srun", "scontrol"], "")}, "SLURM", Level.FAIL),
        ({"slurm": {"sbatch": "slurm 23.11.4"}}, "SLURM", Level.WARN),
        ({"slurm_error": "down"}, "SLURM controller", Level.WARN),
        ({"slurm_variables": JOB | {"SLURM_NTASKS": "3"}}, "SLURM tasks", Level.WARN),
    ],
)
def test_each_fault_is_found_alone_with_what_to_do(changes, subject, level):
    assert wrong(**changes) == {subject: level}


def test_a_job_of_several_nodes_is_for_cpu_ranks_and_not_on_loopback():
    several = {"slurm_variables": JOB | {"SLURM_JOB_NODELIST": "127.0.0.5,n1"}}
    assert wrong(CPU, **several) == {"SLURM job": Level.FAIL}
    assert wrong(GPU, **several) == {"SLURM job": Level.FAIL, "SLURM nodes": Level.FAIL}


def test_gpus_of_a_cpu_configuration_may_have_any_fault():
    assert wrong(CPU, gpu_error="no driver", gpus=(), jax_backend="cpu") == {}


def test_slurm_may_be_missing_outside_of_jobs():
    assert wrong(slurm={}, slurm_variables={}) == {}


class TestMemory:
    @pytest.mark.parametrize("config", [CPU, GPU, small_moe_h100x1.get_config()])
    def test_a_slab_is_counted_as_the_heap_lays_it_out(self, config):
        cluster = config.cluster
        layout = slab_layout(config.model, config.engine, cluster.ranks, cluster.slots_per_rank)
        page = 4096  # between window and bank, and at the end
        needed = memory_per_rank(config)
        slab = needed.window + needed.experts
        assert layout.slab_bytes - 2 * page <= slab <= layout.slab_bytes

    def test_more_ranks_than_a_host_holds(self):
        assert wrong(CPU, memory_free_bytes=1 << 30) == {"memory": Level.FAIL}

    def test_a_gpu_that_is_too_small_for_the_model_or_the_heap(self):
        config = small_moe_h100x1.get_config()
        small = tuple(dataclasses.replace(gpu, total_bytes=8 << 30) for gpu in gpus())
        assert wrong(config, gpus=small) == {"GPU memory, heap": Level.FAIL}
        greedy = dataclasses.replace(
            config, device=dataclasses.replace(config.device, memory_fraction=0.01)
        )
        assert wrong(greedy) == {"GPU memory, model": Level.FAIL}

    def test_ranks_that_share_fewer_gpus_need_more_of_each(self):
        config = dataclasses.replace(
            small_moe_h100x1.get_config(),
            device=dataclasses.replace(GPU.device, memory_fraction=0.6),
        )
        machine = a_machine(gpus=gpus(total_bytes=32 << 30))
        levels = {f.subject: f.level for f in check(machine, config, gpus=1)}
        assert levels["GPU memory, heap"] is Level.FAIL
        assert levels["GPUs"] is Level.WARN
        assert wrong(config, gpus=gpus(total_bytes=32 << 30)) == {}

    def test_a_published_model_that_fits_its_gpus_is_found_to_fit(self):
        assert wrong(qwen3_30b_a3b_h100x4.get_config()) == {}


def test_a_container_may_have_less_memory_than_its_machine(tmp_path):
    assert _container_free(tmp_path) == sys.maxsize
    for name, text in (("current", "1000\n"), ("max", "max\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert _container_free(tmp_path) == sys.maxsize
    (tmp_path / "memory.max").write_text("5000\n")
    assert _container_free(tmp_path) == 4000
    (tmp_path / "memory.stat").write_text("anon 300\nactive_file 200\ninactive_file 500\n")
    assert _container_free(tmp_path) == 4700  # files in the page cache make room


class TestAsking:
    def test_an_answer_is_the_last_line(self):
        assert ask("print('noise'); print([1, 'x'])".replace("'x'", "2"), 30.0) == ([1, 2], "")

    @pytest.mark.parametrize(
        ("program", "error"),
        [
            ("raise ImportError('no jaxlib')", "ImportError: no jaxlib"),
            ("import os; os.abort()", "ended by SIGABRT"),
            ("import time; time.sleep(60)", "no answer within 0.5 s"),
            ("print('hello')", "no answer but 'hello"),
            ("raise SystemExit(3)", "exit status 3"),
        ],
    )
    def test_what_breaks_is_a_finding(self, program, error):
        answer, said = ask(program, 0.5 if "sleep" in program else 30.0)
        assert answer is None
        assert error in said


class TestSurvey:
    def test_gpus_are_described_without_a_context(self, monkeypatch):
        fake = put_fake_driver(monkeypatch, total_bytes=80 << 30)
        assert survey() == (13_000, (HOPPER,))
        assert fake.contexts == 0

    def test_a_driver_that_refuses_says_which_call(self, monkeypatch):
        put_fake_driver(monkeypatch).fail("cuInit")
        with pytest.raises(HeapError, match="cuInit of a survey of the GPUs failed"):
            survey()


def test_every_dependency_of_the_project_is_looked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", text)[0] for text in project["dependencies"]}
    assert set(PACKAGES) == names | set(OPTIONAL)


def test_versions_are_numbers():
    assert numbers("slurm-wlm 22.05.8") == (22, 5, 8)
    assert numbers("0.12.0.dev2026+x") == (0, 12, 0)
    assert numbers("") == ()


def test_the_real_machine_even_where_jax_cannot_be_loaded(tmp_path):
    """Runs the command, with a jaxlib in front of the real one that cannot be loaded."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/jaxlib.py").write_text("raise ImportError('a broken jaxlib')")
    command = [sys.executable, "-m", "launch.doctor", "--config=tiny_cpu", "--port=0", "--json"]
    for path, broken in ((str(ROOT), False), (f"{tmp_path}/broken{os.pathsep}{ROOT}", True)):
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
        )
        said = json.loads(done.stdout)
        levels = {finding["subject"]: finding["level"] for finding in said["findings"]}
        assert done.returncode == (not said["ok"]) == ("FAIL" in levels.values()), done.stderr
        assert levels["Python"] == levels["Linux"] == levels["shared memory"] == "OK"
        assert levels["JAX runs"] == ("FAIL" if broken else "OK"), said
        if broken:
            assert "a broken jaxlib" in said["machine"]["jax_error"]
