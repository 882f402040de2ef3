"""Reads the arguments of a method from text or values, by the annotations of its dataclass fields."""

import types
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

READABLE = (bool, int, float, str)
EXPECTED = "bool, int, float or str, one of them with `| None`, or a Literal of values of one of these types"


class Kind(NamedTuple):
    """The values that an argument may take: of type `type`, None if `optional`, one of `choices` if there are any."""

    type: type
    optional: bool = False
    choices: tuple = ()

    def __str__(self) -> str:
        name = f"one of {', '.join(map(str, self.choices))}" if self.choices else self.type.__name__
        return f"{name} or none" if self.optional else name


def argument_names(method: Any) -> tuple[str, ...]:
    """The names of the arguments of a method or of its class, in order."""
    return tuple(field.name for field in fields(method))


def check_names(cls: type, names: Iterable[str]) -> None:
    """Raise ValueError for the first of `names` that is not an argument of the method."""
    known = argument_names(cls)
    for name in names:
        if name not in known:
            listed = f"known arguments: {', '.join(known)}" if known else "it has none"
            raise ValueError(f"unknown argument {name!r} of method {cls.name!r}; {listed}")


def read_arguments(cls: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as the fields of the class `cls` take them: text is parsed, values are checked.

    Raises ValueError for an unknown name, and for a value that its field does not take.
    """
    check_names(cls, arguments)
    kinds = argument_kinds(cls)
    return {name: _read(cls.name, name, value, kinds[name]) for name, value in arguments.items()}


@cache
def argument_kinds(cls: type) -> dict[str, Kind]:
    """The kind of each field of the dataclass, by name.

    Raises TypeError for an annotation that cannot be read from the command line.

    >>> from hf_bnn.methods import Surge
    >>> str(argument_kinds(Surge)["rank"])
    'int'
    """
    try:
        hints = get_type_hints(cls)
    except NameError as error:
        raise TypeError(f"the annotations of {cls.__name__} cannot be read: {error}") from error
    return {field.name: _kind(cls, field.name, hints[field.name]) for field in fields(cls)}


def _kind(cls: type, name: str, annotation: Any) -> Kind:
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    present = [member for member in members if member is not type(None)]
    optional = len(present) < len(members)
    if len(present) == 1:
        if present[0] in READABLE:
            return Kind(present[0], optional)
        choices = get_args(present[0]) if get_origin(present[0]) is Literal else ()
        found = {type(choice) for choice in choices}
        if len(found) == 1 and found <= set(READABLE):
            return Kind(found.pop(), optional, choices)
    shown = annotation.__name__ if isinstance(annotation, type) else annotation
    raise TypeError(f"argument {name!r} of {cls.__name__} has the annotation {shown}: expected {EXPECTED}")


def _read(method: str, name: str, value: Any, kind: Kind) -> Any:
    """`value` as its kind. The text "none" gives None where that is allowed."""
    if kind.optional and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    found = _parsed(value, kind.type) if isinstance(value, str) else _converted(value, kind.type)
    if found is None or (kind.choices and found not in kind.choices):
        expected = "true or false" if kind == Kind(bool) and isinstance(value, str) else kind
        raise ValueError(f"argument {name}={value!r} of method {method!r}: expected {expected}")
    return found


def _converted(value: Any, kind: type) -> Any:
    """`value` as the type, or None. An int may be a float, but a bool is no number."""
    fits = isinstance(value, int | float if kind is float else kind)
    return None if not fits or (isinstance(value, bool) and kind is not bool) else kind(value)


def _parsed(text: str, kind: type) -> Any:
    """The text as the type, or None."""
    if kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
    try:
        return kind(text)
    except ValueError:
        return None
