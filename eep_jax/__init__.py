"""Elastic expert-parallel MoE inference in JAX: ranks may die and return while the others serve.

Importing this package loads neither JAX nor any of its own modules; each name of the public API is
loaded when it is first used.
"""

import importlib

__version__ = "0.1.0"

_MODULE_OF = {
    "ElasticMoE": "library.elastic_moe",
    "ExpertRouting": "library.elastic_moe",
    "expert_arrays": "library.elastic_moe",
    "without_experts": "library.elastic_moe",
    "MoEConfig": "library.config",
    "run_config": "library.config",
    "start_supervisor": "library.supervise",
    "join": "library.rank",
    "ElasticRank": "library.rank",
    "AdminClient": "library.admin_client",
    "cpu_environment": "library.environment",
    "EepError": "errors",
    "CheckpointError": "errors",
    "HeapError": "errors",
    "RankEnded": "errors",
    "RelocationFailed": "errors",
    "RunDirError": "errors",
}
__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
