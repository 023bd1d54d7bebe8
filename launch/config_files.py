"""Configurations: files that define one, and values replaced in it."""

import dataclasses
import importlib.util
import pathlib
import sys
import traceback
import types
import typing

from eep_jax.config import RunConfig
from launch.errors import UsageError

# Not found by import: a folder `configs` of the working directory would come before ours.
_CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
_PACKAGE = types.ModuleType("eep_jax_configs")  # in which they find each other
_PACKAGE.__path__ = [str(_CONFIGS)]
sys.modules[_PACKAGE.__name__] = _PACKAGE
RENAMED = {
    "batch_slots": "batch_rows",
    "prompt_shapes": "step_rows",
}  # fields of configurations, by the name they had before


def load_config(name: str) -> RunConfig:
    """What `get_config()` of a configuration returns.

    Args:
        name: A file of this project's `configs/` without `.py`, or the path of any `.py` file.

    Raises:
        UsageError: There is no such file, or it does not define or return a RunConfig.
    """
    known = sorted(p.stem for p in _CONFIGS.glob("*.py") if p.stem[0] != "_")
    path = _CONFIGS / f"{name}.py" if name in known else pathlib.Path(name).absolute()
    if name not in known and not (path.suffix == ".py" and path.is_file()):
        raise UsageError(f"--config={name!r} is not one of {known}, nor the path of a .py file")
    package = "eep_jax_configs." if name in known else ""
    spec = importlib.util.spec_from_file_location(f"{package}{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, "get_config", None)
        found = make() if make is not None else None
    except Exception as error:
        at = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        line = getattr(error, "lineno", None) or (at[-1] if at else "?")
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"--config={name!r}, line {line}: {said}") from error
    if make is None:
        raise UsageError(
            f"--config={name!r} does not define get_config() -> RunConfig; see "
            f"{_CONFIGS / 'tiny_cpu.py'}"
        )
    if not isinstance(found, RunConfig):
        raise UsageError(f"--config={name!r}: get_config() returned {found!r:.60}, not a RunConfig")
    return found


def override(config: RunConfig, *texts: str) -> RunConfig:
    """`config` with values replaced.

    Whether the values fit each other is checked once at the end: two may have to change together.

    Args:
        config: What is not named in `texts` stays as it is there.
        *texts: `engine.combine=per_rank`, `name=try`; later ones win.

    Raises:
        UsageError: An unknown name, a value of a wrong type, or one that the config refuses.
    """
    draft = Draft(config)
    for text in texts:
        draft.override(text)
    return draft.checked()


class Draft:
    """A configuration some of whose values are replaced, and checked once, by `checked`."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._values: dict[str, object] = {}  # by path, such as "cluster.ranks"
        self._flags: dict[str, str] = {}  # that gave the value

    def set(self, given: str = "", /, **values) -> None:
        """Replaces values by path; errors name the flag that was `given`."""
        for path, value in values.items():
            self._values.pop(path, None)
            self._values[path] = value
            self._flags[path] = given

    def override(self, text: str) -> None:
        path, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--override={text!r} must be of the form part.name=value")
        try:
            self.set(f"--override={text!r}", **{path: _parse(path, self._kind(path), value)})
        except ValueError as error:
            raise UsageError(f"--override={text!r}: {error}") from error

    def checked(self) -> RunConfig:
        return self._built(self._config, "")

    def _kind(self, path: str):
        """The type of the value at `path`. Raises ValueError for an unknown name."""
        part, at = self._config, ""
        for name in path.split("."):
            hints = typing.get_type_hints(type(part))
            if name not in hints and name in RENAMED:
                raise ValueError(f"{name} is now called {RENAMED[name]}; give that name instead")
            if name not in hints:
                raise ValueError(f"{type(part).__name__} has no {name!r}, only {sorted(hints)}")
            at += name
            kind, part = hints[name], self._values.get(at, getattr(part, name))
            at += "."
        return kind

    def _built(self, part, at: str):
        """`part`, whose path is `at`, with all values below it; its own parts are built first."""
        below = [path for path in self._values if path.startswith(at)]
        values = {}
        for field in dataclasses.fields(part) if below else ():
            value = self._values.get(at + field.name, getattr(part, field.name))
            inner = dataclasses.is_dataclass(value)
            values[field.name] = self._built(value, f"{at}{field.name}.") if inner else value
        try:
            return dataclasses.replace(part, **values)
        except ValueError as error:
            given = " ".join(flag for path in below if (flag := self._flags[path]))
            raise UsageError(f"{given or '--config=' + self._config.name}: {error}") from error


def _parse(name: str, kind: type, text: str):
    if isinstance(kind, types.UnionType):  # `int | None`
        if text in ("", "None"):
            return None
        (kind,) = set(typing.get_args(kind)) - {types.NoneType}
    if dataclasses.is_dataclass(kind):
        raise ValueError(f"{name} has parts: {sorted(typing.get_type_hints(kind))}")
    if typing.get_origin(kind) is tuple:  # `tuple[str, ...]`
        parts = (part.strip(" ()'\"") for part in text.split(","))
        return tuple(typing.get_args(kind)[0](part) for part in parts if part)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} is {text!r}, must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, must be of type {kind.__name__}") from None
