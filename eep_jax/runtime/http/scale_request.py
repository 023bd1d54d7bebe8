"""Scale requests of an operator: `{"action": "scale_down", "ranks": [5]}`, checked."""

from eep_jax.coordination.scaling import ACTIONS, ScaleRequest
from eep_jax.runtime.http.checks import RequestError

FIELDS = ("action", "ranks", "count")


def parse_scale_request(body: object) -> ScaleRequest:
    """Reads a JSON body. Raises RequestError naming the field, its value and the way out."""
    if not isinstance(body, dict):
        raise RequestError(400, None, f"the body is {type(body).__name__}; send one JSON object")
    if unknown := sorted(set(body) - set(FIELDS)):
        raise RequestError(
            400, unknown[0], f"field {unknown[0]!r:.60} is not known; fields are {FIELDS}"
        )
    action = body.get("action")
    if action not in ACTIONS:
        raise RequestError(400, "action", f"action is {action!r:.60}; send one of {ACTIONS}")
    if ("ranks" in body) == ("count" in body):
        raise RequestError(
            400, "ranks", 'send either "ranks", a list like [5], or "count", how many ranks'
        )
    if "count" in body:
        count = body["count"]
        if type(count) is not int or count < 1:
            raise RequestError(400, "count", f"count is {count!r:.60}; send an integer above 0")
        return ScaleRequest(action=action, count=count)
    ranks = body["ranks"]
    if not isinstance(ranks, list) or not ranks or any(type(r) is not int for r in ranks):
        raise RequestError(400, "ranks", f"ranks is {ranks!r:.60}; send a list of integers")
    if len(set(ranks)) < len(ranks):
        raise RequestError(400, "ranks", f"ranks is {ranks!r:.60}; name each rank once")
    return ScaleRequest(action=action, ranks=tuple(sorted(ranks)))
