"""Reads a method: from its name and arguments, as a user gives them, or from the dict of a config."""

import re
from collections.abc import Iterator
from typing import Any

from .arguments import argument_names, check_names
from .base import Method
from .combined import Combined
from .registry import METHODS, find_method, registered_method

RETIRED_CLIP = 1.0  # every method once had an argument `clip`, with this default; configs of that time hold it


def method_from_dict(spec: dict[str, Any]) -> Method:
    """Inverse of `Method.to_dict`. It never imports a module: the method must be registered.

    Raises ValueError, with the known names, for an unknown method or argument. A `clip` that the method no longer has
    is accepted if it is 1, the default that all methods had.

    >>> method_from_dict({"name": "reste", "clip": 1.0, "o_end": 2.0}).o_end
    2.0
    """
    arguments = {key: value for key, value in spec.items() if key != "name"}
    if "name" not in spec:
        raise ValueError(f"a method's dict needs its 'name', one of {', '.join(METHODS)}; got {spec}")
    if "methods" in arguments:
        return Combined(methods=tuple(method_from_dict(member) for member in arguments["methods"]))
    cls = registered_method(spec["name"])
    if "clip" in arguments and "clip" not in argument_names(cls):
        _check_retired_clip(cls, arguments.pop("clip"))
    check_names(cls, arguments)
    return cls(**arguments)


def _check_retired_clip(cls: type[Method], clip: Any) -> None:
    if clip != RETIRED_CLIP:
        raise ValueError(
            f"argument clip={clip!r} of method {cls.name!r}: expected 1, because the method has no clip bound; known "
            f"arguments: {', '.join(argument_names(cls))}"
        )


def make_method(name: str, arguments: str | None = None, **keywords: Any) -> Method:
    """The method called `name`. Its arguments are keywords, `make_method("surge", eta=0.1, aux="shared")`, or text as
    on the command line, `make_method("surge", "eta=0.1,aux=shared")`.

    `+` joins the names of methods that are to be combined. `clip` is then the bound of all methods that have one.
    Another argument that several of them have is written with the method's name:
    `make_method("stompp+fsg", "on=activations,stompp.seed=1")`. A method of your own is `package.module:ClassName`: the
    module is imported, and the method registered.
    """
    classes = [find_method(part) for part in name.replace(" ", "").split("+")]
    given: dict[type[Method], dict[str, Any]] = {cls: {} for cls in classes}
    for key, value in [*_pairs(arguments), *keywords.items()]:
        found, plain = _addressees(classes, key)
        for cls in found:
            if plain in given[cls]:
                raise ValueError(f"argument {plain!r} of method {cls.name!r} is given twice: once is enough")
            given[cls][plain] = value
    methods = tuple(cls.from_arguments(given[cls]) for cls in classes)
    return methods[0] if len(methods) == 1 else Combined(methods=methods)


def split_arguments(text: str) -> tuple[str, str | None]:
    """A method's name and its arguments, from both in one text with a colon between them.

    >>> split_arguments("surge:eta=0.1,aux=leaky"), split_arguments("package.module:ClassName:eta=0.1")
    (('surge', 'eta=0.1,aux=leaky'), ('package.module:ClassName', 'eta=0.1'))
    """
    if found := re.fullmatch(r"(.*?):([^:=]*=.*)", text):
        return found[1], found[2]
    return text.removesuffix(":"), None


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
    """The methods that an argument is for, and its name there."""
    prefix, dot, plain = key.rpartition(".")
    if dot:
        named = [cls for cls in classes if cls.name == prefix]
        if not named:
            names = ", ".join(cls.name for cls in classes)
            raise ValueError(f"method_args has {key!r}: expected the name of one of {names} before the dot")
        return named, plain
    knowing = [cls for cls in dict.fromkeys(classes) if plain in argument_names(cls)]
    if plain == "clip" and knowing:  # one bound of the inputs for all: see Combined
        return knowing, plain
    if len(knowing) > 1:
        ways = " or ".join(f"{cls.name}.{plain}" for cls in knowing)
        raise ValueError(f"method_args has {plain!r}, which several of the methods have: write {ways}")
    return (knowing or classes)[:1], plain
