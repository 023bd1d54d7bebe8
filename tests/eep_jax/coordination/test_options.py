"""What an operator configures is what the coordinator goes by."""

import dataclasses

from eep_jax.coordination.options import coordinator_options
from eep_jax.placement.sources import SourceKind
from tests.support.control_world import a_config


def test_every_value_of_the_same_name_is_taken_over():
    numbers = {"redundancy": 2, "background_experts": 7, "imbalance_max": 1.75}
    times = ("formation_ms", "fenced_grace_ms", "restart_grace_ms", "channel_grace_ms", "stall_ms")
    numbers |= {name: 1_234 + place for place, name in enumerate(times)}
    numbers |= {"lease_ms": 9_001, "accused_lease_ms": 801}
    config = a_config(ranks=3, slots_per_rank=5, **numbers)
    options = coordinator_options(config)
    assert (options.ranks, options.experts, options.slots_per_rank) == (3, 4, 5)
    found = dataclasses.asdict(options)
    found |= found["detector"]
    assert {name: found[name] for name in numbers} == numbers


def test_policy_and_sources_become_what_decisions_read():
    options = coordinator_options(a_config())
    assert (options.degrade, options.measured) == (False, True)
    config = a_config(policy="degrade", source_order="tier", sources=("backup", "local"))
    options = coordinator_options(config)
    assert (options.degrade, options.measured) == (True, False)
    assert options.sources == (SourceKind.BACKUP, SourceKind.LOCAL)
