"""What a config key is: a documented field of a frozen dataclass whose value is checked."""

import ast
import dataclasses
import math
import numbers
import re
import shlex
import types
import typing
from collections.abc import Callable
from typing import Any

from jaxlora.core.errors import InputError

REQUIRED: Any = object()
"""In the place of a default: the person has to give the value."""


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The values that a key takes: in words, and as a test of a value that already has the right type."""

    words: str
    holds: Callable[[Any], bool] = lambda value: True


def at_least(low: int) -> Allowed:
    return Allowed(f"an integer of at least {low}", lambda value: value >= low)


def one_of(*names: str) -> Allowed:
    return Allowed(" or ".join(f"'{name}'" for name in names), lambda value: value in names)


def optional(allowed: Allowed) -> Allowed:
    return Allowed(f"None or {allowed.words}", lambda value: value is None or allowed.holds(value))


def filled(value: str | tuple[str, ...]) -> bool:
    """Whether a name, or every one of a tuple of at least one name, has a visible character."""
    return bool(value) and all(name.strip() for name in ((value,) if isinstance(value, str) else value))


def matching(pattern: str) -> Callable[[Any], bool]:
    """The test whether a string, or every one of a tuple, is what a regular expression says, from end to end."""

    def holds(value: str | tuple[str, ...]) -> bool:
        return all(re.fullmatch(pattern, text) for text in ((value,) if isinstance(value, str) else value))

    return holds


POSITIVE = Allowed("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = Allowed("a number of at least 0", lambda value: value >= 0)
UNIT = Allowed("a number from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Allowed("a number of at least 0 and below 1", lambda value: 0 <= value < 1)
INSIDE = Allowed("a number above 0 and below 1", lambda value: 0 < value < 1)
SWITCH = Allowed("True or False")
TEXT = Allowed("a string")
FILLED = Allowed("a string that is not empty", filled)
AXIS = Allowed("an integer of at least 1, or -1 for all the rest", lambda value: value == -1 or value >= 1)


def setting(default: Any, meaning: str, allowed: Allowed) -> Any:
    """A dataclass field that is a config key (typed Any, so that the annotation beside it is taken as it stands).

    Args:
        default: the value of a key that nobody sets, or `REQUIRED`.
        meaning: one line with the unit, shown by `--help`.
        allowed: the values it takes.
    """
    metadata = {"meaning": meaning, "allowed": allowed}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Key:
    """One public key: its dotted path, type and field. `default` is None where `required` is true."""

    path: str
    kind: Any
    default: Any
    required: bool
    meaning: str
    allowed: Allowed

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def remedy(self) -> str:
        """How to set this key, as a sentence."""
        example = ",".join(self.default) if isinstance(self.default, tuple) else self.default
        if self.required or example == "":
            example = "VALUE"
        return f"Set it in the config file, or with {shlex.quote(f'--config.{self.path}={example}')}."

    def check(self, value: Any) -> Any:
        """Returns the value in the key's own type (an integer as a float, a list as a tuple).

        Raises:
            InputError: it has another type, or is not allowed.
        """
        try:
            checked = _as_kind(value, self.kind)
        except TypeError:
            found = f"{value!r} ({type(value).__name__})"
        else:
            if self.allowed.holds(checked):
                return checked
            found = repr(value)
        raise InputError(
            f"{self.path} = {found} is not allowed: it must be {self.allowed.words}.\n{self.remedy}"
        )

    def parse(self, text: str) -> Any:
        """The value that a command line's text means for this key, not checked yet.

        `None` and `none` are None where the key may be None; `(a,b)`, `['a', 'b']` and `a,b` are tuples where it may
        be a tuple; `true`, `false`, `yes`, `no`, `1` and `0` are switches. Text that does not fit is returned as it is,
        for `check` to say so.
        """
        kinds = typing.get_args(self.kind) if isinstance(self.kind, types.UnionType) else (self.kind,)
        if types.NoneType in kinds and text.lower() in ("none", "null"):
            return None
        if any(typing.get_origin(kind) is tuple for kind in kinds) and ("," in text or str not in kinds):
            return _parse_tuple(text)
        if bool in kinds:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(
                text.lower(), text
            )
        for kind in (int, float):
            if kind in kinds:
                try:
                    return kind(text)
                except ValueError:
                    return text
        return text


def _parse_tuple(text: str) -> tuple[str, ...]:
    if text[:1] in "([" and text[-1:] in ")]":
        try:
            items = ast.literal_eval(text)
            return tuple(items) if isinstance(items, list | tuple) else (items,)
        except (ValueError, SyntaxError):  # brackets around bare words
            text = text[1:-1]
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _as_kind(value: Any, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        for option in typing.get_args(kind):
            try:
                return _as_kind(value, option)
            except TypeError:
                continue
    elif kind is float:
        # A bool is an int to Python; to a person, True is no learning rate.
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif kind is int:
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif isinstance(value, kind):
        return value
    raise TypeError


def section_keys(section: type, name: str) -> tuple[Key, ...]:
    """The keys of a section class called `name` ("" for the config itself), in the order of its fields."""
    kinds = typing.get_type_hints(section)
    return tuple(
        Key(
            path=f"{name}.{field.name}" if name else field.name,
            kind=kinds[field.name],
            default=None if field.default is dataclasses.MISSING else field.default,
            required=field.default is dataclasses.MISSING,
            meaning=field.metadata["meaning"],
            allowed=field.metadata["allowed"],
        )
        for field in dataclasses.fields(section)
        if "meaning" in field.metadata
    )


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of keys, called after its class; every value is checked, and brought to its type, when one is made."""

    def __post_init__(self) -> None:
        for key in section_keys(type(self), type(self).__name__.removesuffix("Config").lower()):
            object.__setattr__(self, key.name, key.check(getattr(self, key.name)))
