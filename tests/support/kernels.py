"""Random work for the kernels, and naive loops that compute what each of them promises."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Input of all ranks to one exchange: rows `[R T D]`, flat slots and weights `[R T K]`."""

    x: np.ndarray
    slots: np.ndarray
    weights: np.ndarray
    active: np.ndarray  # [R], 1 for the ranks of the epoch
    slots_per_rank: int

    @property
    def ranks(self) -> int:
        return len(self.active)

    @property
    def members(self) -> list[int]:
        return np.flatnonzero(self.active).tolist()

    def among(self, members) -> "Exchange":
        """The same work in an epoch of just these members."""
        active = np.isin(np.arange(self.ranks), list(members)).astype(np.int32)
        return dataclasses.replace(self, active=active)


def an_exchange(
    seed: int = 0,
    *,
    ranks: int = 4,
    tokens: int = 8,
    choices: int = 3,
    hidden: int = 16,
    slots_per_rank: int = 3,
    none_share: float = 0.2,
    only_ranks=None,
) -> Exchange:
    """Random rows and routings. A share of the choices is -1, all others are on `only_ranks`."""
    random = np.random.default_rng(seed)
    shape = (ranks, tokens, choices)
    owners = random.choice(list(only_ranks or range(ranks)), shape)
    slots = owners * slots_per_rank + random.integers(0, slots_per_rank, shape)
    slots[random.random(shape) < none_share] = -1
    return Exchange(
        x=random.standard_normal((ranks, tokens, hidden)).astype(np.float32),
        slots=slots.astype(np.int32),
        weights=random.random(shape).astype(np.float32),
        active=np.ones(ranks, np.int32),
        slots_per_rank=slots_per_rank,
    )


def some_results(seed: int, work: Exchange) -> np.ndarray:
    """Results `[R owner, R source, T, K, D]`, zero where a choice runs elsewhere."""
    _, here = naive_dispatch(work)
    random = np.random.default_rng(seed)
    results = random.standard_normal((*here.shape, work.x.shape[-1])).astype(np.float32)
    return np.where(here[..., None] >= 0, results, np.float32(0))


def some_experts(
    seed: int = 0, *, slots: int = 3, layers: int = 1, inner: int = 8, hidden: int = 16
):
    """A bank `[S L 3 F D]`."""
    shape = (slots, layers, 3, inner, hidden)
    return (np.random.default_rng(seed).standard_normal(shape) * hidden**-0.5).astype(np.float32)


def naive_dispatch(work: Exchange) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[R R T D]` and slots `[R R T K]` by destination and source, choice by choice."""
    ranks, tokens, hidden = work.x.shape
    rows = np.zeros((ranks, ranks, tokens, hidden), np.float32)
    here = np.full((ranks, *work.slots.shape), -1, np.int32)
    for source, token, choice in np.ndindex(work.slots.shape):
        slot = work.slots[source, token, choice]
        owner = slot // work.slots_per_rank
        if slot >= 0 and work.active[source] and work.active[owner]:
            rows[owner, source, token] = work.x[source, token]
            here[owner, source, token, choice] = slot % work.slots_per_rank
    return rows, here


def naive_combine(work: Exchange, results: np.ndarray) -> np.ndarray:
    """`y[s, t] = sum_k weights[s, t, k] * results[owner, s, t, k]` in the order of k, float32."""
    y = np.zeros_like(work.x)
    for source, token, choice in np.ndindex(work.slots.shape):
        slot = work.slots[source, token, choice]
        owner = slot // work.slots_per_rank
        if slot >= 0 and work.active[source] and work.active[owner]:
            weight = work.weights[source, token, choice]
            y[source, token] += weight * results[owner, source, token, choice]
    return y


def naive_experts(rows: np.ndarray, slots: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """SwiGLU of each choice in float64; `bank` is one layer `[S 3 F D]`."""
    y = np.zeros((*slots.shape, rows.shape[-1]))
    for source, token, choice in np.ndindex(slots.shape):
        slot = slots[source, token, choice]
        if slot >= 0:
            gate, up, down = bank[slot].astype(np.float64)
            x = rows[source, token].astype(np.float64)
            inner = gate @ x
            y[source, token, choice] = (inner / (1 + np.exp(-inner)) * (up @ x)) @ down
    return y


def naive_targets(slots: np.ndarray, partners, slots_per_rank: int) -> np.ndarray:
    """The rank that choice k makes a row travel to, -1 where none does; `[T K]`."""
    targets = np.full_like(slots, -1)
    for token, of_token in enumerate(slots):
        known = set()
        for choice, slot in enumerate(of_token):
            owner = slot // slots_per_rank
            if slot >= 0 and owner not in known and partners[owner]:
                targets[token, choice] = owner
                known.add(owner)
    return targets


def check_lists(lists, slots: np.ndarray, num_slots: int, tile_rows: int) -> None:
    """Checks that ExpertRows list each choice of `slots [R T K]` once, by slot, and in one tile."""
    grouped, counts, num_tiles, *tiles = (np.asarray(part) for part in lists)
    flat, rows_max = slots.reshape(-1), slots.shape[0] * slots.shape[1]
    wanted = [set(np.flatnonzero(flat == slot)) for slot in range(num_slots)]
    np.testing.assert_array_equal(counts, [len(of_slot) for of_slot in wanted])
    rows = grouped.reshape(num_slots, rows_max)
    for slot, of_slot in enumerate(wanted):
        assert set(rows[slot, : len(of_slot)].tolist()) == of_slot, f"choices of slot {slot}"
    covered = [[] for _ in range(num_slots)]
    for slot, first in np.stack(tiles, axis=1)[: num_tiles[0]]:
        assert first < counts[slot], f"a tile of slot {slot} starts at {first} and holds no row"
        covered[slot] += range(first, min(first + tile_rows, counts[slot]))
    for slot, places in enumerate(covered):
        assert sorted(places) == list(range(counts[slot])), f"tiles of slot {slot}"
