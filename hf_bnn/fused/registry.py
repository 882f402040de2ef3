"""The table of fused classes. A model family fills it beside its model, so that this package knows no family."""

from collections.abc import Callable

from torch import nn

from .base import Fused

# Turns a module of exactly this class into its fused form, in place, after its own parts were fused.
FUSERS: dict[type[nn.Module], Callable[[nn.Module], None]] = {}


def fuses(plain: type[nn.Module]) -> Callable[[type[Fused]], type[Fused]]:
    """A class decorator: `optimize_` turns every module of exactly the class `plain` into the decorated class.

    The decorated class derives from `Fused` and from `plain`. A classmethod `can_fuse(module)` is optional: where it
    returns False, the module stays as it is. Raises ValueError if `plain` already has a fused class.

    >>> class Doubled(nn.Identity): ...
    >>> @fuses(Doubled)
    ... class FusedDoubled(Fused, Doubled): ...
    >>> module = Doubled()
    >>> FUSERS.pop(Doubled)(module)
    >>> type(module).__name__
    'FusedDoubled'
    """

    def register(fused: type[Fused]) -> type[Fused]:
        if plain in FUSERS:
            raise ValueError(f"{plain.__name__} already has a fused class: {fused.__name__} would replace it")
        can_fuse: Callable[[nn.Module], bool] | None = getattr(fused, "can_fuse", None)

        def fuse(module: nn.Module) -> None:
            if can_fuse is None or can_fuse(module):
                fused.replace_class(module)

        FUSERS[plain] = fuse
        return fused

    return register
