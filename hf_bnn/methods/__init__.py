"""The table of methods, and how a method is read from a dict or from the command line."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from .approx_sign import ApproxSign
from .base import Method, Part, Position, Site, Step
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
    "Position",
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


def make_method(name: str, arguments: str | None = None, **keywords: Any) -> Method:
    """The method called `name`, with its arguments as keywords, `make_method("surge", eta=0.1, aux="shared")`, or as on
    the command line, `make_method("surge", "eta=0.1,aux=shared")`.

    A sum of methods is joined by +. `clip` is then the bound of all of them. Another argument that several of them have
    is written with the method's name: `make_method("stompp+fsg", "on=activations,stompp.seed=1")`.
    """
    classes = [_lookup(part) for part in name.replace(" ", "").split("+")]
    given: dict[type[Method], dict[str, Any]] = {cls: {} for cls in classes}
    for key, value in [*_pairs(arguments), *keywords.items()]:
        found, plain = _addressees(classes, key)
        for cls in found:
            if plain in given[cls]:
                raise ValueError(f"argument {plain!r} of method {cls.name!r} is given twice: once is enough")
            given[cls][plain] = value
    methods = tuple(cls.from_arguments(given[cls]) for cls in classes)
    return methods[0] if len(methods) == 1 else Combined(methods=methods)


def _pairs(arguments: str | None) -> Iterator[tuple[str, str]]:
    if not isinstance(arguments, str | None):
        raise TypeError(
            f"arguments={arguments!r}: expected text such as 'eta=0.1,aux=shared'; values are given as keywords, "
            "make_method('surge', eta=0.1), or with hf_bnn.methods.method_from_dict"
        )
    for item in filter(None, (arguments or "").replace(" ", "").split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"method_args has {item!r}: expected key=value pairs separated by commas")
        yield key, value


def _addressees(classes: list[type[Method]], key: str) -> tuple[list[type[Method]], str]:
    """Which of the methods an argument is for, and its name there."""
    prefix, dot, plain = key.rpartition(".")
    if dot:
        named = [cls for cls in classes if cls.name == prefix]
        if not named:
            names = ", ".join(cls.name for cls in classes)
            raise ValueError(f"method_args has {key!r}: expected the name of one of {names} before the dot")
        return named, plain
    if plain == "clip":  # one bound of the inputs, whoever estimates their gradient: see Combined
        return list(dict.fromkeys(classes)), plain
    knowing = [cls for cls in classes if plain in {field.name for field in fields(cls)}]
    if len(knowing) > 1:
        ways = " or ".join(f"{cls.name}.{plain}" for cls in knowing)
        raise ValueError(f"method_args has {plain!r}, which several of the methods have: write {ways}")
    return (knowing or classes)[:1], plain
