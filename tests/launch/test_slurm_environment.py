"""A process of a SLURM job knows its rank, its node and the supervisor from SLURM's variables."""

import os
import shutil
import subprocess

import pytest
from absl import flags
from absl.testing import flagsaver
from hypothesis import given
from hypothesis import strategies as st

from launch import flags as launch_flags
from launch.environments.environment import Address, Identity, parse_address
from launch.environments.local import LocalEnvironment
from launch.environments.slurm import SlurmEnvironment, expand_counts, expand_hostlist
from launch.errors import UsageError
from launch.supervise import with_supervisor_addresses

# As SLURM 22.05 sets them in task 3 of 6, the second one on the second of three nodes.
STEP = {
    "SLURM_JOB_ID": "40017",
    "SLURM_JOB_NODELIST": "n[0-2]",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_TASKS_PER_NODE": "2(x3)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
# In an `srun --overlap` of one task in the same job.
REPLACEMENT = STEP | {
    "SLURM_NTASKS": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_TASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
LOOPBACK = {"loop": "127.0.1.1", "loop6": "::1", "any": "0.0.0.0"}
HOSTS = {"n0": "10.0.0.5", "host": "10.0.0.9"} | LOOPBACK


def resolve(host: str) -> str:
    if host not in HOSTS:
        raise OSError("Name or service not known")
    return HOSTS[host]


def environment(variables=STEP, **options) -> SlurmEnvironment:
    return SlurmEnvironment(variables, resolve=resolve, **options)


class TestIdentity:
    def test_a_task_is_the_rank_of_its_number(self):
        found = environment().identity(6, None, None, None)
        assert found == Identity(rank=3, local_rank=1, local_ranks=2)

    def test_what_is_given_wins_for_srun_overlap_sees_task_0_of_1(self):
        found = environment(REPLACEMENT).identity(6, 3, 1, 2)
        assert found == Identity(rank=3, local_rank=1, local_ranks=2)

    def test_a_step_of_some_ranks_names_them(self):
        variables = REPLACEMENT | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
        found = environment(variables, task_ranks=(2, 5)).identity(6, None, None, None)
        assert found.rank == 5
        with pytest.raises(UsageError, match="names 3 ranks, the step has 2 tasks"):
            environment(variables, task_ranks=(2, 5, 1)).identity(6, None, None, None)

    def test_another_number_of_tasks_than_ranks_is_refused_with_both_ways_out(self):
        with pytest.raises(UsageError, match=r"6 tasks.* 4 ranks.*--ntasks=4.*cluster\.ranks=6"):
            environment().identity(4, None, None, None)

    def test_a_rank_that_the_run_does_not_have_is_refused(self):
        with pytest.raises(UsageError, match=r"--rank=6 must be in 0\.\.5"):
            environment().identity(6, 6, None, None)
        with pytest.raises(UsageError, match="local rank 2 of 2"):
            environment().identity(6, 5, 2, 2)

    @pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"])
    def test_outside_of_a_step_it_says_which_variable_is_missing(self, name):
        variables = {key: value for key, value in STEP.items() if key != name}
        with pytest.raises(UsageError, match=f"{name} is not set: start this with sbatch or srun"):
            environment(variables).identity(6, None, None, None)

    def test_without_slurm_the_rank_is_given(self):
        found = LocalEnvironment().identity(4, 2, None, None)
        assert found == Identity(rank=2, local_rank=2, local_ranks=4)
        with pytest.raises(UsageError, match="--rank=None"):
            LocalEnvironment().identity(4, None, None, None)


class TestSupervisor:
    def test_it_is_on_the_first_node_at_a_port_of_the_job(self):
        assert environment().supervisor("", 0) == Address("10.0.0.5", 20017)
        assert environment().http(Address("10.0.0.5", 1)) == Address("10.0.0.5", 10017)

    def test_a_configured_port_and_a_given_address_win(self):
        assert environment().supervisor("", 555) == Address("10.0.0.5", 555)
        assert environment().supervisor("host:77", 555) == Address("10.0.0.9", 77)
        assert LocalEnvironment().supervisor("host:77", 0) == Address("host", 77)
        assert LocalEnvironment().supervisor("", 555) is None

    @pytest.mark.parametrize("host", LOOPBACK)
    def test_loopback_is_refused_where_there_are_other_nodes(self, host):
        advice = r"--supervisor=.* resolves to .*none of the other nodes of job 40017.*/etc/hosts"
        given = "[loop6]:77" if host == "loop6" else f"{host}:77"
        with pytest.raises(UsageError, match=advice):
            environment().supervisor(given, 0)
        first = STEP | {"SLURM_JOB_NODELIST": f"{host},n[1-2]"}
        with pytest.raises(UsageError, match=f"{host}, the first node of the job, resolves to"):
            environment(first).supervisor("", 0)

    def test_loopback_will_do_for_a_job_of_one_node(self):
        one = STEP | {"SLURM_JOB_NODELIST": "loop"}
        assert environment(one).supervisor("", 0) == Address("127.0.1.1", 20017)

    def test_an_unknown_host_name_is_refused(self):
        with pytest.raises(UsageError, match="cannot be resolved: Name or service not known"):
            environment().supervisor("elsewhere:77", 0)

    @pytest.mark.parametrize("text", ["n0", "n0:", ":20017", "n0:0", "n0:65536", "n0:-1", "n0:x"])
    def test_an_address_needs_host_and_port(self, text):
        with pytest.raises(UsageError, match="must be HOST:PORT"):
            parse_address(text)

    def test_an_address_is_written_as_it_is_read(self):
        for text in ("n0:20017", "[fd00::1]:20017"):
            assert str(parse_address(text)) == text


def test_the_batch_script_knows_where_its_tasks_are():
    variables = STEP | {"SLURM_JOB_NODELIST": "a,b7", "SLURM_TASKS_PER_NODE": "2,1"}
    assert environment(variables).places() == ((0, "a", 0, 2), (1, "a", 1, 2), (2, "b7", 0, 1))
    with pytest.raises(UsageError, match="2 nodes and tasks for 3"):
        environment(variables | {"SLURM_TASKS_PER_NODE": "1(x3)"}).places()


class TestShortForms:
    @pytest.mark.parametrize(
        ("text", "names"),
        [
            ("n0", "n0"),
            ("n[0-2,07],login", "n0 n1 n2 n07 login"),
            ("gpu-[08-11]-ib", "gpu-08-ib gpu-09-ib gpu-10-ib gpu-11-ib"),
            ("r[0-1]c[1,3]", "r0c1 r0c3 r1c1 r1c3"),
            ("n[9-11]", "n9 n10 n11"),
            ("n[098-101]", "n098 n099 n100 n101"),
        ],
    )
    def test_node_lists(self, text, names, tmp_path):
        assert " ".join(expand_hostlist(text)) == names
        # SLURM's own answer; that of 22.05 to letters after the last bracket is empty.
        if shutil.which("scontrol") and not text.endswith("-ib"):
            (tmp_path / "slurm.conf").write_text("ClusterName=c\nSlurmctldHost=localhost\n")
            asked = subprocess.run(
                ["scontrol", "show", "hostnames", text],
                env={"SLURM_CONF": str(tmp_path / "slurm.conf"), "PATH": os.environ["PATH"]},
                capture_output=True,
                text=True,
                timeout=30,
            )
            assert asked.returncode == 0, asked.stderr
            assert asked.stdout.split() == names.split()

    @given(st.lists(st.integers(0, 999), min_size=1, max_size=8, unique=True), st.integers(1, 4))
    def test_every_number_is_a_node_in_its_place(self, numbers, width):
        text = "x[" + ",".join(f"{number:0{width}}" for number in numbers) + "]y,z"
        expected = [f"x{number:0{width}}y" for number in numbers]
        assert list(expand_hostlist(text)) == [*expected, "z"]

    @pytest.mark.parametrize("text", ["n[0-2", "n0]", "n[a-b]", "n[]", "n[1-]"])
    def test_what_is_no_node_list_is_refused(self, text):
        with pytest.raises(UsageError, match="node list"):
            expand_hostlist(text)

    def test_one_that_names_too_many_is_refused(self):
        with pytest.raises(UsageError, match="more than 100000"):
            expand_hostlist("n[0-999999999]")

    def test_numbers_per_node(self):
        assert expand_counts("2(x3),1") == (2, 2, 2, 1)
        assert expand_counts("4") == (4,)
        with pytest.raises(UsageError, match="expected a form as"):
            expand_counts("2x3")


class TestWhatTheSupervisorListensAt:
    @pytest.fixture
    def listens(self, monkeypatch):
        def addresses(*arguments: str):
            with flagsaver.flagsaver():
                flags.FLAGS(["program", *arguments])
                serve = with_supervisor_addresses(launch_flags.run_config()).serve
            return (serve.control_host, serve.control_port), (serve.host, serve.port)

        for name, value in STEP.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SLURM_JOB_NODELIST", "127.0.0.5")
        return addresses

    def test_locally_it_is_as_configured_or_as_given(self, listens):
        assert listens() == (("127.0.0.1", 0), ("127.0.0.1", 8000))
        found = listens("--supervisor=10.9.9.9:7", "--host=::1", "--port=1")
        assert found == (("10.9.9.9", 7), ("::1", 1))

    def test_in_a_job_both_are_on_its_first_node_unless_said_otherwise(self, listens):
        job = "--environment=slurm"
        assert listens(job) == (("127.0.0.5", 20017), ("127.0.0.5", 10017))
        found = listens(job, "--supervisor=10.9.9.9:7", "--port=0")
        assert found == (("10.9.9.9", 7), ("10.9.9.9", 0))
        assert listens(job, "--host=127.0.0.1")[1] == ("127.0.0.1", 10017)
        assert listens(job, "--override=serve.control_port=99")[0] == ("127.0.0.5", 99)
