"""What tells a fused module from the plain one whose place it takes."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..kernels.lending import Lent
from ..kernels.sources import Source, Sources
from ..observers import looked_on


class Planned:
    """A module with `call`, a plan of its product that points into its tensors. Comes before the module's class."""

    call: Callable[[Tensor], Tensor]

    def plan(self) -> Callable[[Tensor], Tensor]:
        """The call for the tensors as they are now."""
        raise NotImplementedError(f"{type(self).__name__} must say what it calls")

    def _apply(self, *args, **kwargs) -> nn.Module:
        super()._apply(*args, **kwargs)  # .to(...): other tensors
        self.call = self.plan()
        return self


class Fused:
    """Comes before the class whose forward it replaces. A module becomes one, and plain again, by a change of class:
    its parts, their names and the state dict stay as they are.
    """

    made: ClassVar[tuple[str, ...]] = ()  # attributes that `derive` adds
    sources: Sources | None = None  # what `derive` has read

    @classmethod
    def replace_class(cls, module: nn.Module) -> None:
        """Make `module` one of these, in place."""
        module.__class__ = cls
        module.sources = None
        module.current()
        if _derive_again not in module._load_state_dict_post_hooks.values():  # left there by an earlier time
            module.register_load_state_dict_post_hook(_derive_again)

    def derive(self) -> None:
        """Make what the fused forward needs, from the module's tensors as they are now."""

    def entries(self) -> list[Source]:
        """Of all that `derive` reads."""
        return []

    def unread(self) -> list[Source]:
        """Of what `derive` uses and whoever writes it replaces."""
        return []

    def current(self) -> bool:
        """Whether what `derive` has made may be used: made anew if what it was made of has changed.

        False, so that the plain forward must run, if it cannot be made anew since something looks on. While
        torch.compile or torch.export trace, it is taken as it is.
        """
        if is_compiling() or (self.sources is not None and self.sources.same()):
            return True
        if looked_on():
            return False
        with torch.inference_mode(False), torch.no_grad():
            before = [(slot, slot.lent) for slot, _ in self.entries() if isinstance(slot, Lent)]
            self.derive()
            self.sources = Sources(self.entries(), self.unread())
            for slot, lent in before:  # what was read here is not kept
                slot.lent = lent
        return True

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        before = [(slot, slot.lent) for slot, _ in self.entries() if isinstance(slot, Lent)]
        super()._apply(*args, **kwargs)
        for slot, lent in before:
            slot.lent = lent
        self.sources = None  # now, not in the next call: what was made of the scales may have been rounded
        if not self.is_meta():
            self.current()
        return self

    def is_meta(self) -> bool:
        """Whether there are only shapes."""
        slots = [slot for module in self.modules() for slot in (module._parameters, module._buffers)]
        return any(tensor is not None and tensor.is_meta for slot in slots for tensor in dict.values(slot))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sources": None}  # addresses: a copy, or a pickle, has its own

    @property
    def plain(self) -> type[nn.Module]:
        """The class whose place this one has taken."""
        order = type(self).__mro__
        return order[order.index(Fused) + 1]

    def restore(self) -> None:
        """Make the module what it was, in place."""
        for name in (*self.made, "sources"):
            if name in self.__dict__ or name in self._modules or name in self._buffers:
                delattr(self, name)
        self.__class__ = self.plain

    def wants_gradient(self, x: Tensor) -> bool:
        """Whether gradients may be asked for, which only the plain forward has."""
        return self.training or (torch.is_grad_enabled() and x.requires_grad)


def _derive_again(module: nn.Module, incompatible_keys: object) -> None:
    if isinstance(module, Fused):
        module.sources = None
        module.current()
