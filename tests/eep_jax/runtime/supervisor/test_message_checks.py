"""Messages that cannot be are refused with what was said and expected; all others pass."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eep_jax.engine.request import Progress
from eep_jax.errors import ProtocolError
from eep_jax.placement.sources import Backup
from eep_jax.runtime.control.messages import Hello, Telemetry
from eep_jax.runtime.supervisor.message_checks import (
    check_hello,
    check_progress,
    check_status,
    check_telemetry,
)
from tests.support.control_world import a_config
from tests.support.factories import a_status

CONFIG = a_config(ranks=2)  # four experts, four slots of each rank, 256 tokens
HELLO = Hello(rank=1, incarnation=0, pid=7, ticks=9, host="a", run="tiny")
TELEMETRY = Telemetry(compilations=0, steps=1, discarded=0, moved={})
STATUS = a_status(1, incarnation=2)


def test_what_fits_passes():
    check_hello(HELLO, CONFIG)
    check_telemetry(TELEMETRY, 1, CONFIG)
    for contents in ((), (0, 1, -1, 3)):
        check_status(dataclasses.replace(STATUS, contents=contents), 1, 2, CONFIG)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 2}, r"rank 2 is not in 0\.\.1"),
        ({"rank": -1}, r"rank -1 is not in 0\.\.1"),
        ({"run": "other"}, "rank 1 runs 'other', this is 'tiny'"),
        ({"pid": 0}, "its pid is 0"),
        ({"pid": 1 << 22}, "its pid is 4194304"),
    ],
)
def test_a_hello_must_fit_the_run(changes, reason):
    with pytest.raises(ProtocolError, match=reason):
        check_hello(dataclasses.replace(HELLO, **changes), CONFIG)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 0}, "a Status of rank 0 incarnation 2 on the channel of rank 1 incarnation 2"),
        ({"incarnation": 1}, "incarnation 1 on the channel of rank 1 incarnation 2"),
        ({"contents": (1, 2)}, "2 slots, expected 4"),
        ({"accused": (2,)}, r"accused ranks \(2,\) are not all in 0\.\.1"),
        ({"backup": Backup(experts=(4,))}, r"backups of \(4,\), not all are experts"),
        ({"rates": {"tape": 1.0}}, "rates of {'tape'}, expected some of"),
    ],
)
def test_a_status_must_be_its_senders_and_fit_the_cluster(changes, reason):
    with pytest.raises(ProtocolError, match=reason):
        check_status(dataclasses.replace(STATUS, **changes), 1, 2, CONFIG)


@given(st.lists(st.integers(-2, 5), max_size=6))
def test_telemetry_counts_every_expert_or_none(chosen):
    telemetry = dataclasses.replace(TELEMETRY, chosen=tuple(chosen))
    if len(chosen) in (0, 4) and all(count >= 0 for count in chosen):
        check_telemetry(telemetry, 1, CONFIG)
    else:
        with pytest.raises(ProtocolError, match=r"rank 1 counted .*, expected 4 counts"):
            check_telemetry(telemetry, 1, CONFIG)


@given(st.lists(st.integers(-1, 256), max_size=4), st.sampled_from(["", "stop", "cancelled"]))
def test_progress_has_tokens_of_the_vocabulary_and_an_end_of_a_rank(tokens, finish):
    progress = Progress(id="x", start=0, tokens=tuple(tokens), finish=finish)
    if finish != "cancelled" and all(0 <= token < 256 for token in tokens):
        check_progress(progress, 1, CONFIG)
    else:
        with pytest.raises(ProtocolError, match=r"rank 1 (ends x with|produced)"):
            check_progress(progress, 1, CONFIG)
