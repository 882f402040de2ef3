"""The sources of derived data: detects whether one was replaced, or written to, since."""

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
    """A record of entries of modules' dicts (tensors, modules, None) at the time when this object is made.

    `same()` compares the identity of all entries, and for tensors on the CPU the addresses and a digest of all bytes,
    since torch's version counters miss writes through `.data` or numpy. On other devices the counters decide. Tensors
    in a `Lent` dict that has lent none of them cannot have been written to, and are not read.
    """

    def __init__(self, entries: Iterable[Source], unread: Iterable[Source] = ()):
        """`unread`: entries of which only the identity is compared."""
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
        """Whether no entry has been replaced or written to."""
        for get, name, value in self.always:
            if get(name) is not value:
                return False
        for slot in self.lending:
            if slot.lent:
                return self.same_tensors()
        return True if self.lending else self.same_tensors()

    def same_tensors(self) -> bool:
        """The same, by reading all tensors, lent or not."""
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
        """The digest where there is no compiled library."""
        return hash(b"".join(string_at(span.data, span.bytes) for span in self.spans[:count]))


def _getter(slot: dict[str, Any]) -> Callable[[str], Any]:
    return dict.get.__get__(slot)  # unlike `slot.get`, does not count as lending


def _extent(tensor: Tensor) -> int:
    """Bytes from the first number of a tensor to its last."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * step for size, step in steps)) * tensor.element_size()


def lent_tensors_of(module: nn.Module, *names: str) -> list[Source]:
    """`tensors_of`, with the module's dicts made `Lent` ones."""
    Lent.in_place_of(module, "_parameters"), Lent.in_place_of(module, "_buffers")
    return tensors_of(module, *names)


def tensors_of(module: nn.Module, *names: str) -> list[Source]:
    """Entries of the parameters and buffers of a module itself, only those called `names` if any are given."""
    slots = (module._parameters, module._buffers)
    return [(slot, name) for slot in slots for name in slot if not names or name in names]
