"""The table of methods, and how a method is read from a dict or from the command line."""

from dataclasses import fields
from typing import Any

from .approx_sign import ApproxSign
from .base import Method, Part, Site, Step
from .surge import Surge

STE = Method

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (STE, ApproxSign, Surge)}

__all__ = ["METHODS", "STE", "ApproxSign", "Method", "Part", "Site", "Step", "Surge", "make_method", "method_from_dict"]


def _lookup(name: str) -> type[Method]:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
    return METHODS[name]


def method_from_dict(spec: dict[str, Any]) -> Method:
    """Inverse of `Method.to_dict`. Raises ValueError, with the known names, for an unknown method or argument."""
    arguments = {key: value for key, value in spec.items() if key != "name"}
    if "name" not in spec:
        raise ValueError(f"a method's dict needs its 'name', one of {', '.join(METHODS)}; got {spec}")
    cls = _lookup(spec["name"])
    known = [field.name for field in fields(cls)]
    unknown = arguments.keys() - set(known)
    if unknown:
        raise ValueError(
            f"unknown argument {min(unknown)!r} of method {cls.name!r}; known arguments: {', '.join(known)}"
        )
    return cls(**arguments)


def make_method(name: str, arguments: str | None = None) -> Method:
    """The method called `name` with arguments as on the command line: `make_method("surge", "eta=0.1,aux=shared")`."""
    pairs = {}
    for item in filter(None, (arguments or "").replace(" ", "").split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"method_args has {item!r}: expected key=value pairs separated by commas")
        pairs[key] = value
    return _lookup(name).from_strings(pairs)
