"""Dicts of modules that know whether anyone may write to their tensors: nothing has to be compared while nobody can."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

OWN = "kernel_"  # how the names of tensors begin that are derived of the others, and that nobody else writes to


class Lent(dict):
    """A module's dict of tensors, `_parameters` or `_buffers`. `lent` says whether one may have been taken out.

    It stays so: whoever has a tensor may write to it at any later time, unnoticed by torch.
    """

    lent = False
    examined = False

    @classmethod
    def in_place_of(cls, module: nn.Module, name: str) -> "Lent":
        """The dict `name` of `module`, made one of these; lent, if somebody has one of its tensors already."""
        slot = module.__dict__[name]
        if not isinstance(slot, cls):
            slot = module.__dict__[name] = cls(slot)
        if not slot.examined:
            slot.examined = True
            slot.lent = any(count > ALONE for key, count in holders(slot).items() if not key.startswith(OWN))
            for key, tensor in dict.items(slot):
                slot.lent |= not (key.startswith(OWN) or _moved(tensor))
        return slot

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), (dict(self),)  # a copy is examined for itself

    def __getitem__(self, name: str) -> Any:
        self.lent |= not name.startswith(OWN)
        return super().__getitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.lent |= not name.startswith(OWN)
        super().__setitem__(name, value)


def _lending(name: str) -> Any:
    def method(self, *args: Any, **kwargs: Any) -> Any:
        self.lent = True
        return getattr(dict, name)(self, *args, **kwargs)

    method.__name__ = name
    return method


for _name in ("get", "items", "values", "setdefault", "update", "copy", "popitem", "clear", "__or__", "__ior__"):
    setattr(Lent, _name, _lending(_name))


def holders(slot: dict[str, Any]) -> dict[str, int]:
    """How many references there are to each value, those of this function included; None, which many have, counts 0."""
    return {key: sys.getrefcount(value) if value is not None else 0 for key, value in dict.items(slot)}


ALONE = holders({"tensor": torch.empty(0)})["tensor"]  # counted by the same code: it differs between Pythons


def _moved(tensor: Tensor | None) -> bool:
    """Give a parameter or buffer memory of its own, in place, so that nobody has its numbers. False if that fails."""
    if tensor is None or tensor.is_meta:
        return True
    if tensor.is_inference():
        return False
    tensor.data = tensor.detach().clone()
    return True
