"""What something was made of: whether any of it has been replaced, or written to, since then."""

from collections.abc import Callable, Iterable
from ctypes import Structure, addressof, c_int64, c_uint64, c_void_p, string_at
from typing import Any

from torch import Tensor, nn

from .lending import Lent
from .library import declare, library

Source = tuple[dict[str, Any], str]  # a dict of a module, such as its `_parameters`, and the name of an entry of it


class MemorySpan(Structure):
    """`struct memory_span` of csrc/hf_bnn.h."""

    _fields_ = (("data", c_void_p), ("bytes", c_int64))


declare("hf_bnn_digest", c_void_p, c_int64, result=c_uint64)


class Sources:
    """Entries of modules' dicts, as they were when this was made: tensors, modules, None.

    `same()` compares their identity, the addresses of tensors on the CPU and a digest of all their bytes: writes
    through `.data` or numpy are not counted by torch's version counters. Elsewhere, as on a GPU, the counters decide.
    Where tensors are in a `Lent` dict that has lent none of them, nobody can have written, and none is read.
    """

    def __init__(self, entries: Iterable[Source], unread: Iterable[Source] = ()):
        """Of `unread` entries only the identity is compared."""
        entries, unread = list(entries), list(unread)
        found = [(_getter(slot), name, dict.get(slot, name)) for slot, name in (*entries, *unread)]
        self.lending = list({id(slot): slot for slot, _ in entries if isinstance(slot, Lent)}.values())
        kept = [isinstance(slot, Lent) for slot, _ in entries] + [False] * len(unread)
        self.always = [entry for entry, is_kept in zip(found, kept, strict=True) if not is_kept]
        read = [value for _, _, value in found[: len(entries)] if isinstance(value, Tensor)]
        here = [value for value in read if value.is_cpu]
        self.entries = found
        self.addresses = [(value.data_ptr, value.data_ptr()) for value in here]
        self.counted = [value for value in read if not (value.is_cpu or value.is_meta or value.is_inference())]
        self.versions = [value._version for value in self.counted]
        spans = [(value.data_ptr(), _extent(value)) for value in here]
        self.spans = (MemorySpan * len(spans))(*(MemorySpan(*span) for span in spans if span[1]))
        self.address, self.count = addressof(self.spans), sum(span[1] > 0 for span in spans)
        compiled = library().functions
        self.read = compiled.hf_bnn_digest if compiled else self.read_slowly
        self.digest = self.read(self.address, self.count)

    def same(self) -> bool:
        for get, name, value in self.always:
            if get(name) is not value:
                return False
        for slot in self.lending:
            if slot.lent:
                return self.same_tensors()
        return True if self.lending else self.same_tensors()

    def same_tensors(self) -> bool:
        """Whether no tensor has been replaced or written to: read, and compared."""
        for get, name, value in self.entries:
            if get(name) is not value:
                return False
        for data_ptr, address in self.addresses:
            if data_ptr() != address:
                return False
        if self.counted and [value._version for value in self.counted] != self.versions:
            return False
        return self.read(self.address, self.count) == self.digest

    def read_slowly(self, address: int, count: int) -> int:
        """A digest without the compiled library."""
        return hash(b"".join(string_at(span.data, span.bytes) for span in self.spans[:count]))


def _getter(slot: dict[str, Any]) -> Callable[[str], Any]:
    return dict.get.__get__(slot)  # which does not count as lending


def _extent(tensor: Tensor) -> int:
    """The bytes from a tensor's first number to its last one."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * step for size, step in steps)) * tensor.element_size()


def lent_tensors_of(module: nn.Module, *names: str) -> list[Source]:
    """`tensors_of`, from dicts that know whether anyone may write to their tensors."""
    Lent.in_place_of(module, "_parameters"), Lent.in_place_of(module, "_buffers")
    return tensors_of(module, *names)


def tensors_of(module: nn.Module, *names: str) -> list[Source]:
    """The entries of a module's own parameters and buffers; those called `names`, if any are given."""
    slots = (module._parameters, module._buffers)
    return [(slot, name) for slot in slots for name in slot if not names or name in names]
