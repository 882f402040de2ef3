"""How much memory a model's tensors take, wherever its modules keep them."""

from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType

from torch import Tensor, nn


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the storages that a model's modules hold, each counted once.

    Parameters, buffers, and tensors that are in no state dict: attributes, alone, in containers or in objects of
    hf_bnn, and what functions among them enclose.
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    return sum(storages.values())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    seen: dict[int, object] = {}  # kept alive, so that no two of them have the same identity
    left: list[object] = [model]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield value
        else:
            left.extend(_parts(value))


def _parts(value: object) -> list[object]:
    """The objects that a container, a function or an object holds."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return [*value]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        return [*map(_content, value.__closure__ or ()), *(value.__defaults__ or ())]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, nn.Module) or (type(value).__module__.startswith("hf_bnn") and not isinstance(value, type)):
        slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
        return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
    return []


def _content(cell: object) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # of a variable that has no value yet
        return None
