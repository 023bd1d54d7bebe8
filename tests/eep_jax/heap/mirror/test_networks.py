"""Mirrors between two real network namespaces: nothing but a cable joins the two processes."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from eep_jax.heap.mirror.nixl import load_nixl
from tests.support.mirrors import SLAB_BYTES
from tests.support.netns import ADDRESSES, a_cable, why_not
from tests.support.waiting import is_readable

pytestmark = pytest.mark.multiprocess

ANSWER_S = 60.0
STREAMS = {"tcp": "TcpStream", "nixl": "NixlStream"}


class Process:
    """A rank in its namespace, asked and answering line by line."""

    def __init__(self, cable, rank: int, transport: str):
        module = "tests.eep_jax.heap.mirror.mirror_process"
        command = [sys.executable, "-m", module, str(rank), ADDRESSES[rank], transport]
        self._process = subprocess.Popen(
            cable.command(rank, command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, verb: str, *arguments):
        self._process.stdin.write(json.dumps([verb, *arguments]) + "\n")
        readable = is_readable(self._process.stdout.fileno(), ANSWER_S)
        assert readable, f"{verb} was not answered within {ANSWER_S} s"
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait(10)
            self._process.stdout.close()


@pytest.fixture(params=sorted(STREAMS), scope="module")
def world(request):
    """The cable, both ranks, attached to each other, and the name of their streams."""
    if reason := why_not():
        assert os.geteuid() != 0 or "ip netns add" in reason, reason
        pytest.skip(reason)
    if request.param == "nixl":
        try:
            load_nixl()
        except ImportError as error:
            pytest.skip(str(error))
    with contextlib.ExitStack() as stack:
        cable = stack.enter_context(a_cable())
        ranks = []
        for rank in (0, 1):
            ranks.append(Process(cable, rank, request.param))
            stack.callback(ranks[-1].close)
        handles = [rank.ask("handle") for rank in ranks]
        streams = [ranks[0].ask("attach", 1, handles[1]), ranks[1].ask("attach", 0, handles[0])]
        assert streams == [STREAMS[request.param]] * 2
        yield cable, ranks


def test_rounds_go_to_and_fro(world):
    _, (near, far) = world
    for number in range(2, 102, 2):
        near.ask("write", 1, number, number + 0.5)
        assert far.ask("wait", 0, number) == [number + 0.5] * 8
        far.ask("write", 0, number + 1, -float(number))
        assert near.ask("wait", 1, number + 1) == [-float(number)] * 8


def test_banks_are_read_across(world):
    _, (near, far) = world
    assert near.ask("read", 1, SLAB_BYTES - 4096, 4096) == [41]
    assert far.ask("read", 0, SLAB_BYTES - 4096, 4096) == [40]


def test_what_is_written_while_the_cable_is_cut_comes_when_it_is_mended(world):
    cable, (near, far) = world
    near.ask("write", 1, 200, 1.0)
    far.ask("wait", 0, 200)
    cable.cut()
    try:
        near.ask("write", 1, 201, 2.0)
        assert far.ask("seen", 0)[1] != 201
    finally:
        cable.mend()
    assert far.ask("wait", 0, 201) == [2.0] * 8
    near.ask("write", 1, 202, 3.0)
    assert far.ask("wait", 0, 202) == [3.0] * 8
