"""View and Placement as arrays of fixed shape, for the compiled step."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt32

from eep_jax.membership.view import View
from eep_jax.placement.placement import Placement
from pallas_kernels.exchange.call import Call, address_words

NO_SLOT = -1


@jax.tree_util.register_dataclass
@typing.no_type_check  # leaves may be abstract under tree.map
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """Arguments of a step. Changed values never recompile; shapes never change."""

    epoch: UInt32[Array, ""]
    active: Int32[Array, "R"]  # 1 for the ranks of this epoch
    expert_slots: Int32[Array, "E M"]  # flat slot ids of an expert's replicas, then NO_SLOT
    replicas: Int32[Array, "E"]


def build_tables(view: View, placement: Placement, rank: int) -> Tables:
    """The tables of one rank. A replica on the rank itself comes first: it costs no transfer.

    M is the number of ranks, since a rank holds an expert once at most.
    """
    ranks, slots = len(view.members), placement.slots_per_rank
    active = np.zeros(ranks, np.int32)
    active[list(view.in_epoch)] = 1
    expert_slots = np.full((placement.experts, ranks), NO_SLOT, np.int32)
    replicas = np.zeros(placement.experts, np.int32)
    for expert, places in placement.replicas().items():
        live = sorted((p for p in places if active[p[0]]), key=lambda p: (p[0] - rank) % ranks)
        ids = [r * slots + slot for r, slot in live]
        if ids and ids[0] // slots == rank:
            ids = ids[:1]
        expert_slots[expert, : len(ids)] = ids
        replicas[expert] = len(ids)
    return check_tables(
        Tables(
            epoch=np.uint32(view.epoch), active=active, expert_slots=expert_slots, replicas=replicas
        )
    )


def solo_tables(ranks: int, experts: int, slots_per_rank: int, rank: int) -> Tables:
    """Tables for warming up a rank alone: every expert in its slots, epoch 0."""
    active = np.zeros(ranks, np.int32)
    active[rank] = 1
    expert_slots = np.full((experts, ranks), NO_SLOT, np.int32)
    expert_slots[:, 0] = rank * slots_per_rank + np.arange(experts) % slots_per_rank
    return Tables(
        epoch=np.uint32(0),
        active=active,
        expert_slots=expert_slots,
        replicas=np.ones(experts, np.int32),
    )


def call_of(tables: Tables, rank: int, deadline_ms: int, abort_address: int) -> Call:
    """The argument of an epoch's exchanges on `rank`; each step sets round and vote.

    `abort_address` is the address of the abort word for kernels (`SymmetricHeap.control_address`).
    """
    return Call(
        rank=np.int32(rank),
        active=tables.active,
        epoch=tables.epoch,
        round=np.uint32(0),
        deadline_ms=np.uint32(deadline_ms),
        vote=np.uint32(0),
        suspicion=np.zeros(len(tables.active), np.int32),
        abort_address=address_words(abort_address),
    )


def check_tables(tables: Tables) -> Tables:
    """Returns the tables, or raises ValueError naming the expert whose entry is wrong."""
    held = np.sum(tables.expert_slots != NO_SLOT, axis=1)
    if (wrong := np.flatnonzero(held != tables.replicas)).size:
        raise ValueError(
            f"experts {wrong.tolist()} have {held[wrong]} slots, not {tables.replicas[wrong]}"
        )
    return tables


def assign(expert_ids: Int32[Array, "T K"], tables: Tables) -> Int32[Array, "T K"]:
    """The flat slot that runs each choice, NO_SLOT for id -1 or an expert without a live replica.

    Replicas take turns by token: token 5 of an expert with two replicas goes to the second.
    """
    known = jnp.maximum(expert_ids, 0)
    token = jnp.arange(expert_ids.shape[0], dtype=jnp.int32)[:, None]
    turn = token % jnp.maximum(tables.replicas[known], 1)
    return jnp.where(expert_ids >= 0, tables.expert_slots[known, turn], NO_SLOT)
