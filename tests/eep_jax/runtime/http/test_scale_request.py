"""A change that an operator sends is checked field by field."""

import pytest

from eep_jax.coordination.scaling import ScaleRequest
from eep_jax.runtime.http.checks import RequestError
from eep_jax.runtime.http.scale_request import parse_scale_request


def test_ranks_or_a_count():
    down = parse_scale_request({"action": "scale_down", "ranks": [5, 2]})
    assert down == ScaleRequest(action="scale_down", ranks=(2, 5))
    assert parse_scale_request({"action": "scale_up", "count": 2}) == ScaleRequest(
        action="scale_up", count=2
    )


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ([], None, "list; send one JSON object"),
        ({"action": "melt", "ranks": [1]}, "action", "'melt'; send one of"),
        ({"ranks": [1]}, "action", "None; send one of"),
        ({"action": "scale_up"}, "ranks", 'either "ranks"'),
        ({"action": "scale_up", "ranks": [1], "count": 1}, "ranks", 'either "ranks"'),
        ({"action": "scale_up", "ranks": []}, "ranks", "a list of integers"),
        ({"action": "scale_up", "ranks": [True]}, "ranks", "a list of integers"),
        ({"action": "scale_up", "ranks": 3}, "ranks", "3; send a list"),
        ({"action": "scale_up", "ranks": [1, 1]}, "ranks", "each rank once"),
        ({"action": "scale_up", "count": 0}, "count", "0; send an integer"),
        ({"action": "scale_up", "count": "1"}, "count", "'1'; send an integer"),
        ({"action": "scale_up", "count": 1, "now": 1}, "now", "'now' is not known"),
    ],
)
def test_anything_else_is_refused_by_name(body, field, words):
    with pytest.raises(RequestError, match=words) as raised:
        parse_scale_request(body)
    assert (raised.value.status, raised.value.field) == (400, field)
