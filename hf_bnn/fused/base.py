"""Base classes of fused modules, which replace the class of a plain module and keep its parts."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..kernels.lending import Lent
from ..kernels.sources import Source, Sources
from ..observers import looked_on


class Planned:
    """A module with `call`, a planned product that points into its tensors. Stands before the class of the module."""

    call: Callable[[Tensor], Tensor]

    def plan(self) -> Callable[[Tensor], Tensor]:
        """The call for the present tensors."""
        raise NotImplementedError(f"{type(self).__name__} must say what it calls")

    def _apply(self, *args, **kwargs) -> nn.Module:
        super()._apply(*args, **kwargs)  # .to(...): other tensors
        self.call = self.plan()
        return self


class Fused:
    """Base of fused modules. Stands before the plain class whose forward it replaces.

    A module is fused, and made plain again, by a change of its class. Its parts, their names and its state dict do not
    change.
    """

    made: ClassVar[tuple[str, ...]] = ()  # attributes that `derive` adds
    sources: Sources | None = None  # of what `derive` has made

    @classmethod
    def replace_class(cls, module: nn.Module) -> None:
        """Make `module` an instance of this class, in place."""
        module.__class__ = cls
        module.sources = None
        module.current()
        if _derive_again not in module._load_state_dict_post_hooks.values():  # still there if it was fused before
            module.register_load_state_dict_post_hook(_derive_again)

    def derive(self) -> None:
        """Derive what the fused forward needs from the present tensors of the module."""

    def entries(self) -> list[Source]:
        """Entries that `derive` reads."""
        return []

    def unread(self) -> list[Source]:
        """Entries that `derive` uses and that are only ever replaced, never written to."""
        return []

    def current(self) -> bool:
        """Whether the derived data may be used. Derives it again if a source has changed.

        False if it is stale and something observes torch, so that it cannot be derived: the plain forward must run.
        While torch.compile or torch.export trace, the data counts as current.
        """
        if is_compiling() or (self.sources is not None and self.sources.same()):
            return True
        if looked_on():
            return False
        with torch.inference_mode(False), torch.no_grad():
            before = [(slot, slot.lent) for slot, _ in self.entries() if isinstance(slot, Lent)]
            self.derive()
            self.sources = Sources(self.entries(), self.unread())
            for slot, lent in before:  # no tensor read here is kept
                slot.lent = lent
        return True

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        before = [(slot, slot.lent) for slot, _ in self.entries() if isinstance(slot, Lent)]
        super()._apply(*args, **kwargs)
        for slot, lent in before:
            slot.lent = lent
        self.sources = None  # derive now: data derived from scales may have been rounded
        if not self.is_meta():
            self.current()
        return self

    def is_meta(self) -> bool:
        """Whether any tensor is on the meta device: shapes without numbers."""
        slots = [slot for module in self.modules() for slot in (module._parameters, module._buffers)]
        return any(tensor is not None and tensor.is_meta for slot in slots for tensor in dict.values(slot))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sources": None}  # addresses are not copied: copies and pickles have their own

    @property
    def plain(self) -> type[nn.Module]:
        """The class that this one has replaced."""
        order = type(self).__mro__
        return order[order.index(Fused) + 1]

    def restore(self) -> None:
        """Make the module plain again, in place."""
        for name in (*self.made, "sources"):
            if name in self.__dict__ or name in self._modules or name in self._buffers:
                delattr(self, name)
        self.__class__ = self.plain

    def wants_gradient(self, x: Tensor) -> bool:
        """Whether a gradient may be needed, which only the plain forward computes."""
        return self.training or (torch.is_grad_enabled() and x.requires_grad)


def _derive_again(module: nn.Module, incompatible_keys: object) -> None:
    if isinstance(module, Fused):
        module.sources = None
        module.current()
