"""Training methods: the table of those that are registered, and the functions that make a method."""

import importlib

from ..method_table import METHOD_CLASSES, METHOD_TABLE
from .base import ClippedInputs, Method, Part, Position, Site, Step
from .combined import Combined
from .reading import make_method, method_from_dict, split_arguments
from .registry import METHODS, register_method

for _module, _class in METHOD_TABLE.values():
    globals()[_class] = register_method(getattr(importlib.import_module(f".{_module}", __name__), _class))

__all__ = [
    "METHODS",
    "ClippedInputs",
    "Combined",
    "Method",
    "Part",
    "Position",
    "Site",
    "Step",
    "make_method",
    "method_from_dict",
    "register_method",
    "split_arguments",
]
__all__.extend(METHOD_CLASSES)
