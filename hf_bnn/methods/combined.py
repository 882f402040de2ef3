"""Several methods at once: each fills the slots that it claims."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .arguments import argument_names
from .base import SLOTS, Method, Part, Site


@dataclass(frozen=True)
class Combined(Method):
    """A sum of methods, `Stompp() + Surge()`: each slot is filled by the method that claims it.

    A slot that no method claims holds the default part, made by the first method (for inputs: the first that has a
    clip bound). The members that have a `clip` must agree on it, because only one method estimates the gradient of the
    inputs. If that method has no `clip`, the others must leave theirs at its default. Raises ValueError otherwise, and
    if two methods claim the same slot or a method is named twice.

    >>> from hf_bnn.methods import ApproxSign, Surge
    >>> (ApproxSign() + Surge(aux="shared")).name
    'approx_sign+surge'
    """

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        flat = tuple(_flatten(self.methods))
        object.__setattr__(self, "methods", flat)
        if len(flat) < 2:
            raise ValueError(f"a sum needs at least two methods, got {len(flat)}")
        names = [method.name for method in flat]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"method {twice[0]!r} is named twice in {self.name!r}")
        for slot in SLOTS:
            rivals = [method.name for method in flat if slot in method.claims()]
            if len(rivals) > 1:
                raise ValueError(
                    f"methods {rivals[0]!r} and {rivals[1]!r} cannot be combined: both define the {slot}. "
                    "Leave one of them out, or set it (method_args) to work elsewhere"
                )
        self._check_clip()

    def _check_clip(self) -> None:
        """Raise ValueError for a clip bound that would be ignored."""
        clipped = [method for method in self.methods if _has_clip(method)]
        if len({method.clip for method in clipped}) > 1:
            found = ", ".join(f"{method.name}.clip={method.clip}" for method in clipped)
            raise ValueError(
                f"the methods of {self.name!r} must agree on the clip bound of the inputs, but have {found}: give all "
                "the same (method_args: clip=..., without a method's name)"
            )
        owner = self.owner("input_binarizer")
        for method in clipped if not _has_clip(owner) else ():
            if method.clip != type(method)().clip:
                raise ValueError(
                    f"{method.name}.clip={method.clip} would be ignored in {self.name!r}: {owner.name!r} estimates the "
                    "gradient of the inputs, and has no clip; leave it out"
                )

    @property
    def clip(self) -> float | None:
        """The clip bound of the members that have one; None if none has."""
        return next((method.clip for method in self.methods if _has_clip(method)), None)

    @property
    def name(self) -> str:
        return "+".join(method.name for method in self.methods)

    @property
    def in_order(self) -> bool:
        return any(method.in_order for method in self.methods)

    @property
    def scheduled(self) -> bool:
        return any(method.scheduled for method in self.methods)

    def claims(self) -> frozenset[str]:
        return frozenset().union(*(method.claims() for method in self.methods))

    def owner(self, slot: str) -> Method:
        """The method that fills `slot`."""
        claiming = [method for method in self.methods if slot in method.claims()]
        clipped = [method for method in self.methods if slot == "input_binarizer" and _has_clip(method)]
        return (claiming or clipped or self.methods)[0]

    def weight_binarizer(self, site: Site) -> Part:
        return self.owner("weight_binarizer").weight_binarizer(site)

    def input_binarizer(self, site: Site, shape: tuple[int, ...]) -> Part:
        return self.owner("input_binarizer").input_binarizer(site, shape)

    def around(self, site: Site, layer: nn.Module) -> Part:
        return self.owner("around").around(site, layer)

    def optimizer_hook(self, optimizer: torch.optim.Optimizer, layers: list[tuple[Site, nn.Module]]) -> None:
        self.owner("optimizer_hook").optimizer_hook(optimizer, layers)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "methods": [method.to_dict() for method in self.methods]}


def _has_clip(method: Method) -> bool:
    return "clip" in argument_names(method)


def _flatten(methods: tuple[Method, ...]) -> Iterator[Method]:
    for method in methods:
        yield from method.methods if isinstance(method, Combined) else (method,)
