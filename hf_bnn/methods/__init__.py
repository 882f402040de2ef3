"""The table of methods, and how a method is read from a dict or from the command line."""

from dataclasses import fields
from typing import Any

from .approx_sign import ApproxSign
from .base import Method, Part, Place, Site, Step
from .combined import Combined
from .dorefa import DoReFa
from .fsg import Fsg
from .ir_net import IRNet
from .metaquant import MetaQuant
from .reste import ReSTE
from .stompp import Stompp
from .surge import Surge
from .xnor import XNOR

STE = Method

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (STE, ApproxSign, XNOR, DoReFa, IRNet, ReSTE, Surge, Stompp, Fsg, MetaQuant)
}

__all__ = [
    "METHODS",
    "STE",
    "XNOR",
    "ApproxSign",
    "Combined",
    "DoReFa",
    "Fsg",
    "IRNet",
    "MetaQuant",
    "Method",
    "Part",
    "Place",
    "ReSTE",
    "Site",
    "Step",
    "Stompp",
    "Surge",
    "make_method",
    "method_from_dict",
]


def _lookup(name: str) -> type[Method]:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
    return METHODS[name]


def method_from_dict(spec: dict[str, Any]) -> Method:
    """Inverse of `Method.to_dict`. Raises ValueError, with the known names, for an unknown method or argument."""
    arguments = {key: value for key, value in spec.items() if key != "name"}
    if "name" not in spec:
        raise ValueError(f"a method's dict needs its 'name', one of {', '.join(METHODS)}; got {spec}")
    if "methods" in arguments:
        return Combined(methods=tuple(method_from_dict(member) for member in arguments["methods"]))
    cls = _lookup(spec["name"])
    known = [field.name for field in fields(cls)]
    unknown = arguments.keys() - set(known)
    if unknown:
        raise ValueError(
            f"unknown argument {min(unknown)!r} of method {cls.name!r}; known arguments: {', '.join(known)}"
        )
    return cls(**arguments)


def make_method(name: str, arguments: str | None = None) -> Method:
    """The method called `name` with arguments as on the command line: `make_method("surge", "eta=0.1,aux=shared")`.

    A sum of methods is joined by +. An argument that several of them have is then written with the method's name:
    `make_method("stompp+surge", "order=reverse,surge.clip=2")`.
    """
    classes = [_lookup(part) for part in name.replace(" ", "").split("+")]
    pairs: dict[type[Method], dict[str, str]] = {cls: {} for cls in classes}
    for item in filter(None, (arguments or "").replace(" ", "").split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"method_args has {item!r}: expected key=value pairs separated by commas")
        cls, key = _addressee(classes, key)
        pairs[cls][key] = value
    methods = tuple(cls.from_strings(pairs[cls]) for cls in classes)
    return methods[0] if len(methods) == 1 else Combined(methods=methods)


def _addressee(classes: list[type[Method]], key: str) -> tuple[type[Method], str]:
    """Which of the methods an argument is for, and its name there."""
    prefix, dot, plain = key.rpartition(".")
    if dot:
        named = [cls for cls in classes if cls.name == prefix]
        if not named:
            names = ", ".join(cls.name for cls in classes)
            raise ValueError(f"method_args has {key!r}: expected the name of one of {names} before the dot")
        return named[0], plain
    knowing = [cls for cls in classes if plain in {field.name for field in fields(cls)}]
    if len(knowing) > 1:
        ways = " or ".join(f"{cls.name}.{plain}" for cls in knowing)
        raise ValueError(f"method_args has {plain!r}, which several of the methods have: write {ways}")
    return (knowing or classes)[0], plain
