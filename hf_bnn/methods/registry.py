"""The registered methods, by name: those of `hf_bnn.method_table`, and those that users and installed packages add."""

import importlib
from dataclasses import MISSING, fields
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from .arguments import argument_kinds
from .base import Method

METHODS: dict[str, type[Method]] = {}
ENTRY_POINTS = "hf_bnn.methods"  # the group in which an installed package announces its methods
M = TypeVar("M", bound=type[Method])


def register_method(cls: M) -> M:
    """Add a method class to METHODS under its `name`, and return it: usable as a decorator.

    The class is a frozen dataclass that derives from `Method`. It has a name, a paper and an idea, and its fields have
    defaults and annotations that can be read from the command line. Raises TypeError or ValueError otherwise, and
    ValueError for a name that another class has. A class that is defined anew in its module replaces its older self.

    >>> from dataclasses import dataclass
    >>> from hf_bnn.methods import METHODS, ClippedInputs, make_method, register_method
    >>> @register_method
    ... @dataclass(frozen=True)
    ... class Wide(ClippedInputs):
    ...     name, paper, idea = "wide", "none", "a wider clip bound"
    ...     clip: float = 4.0
    >>> make_method("wide").clip, METHODS.pop("wide").__name__
    (4.0, 'Wide')
    """
    _check_class(cls)
    known = METHODS.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"cannot register {cls.__name__} as {cls.name!r}: {known.__module__}.{known.__qualname__} has this name; "
            "choose another name"
        )
    METHODS[cls.name] = cls
    return cls


def _check_class(cls: object) -> None:
    """Raise TypeError or ValueError for a class that cannot be a method."""
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TypeError(f"cannot register {cls!r} as a method: expected a class that derives from hf_bnn.Method")
    own = vars(cls)
    if "__dataclass_fields__" not in own or not own["__dataclass_params__"].frozen:
        raise TypeError(f"cannot register {cls.__name__} as a method: decorate it with @dataclass(frozen=True)")
    for text in ("name", "paper", "idea"):
        if not isinstance(found := getattr(cls, text, None), str) or not found:
            raise ValueError(
                f"cannot register {cls.__name__} as a method: set the class variable `{text}` to a text, got {found!r}"
            )
    if not cls.name.isidentifier():
        raise ValueError(
            f"cannot register {cls.__name__} as {cls.name!r}: expected a name of letters, digits and underscores"
        )
    argument_kinds(cls)
    for field in fields(cls):
        if field.default is MISSING and field.default_factory is MISSING:
            raise TypeError(f"argument {field.name!r} of {cls.__name__} has no default: give it one")


def find_method(name: str) -> type[Method]:
    """The class of the method that a user names: registered, announced by an installed package, or `module:Class`.

    The last two are imported and registered here, and only because the user asked for them by name: what is read from
    files goes through `registered_method`. Raises ValueError, with the known names, if there is no such method.
    """
    if ":" in name:
        found = _import_class(name)
        try:
            return register_method(found)
        except TypeError as error:
            raise ValueError(f"method {name!r}: {error}") from error
    if name not in METHODS and name in (announced := _announced()):
        cls = announced[name].load()
        if (found := getattr(cls, "name", None)) != name:
            raise ValueError(f"the entry point {name!r} of {ENTRY_POINTS!r} gives a method called {found!r}")
        register_method(cls)
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join([*METHODS, *_announced()])}")
    return METHODS[name]


def registered_method(name: str) -> type[Method]:
    """The class of the method of that name in METHODS; imports nothing. Raises ValueError for an unknown name."""
    if name not in METHODS:
        raise ValueError(
            f"unknown method {name!r}; known methods: {', '.join(METHODS)}; if it is another package's, install that "
            "package and import the module that registers the method"
        )
    return METHODS[name]


def _announced() -> dict[str, EntryPoint]:
    """The entry points of installed packages whose methods are not registered yet, by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in METHODS}


def _import_class(place: str) -> object:
    """The object at `package.module:ClassName`."""
    module_name, _, class_name = place.partition(":")
    if not all(word.isidentifier() for word in (*module_name.split("."), class_name)):
        raise ValueError(f"method {place!r}: expected package.module:ClassName")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks another
        raise ValueError(
            f"method {place!r}: there is no module {error.name!r}; name a module on Python's path, such as one of the "
            "current folder with PYTHONPATH=."
        ) from error
    if not hasattr(module, class_name):
        raise ValueError(f"method {place!r}: module {module_name!r} has no {class_name!r}")
    return getattr(module, class_name)
