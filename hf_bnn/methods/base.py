"""A method is a factory of parts; a part is a small module with a forward and two moments per optimizer step."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..estimators import clipped_sign, identity_sign

SLOTS = ("weight_binarizer", "input_binarizer", "around", "optimizer_hook")


class Position(NamedTuple):
    """Number `index` of `count`, in forward order."""

    index: int
    count: int


class Site(NamedTuple):
    """Where in the network a part lives: layer `index` of `count` in forward order."""

    index: int
    count: int
    weight_shape: tuple[int, ...] | None = None  # None: a product of two activations
    weight_scaling: str = "channel"  # of the layer: channel | layer | none
    group: Position | None = None  # among the groups of layers that read the same tensor; None: each layer its own
    block: Position | None = None  # among the blocks (a transformer layer, a residual block); None: each layer its own


class Step(NamedTuple):
    """Where in training we are: optimizer step `index` of `total`, at learning rate `lr`; `log`: record statistics."""

    index: int
    total: int
    lr: float
    log: bool = False


class Part(nn.Module):
    """Base of everything a method puts into a layer. All its state is in parameters and buffers.

    `site` is set when the part is put into its layer, and again when the order of execution becomes known.
    """

    site: Site | None = None
    emits_signs = False  # whether, at present, it puts out -1 and +1 and nothing else: products then run on bits
    keeps_inputs = False  # whether it keeps its inputs, 4 bytes a number, for the backward pass

    def begin_step(self, layer: nn.Module, step: Step) -> None:
        """Before the first forward of an optimizer step."""

    def end_backward(self, layer: nn.Module, step: Step) -> None:
        """After the last backward of an optimizer step: gradients are summed, reduced and unscaled, not yet applied."""

    def statistics(self) -> dict[str, float]:
        """What the part recorded in the last logged step, by name."""
        return {}

    def clip_bound(self) -> float:
        """The size, in units of an input's levels, beyond which the input's own gradient is 0; infinity: none is."""
        return math.inf

    def binary_fraction(self) -> float:
        """How much of what the part puts out in training is binary, 0 to 1: below 1 it has not finished its work."""
        return 1.0


class ClippedSign(Part):
    """sign(x), with the gradient of clamp(x, -clip, clip)."""

    emits_signs = True

    def __init__(self, clip: float):
        super().__init__()
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        return clipped_sign(x, self.clip)

    def clip_bound(self) -> float:
        return self.clip


class IdentitySign(Part):
    """sign(w), with the gradient of w."""

    emits_signs = True

    def forward(self, weight: Tensor) -> Tensor:
        return identity_sign(weight)


class Direct(Part):
    """Runs the binary operator and nothing else."""

    def forward(self, operator: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return operator(*inputs)


@dataclass(frozen=True)
class Method:
    """The straight-through estimator (arXiv 1308.3432; clip bound: 1602.02830, eq. 4). Other methods override it.

    `clip`: inputs pass the gradient where |x| <= clip, in units of the input's levels. Latent weights pass it always.

    >>> Method(clip=2.0).to_dict()
    {'name': 'ste', 'clip': 2.0}
    """

    name: ClassVar[str] = "ste"
    paper: ClassVar[str] = "arXiv 1308.3432, 1602.02830"
    idea: ClassVar[str] = "sign forward, the gradient of a clipped identity backward"
    in_order: ClassVar[bool] = False  # whether it goes by the order in which the layers are executed
    scheduled: ClassVar[bool] = False  # whether what it does depends on how far the run is from its last step

    clip: float = 1.0

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip}: expected a number > 0")

    def weight_binarizer(self, site: Site) -> Part:
        return IdentitySign()

    def input_binarizer(self, site: Site, shape: tuple[int, ...]) -> Part:
        """`shape` is that of one input example, 1 where it may vary."""
        return ClippedSign(self.clip)

    def around(self, site: Site, layer: nn.Module) -> Part:
        """What runs the layer's binary operator. `layer.product` is its linear operator; None between activations."""
        return Direct()

    def optimizer_hook(self, optimizer: torch.optim.Optimizer, layers: list[tuple[Site, nn.Module]]) -> None:
        """Hook into the steps of `optimizer`. `layers`: those with binary weights, in forward order."""

    def claims(self) -> frozenset[str]:
        """The slots that this method fills with something of its own; the others hold what STE puts there."""
        return frozenset(slot for slot in SLOTS if getattr(type(self), slot) is not getattr(Method, slot))

    def __add__(self, other: "Method") -> "Method":
        """Both methods at once, each in the slots that it claims. Raises ValueError if both claim the same one."""
        from .combined import Combined

        return Combined(methods=(self, other))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> "Method":
        """From values, or from command-line text, which is read as its field's type."""
        known = {field.name: field for field in fields(cls)}
        for key in arguments:
            if key not in known:
                raise ValueError(
                    f"unknown argument {key!r} of method {cls.name!r}; known arguments: {', '.join(known)}"
                )
        return cls(**{key: _read(cls.name, key, value, known[key].default) for key, value in arguments.items()})


def _read(method: str, key: str, value: Any, default: Any) -> Any:
    kind = type(default)
    if isinstance(value, str):
        return _read_text(method, key, value, kind)
    fits = isinstance(value, int | float if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"argument {key}={value!r} of method {method!r}: expected {kind.__name__}")
    return kind(value)


def _read_text(method: str, key: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise ValueError(f"argument {key}={text!r} of method {method!r}: expected true or false")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"argument {key}={text!r} of method {method!r}: expected {kind.__name__}") from None
