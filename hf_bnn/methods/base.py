"""The base of methods and of parts.

A method makes parts, which fill the slots of binary layers. A part is a small module with a forward and two moments per
optimizer step: `begin_step` and `end_backward`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..estimators import clipped_sign, identity_sign
from .arguments import read_arguments

SLOTS = ("weight_binarizer", "input_binarizer", "around", "optimizer_hook")


class Position(NamedTuple):
    """Number `index` of `count`, in forward order."""

    index: int
    count: int


class Site(NamedTuple):
    """The place of a part in the network: layer `index` of `count` in forward order."""

    index: int
    count: int
    weight_shape: tuple[int, ...] | None = None  # None: a product of two activations
    weight_scaling: str = "channel"  # of the layer: channel | layer | none
    group: Position | None = None  # among the groups of layers that read the same tensor; None: each layer its own
    block: Position | None = None  # among the blocks (a transformer layer, a residual block); None: each layer its own


class Step(NamedTuple):
    """A moment of training: optimizer step `index` of `total`, at learning rate `lr`; `log`: record statistics."""

    index: int
    total: int
    lr: float
    log: bool = False


class Part(nn.Module):
    """The base of all parts. A part keeps its state in parameters and buffers only.

    `site` is set when the part is put into its layer, and again once the order of execution is known.
    """

    site: Site | None = None
    emits_signs = False  # whether, at present, it puts out -1 and +1 and nothing else: products then run on bits
    keeps_inputs = False  # whether it keeps its inputs, 4 bytes a number, for the backward pass

    def begin_step(self, layer: nn.Module, step: Step) -> None:
        """Called before the first forward of an optimizer step."""

    def end_backward(self, layer: nn.Module, step: Step) -> None:
        """Called after the last backward of an optimizer step.

        Gradients are then summed, reduced over processes and unscaled, but not yet applied.
        """

    def statistics(self) -> dict[str, float]:
        """The values recorded in the last logged step, by name."""
        return {}

    def clip_bound(self) -> float:
        """The size of an input, in units of its levels, beyond which its own gradient is 0; infinity if it never is."""
        return math.inf

    def binary_fraction(self) -> float:
        """The share of the part's output in training that is binary, 0 to 1; below 1 the method is unfinished."""
        return 1.0


class RecordingPart(Part):
    """A part that records named statistics in the steps that are logged.

    A subclass lists their names in `statistic_names` and writes their values, in this order, to the buffer `recorded`
    while `recording` is set.
    """

    statistic_names: ClassVar[tuple[str, ...]]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("recorded", torch.zeros(len(self.statistic_names)), persistent=False)
        self.recording = False

    def begin_step(self, layer: nn.Module, step: Step) -> None:
        self.recording = step.log

    def statistics(self) -> dict[str, float]:
        return dict(zip(self.statistic_names, self.recorded.tolist(), strict=True)) if self.recording else {}


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
    """Runs the binary operator unchanged."""

    def forward(self, operator: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return operator(*inputs)


@dataclass(frozen=True)
class Method:
    """The base of all methods: a frozen dataclass whose fields are the method's arguments.

    Each slot of a layer has a factory here, which makes the part of the straight-through estimator: weights pass the
    gradient everywhere, inputs where |x| <= 1 in units of their levels. A method overrides the slots that it changes.
    A method that keeps the default input binarizer derives from `ClippedInputs`, which makes that bound an argument.

    >>> @dataclass(frozen=True)
    ... class Identity(Method):
    ...     name, paper, idea = "identity", "none", "inputs pass every gradient"
    ...     def input_binarizer(self, site, shape):
    ...         return IdentitySign()
    >>> Identity().to_dict(), sorted(Identity().claims())
    ({'name': 'identity'}, ['input_binarizer'])
    """

    name: ClassVar[str]  # in the table of methods and on the command line
    paper: ClassVar[str]
    idea: ClassVar[str]  # one line for the table of methods
    in_order: ClassVar[bool] = False  # whether it depends on the order in which the layers are executed
    scheduled: ClassVar[bool] = False  # whether it depends on how far the run is from its last step

    def weight_binarizer(self, site: Site) -> Part:
        """The part that turns latent weights into signs."""
        return IdentitySign()

    def input_binarizer(self, site: Site, shape: tuple[int, ...]) -> Part:
        """The part that turns inputs into signs. `shape` is that of one input example, 1 where it may vary."""
        return ClippedSign(1.0)

    def around(self, site: Site, layer: nn.Module) -> Part:
        """The part that runs the layer's binary operator.

        `layer.product` is the layer's linear operator, or None for a product of two activations.
        """
        return Direct()

    def optimizer_hook(self, optimizer: torch.optim.Optimizer, layers: list[tuple[Site, nn.Module]]) -> None:
        """Hook into the steps of `optimizer`. `layers`: those with binary weights, in forward order."""

    def claims(self) -> frozenset[str]:
        """The slots that this method fills with a part of its own. The other slots hold the default parts."""
        defaults = {slot: (getattr(Method, slot), getattr(ClippedInputs, slot)) for slot in SLOTS}
        return frozenset(slot for slot in SLOTS if getattr(type(self), slot) not in defaults[slot])

    def __add__(self, other: "Method") -> "Method":
        """Both methods at once, each in the slots that it claims. Raises ValueError if both claim the same slot."""
        from .combined import Combined

        return Combined(methods=(self, other))

    def to_dict(self) -> dict[str, Any]:
        """The name and the arguments, as plain values. `method_from_dict` reads them back."""
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> "Method":
        """A method from values or command-line text, which are read by the annotations of its fields.

        Raises ValueError, with the known arguments, for an unknown one.
        """
        return cls(**read_arguments(cls, arguments))


@dataclass(frozen=True)
class ClippedInputs(Method):
    """The base of methods whose inputs pass the gradient where |x| <= `clip`, in units of the input's levels."""

    clip: float = 1.0

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip}: expected a number > 0")

    def input_binarizer(self, site: Site, shape: tuple[int, ...]) -> Part:
        return ClippedSign(self.clip)
