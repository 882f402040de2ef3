"""Dicts of modules that know whether other code may hold, and write to, their tensors.

While no other code holds them, there is nothing to compare.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

OWN = "kernel_"  # prefix of tensors that are derived from the others, and to which no other code writes


class Lent(dict):
    """A module's `_parameters` or `_buffers`. `lent` says whether other code may hold one of the tensors.

    `lent` stays True: the holder of a tensor may write to it at any later time, and torch may not notice.
    """

    lent = False
    examined = False

    @classmethod
    def in_place_of(cls, module: nn.Module, name: str) -> "Lent":
        """Replace the dict `name` of `module` by a Lent one; `lent` if other code holds one of its tensors already."""
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
        return type(self), (dict(self),)  # a copy is examined anew

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
    """Number of references to each value, including those of this function; 0 for None, which is shared widely."""
    return {key: sys.getrefcount(value) if value is not None else 0 for key, value in dict.items(slot)}


ALONE = holders({"tensor": torch.empty(0)})["tensor"]  # measured, because it differs between versions of Python


def _moved(tensor: Tensor | None) -> bool:
    """Move the numbers of a tensor, in place, to memory that nothing else shares. False if that is impossible."""
    if tensor is None or tensor.is_meta:
        return True
    if tensor.is_inference():
        return False
    tensor.data = tensor.detach().clone()
    return True
