"""Refusals of a request, and checks of single values. No socket, no clock."""

import reprlib

SHORT = reprlib.Repr(maxstring=80, maxother=80, maxlong=40)


class RequestError(ValueError):
    """A refused request. `field` is the part at fault, `code` is OpenAI's error code."""

    def __init__(self, status: int, field: str | None, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.field, self.code = status, field, code


def refusal(field: str, problem: str) -> RequestError:
    """An error 400 that names the field."""
    return RequestError(400, field[:80], f"{field[:80]} {problem}")


def wrong(field: str, value: object, expectation: str) -> RequestError:
    """An error 400 that names the field, its value and the expectation."""
    return refusal(field, f"is {SHORT.repr(value)}; {expectation}")


def unicode(field: str, text: str) -> None:
    """Raises RequestError for text that cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"has a lone surrogate at character {error.start}; send valid Unicode"
        raise refusal(field, problem) from None


def integer(
    fields: dict,
    name: str,
    default: int | None,
    low: int,
    high: int | None,
    expected: str = "",
) -> int | None:
    """The integer of a field; None where it is absent and has no default."""
    value = fields.get(name, default)
    if value is None:
        return None
    if type(value) is int and low <= value and (high is None or value <= high):
        return value
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise wrong(name, value, f"send {expected or f'an integer {limits}'}")


def number(fields: dict, name: str, allowed, limits: str, default: float = 1.0) -> float:
    """The number of a field. NaN and infinities fail every comparison in `allowed`."""
    value = fields.get(name, default)
    if type(value) not in (int, float) or not allowed(value):
        raise wrong(name, value, f"send a number {limits}")
    return float(value)


def boolean(fields: dict, name: str, default: bool = False) -> bool:
    """The boolean of a field."""
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise wrong(name, value, "send true or false")
    return value
