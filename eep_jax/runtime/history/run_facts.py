"""Facts of a run that its journal relies on: another configuration cannot continue it. Pure.

Limits and addresses may differ from one supervisor of a run to the next; what decides who has which
expert, and which tokens a request has, may not.
"""

import dataclasses
import json

from eep_jax.config import RunConfig

CLUSTER = ("ranks", "slots_per_rank")
ENGINE = ("context_tokens", "combine", "dtype", "dispatch_dtype")
RUN = ("name", "platform", "checkpoint", "random_weights", "tokenizer")


def run_facts(config: RunConfig) -> dict:
    """The facts as JSON values, by the names that --override knows."""
    facts = {name: getattr(config, name) for name in RUN}
    facts |= {f"model.{name}": v for name, v in dataclasses.asdict(config.model).items()}
    facts |= {f"cluster.{name}": getattr(config.cluster, name) for name in CLUSTER}
    facts |= {f"engine.{name}": getattr(config.engine, name) for name in ENGINE}
    return json.loads(json.dumps(facts, default=sorted))


def differences(before: dict, now: dict) -> list[str]:
    """What differs, one sentence each; names that only one of them has are not compared.

    Example:
        >>> differences({"cluster.ranks": 8, "name": "a"}, {"cluster.ranks": 4, "name": "a"})
        ['cluster.ranks was 8, is 4']
    """
    return [
        f"{name} was {before[name]!r}, is {value!r}"
        for name, value in sorted(now.items())
        if name in before and before[name] != value
    ]
