"""The simulated control network: it loses, repeats, delays and so reorders messages, by seed."""

import random


class Network:
    """Decides when each message arrives, if at all. Healthy until a fault changes its fields."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.messages = 0
        self.heal()
        self.drops: list[tuple[str, int]] = []  # (name of the message, rank): the next one is lost

    def heal(self) -> None:
        """Ends every fault: messages take 1 ms and none is lost."""
        self.delay_ms = (1, 1)
        self.loss = 0.0
        self.repeats = 0.0
        self.cut: frozenset[int] = frozenset()  # ranks that the supervisor cannot reach

    def delays_ms(self, rank: int, message) -> tuple[int, ...]:
        """One delay for each copy that arrives of a message from or to `rank`."""
        self.messages += 1
        key = (type(message).__name__.lower(), rank)
        if key in self.drops:
            self.drops.remove(key)
            return ()
        if rank in self.cut or self.random.random() < self.loss:
            return ()
        copies = 2 if self.random.random() < self.repeats else 1
        return tuple(self.random.randint(*self.delay_ms) for _ in range(copies))
