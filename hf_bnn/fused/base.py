"""What tells a fused module from the plain one whose place it takes."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn


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

    @classmethod
    def take_place_of(cls, module: nn.Module) -> None:
        """Make `module` one of these, in place."""
        module.__class__ = cls
        module.derive()
        if _derive_again not in module._load_state_dict_post_hooks.values():  # left there by an earlier time
            module.register_load_state_dict_post_hook(_derive_again)

    def derive(self) -> None:
        """Make what the fused forward needs, from the module's tensors: now, and after others were loaded."""

    @property
    def plain(self) -> type[nn.Module]:
        """The class whose place this one has taken."""
        order = type(self).__mro__
        return order[order.index(Fused) + 1]

    def restore(self) -> None:
        """Make the module what it was, in place."""
        for name in self.made:
            if name in self.__dict__ or name in self._modules or name in self._buffers:
                delattr(self, name)
        self.__class__ = self.plain

    def learns(self, x: Tensor) -> bool:
        """Whether gradients may be asked for, which only the plain forward has."""
        return self.training or (torch.is_grad_enabled() and x.requires_grad)


def _derive_again(module: nn.Module, incompatible_keys: object) -> None:
    if isinstance(module, Fused):
        module.derive()
