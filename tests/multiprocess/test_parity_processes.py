"""Real ranks serve a Hugging Face directory: transformers' tokens, also after a kill."""

import pytest

from tests.support.parity import ROOT, reference
from tests.support.processes import ClusterUnderTest, is_out

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]

NAME = "deepseek_v3"
# Nothing but the directory has the experts of a rank that dies.
OVERRIDES = ("cluster.redundancy=1", "cluster.slots_per_rank=3", "cluster.backup_bytes=0")


def text_of(tokens) -> str:
    return bytes(int(token) for token in tokens).decode("ascii")


def test_killed_ranks_of_a_hugging_face_directory_change_no_token(tmp_path):
    wanted = reference(NAME)
    body = {"model": NAME, "max_tokens": len(wanted.tokens), "temperature": 0}
    # What follows the prompt, and what follows its continuation.
    bodies = [
        body | {"prompt": text_of(wanted.prompt[1:])},
        body | {"prompt": text_of([*wanted.prompt[1:], *wanted.tokens[:9]]), "max_tokens": 23},
    ]
    arguments = [f"--checkpoint={ROOT / NAME}"]
    with ClusterUnderTest(tmp_path, *OVERRIDES, arguments=arguments, requests=bodies) as cluster:
        assert [result.text for result in cluster.truth] == [
            text_of(wanted.tokens),
            text_of(wanted.tokens[9:]),
        ]
        before = cluster.status()
        with cluster.load():
            cluster.signal(1)
            status = cluster.wait(is_out(1), "the eviction of rank 1")
            cluster.wait_whole()
        read = sum(rank["experts_moved"].get("checkpoint", 0) for rank in status["ranks"])
        assert status["experts"]["missing"] == []
        assert read > 0, before["experts"]
