"""ReSTE: a power function between the identity and the sign, as training goes on (arXiv 2308.06689)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..functional import surrogate_sign
from .base import Method, Part, Site, Step
from .ir_net import in_deviations


def reste_gradient(grad: Tensor, x: Tensor, o: Tensor, threshold: float, interval: float) -> Tensor:
    """`grad` times f'(x) for f(x) = sign(x) |x|^(1/o), with the paper's two bounds."""
    size = x.abs()
    slope = size.clamp(min=interval).pow_(1 / o - 1).mul_(grad)
    # 1 near zero, where the slope is f(m) / m = m^(1/o - 1); 1/o up to the threshold; 0 beyond. In place, as in `sign`.
    share = size.clone().le_(interval).mul_(o - 1).add_(size.le_(threshold)).mul_(1 / o)
    return slope.mul_(share)


def reste_weight_gradient(grad: Tensor, weight: Tensor, o: Tensor, threshold: float, interval: float) -> Tensor:
    """The same at W in units of its output channel's standard deviation."""
    rows = in_deviations(weight.flatten(1))
    return reste_gradient(grad.flatten(1), rows, o, threshold, interval).view(weight.shape)


class ReSTESign(Part):
    """sign(x), with the gradient of sign(x) |x|^(1/o), where o grows over training."""

    emits_signs = keeps_inputs = True
    gradient = staticmethod(reste_gradient)

    def __init__(self, method: "ReSTE"):
        super().__init__()
        self.method = method
        # A tensor, because torch.compile recompiles for every new number; not saved, because it follows from the step.
        self.register_buffer("o", torch.tensor(method.order(0.0), dtype=torch.float32), persistent=False)

    def begin_step(self, layer: nn.Module, step: Step) -> None:
        self.o.fill_(self.method.order(step.index / max(step.total, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return surrogate_sign(x, self.gradient, self.o, settings=(self.method.threshold, self.method.interval))

    def clip_bound(self) -> float:
        return self.method.threshold


class ReSTEWeightSign(ReSTESign):
    """sign(w), with that gradient at w in units of its output channel's standard deviation."""

    gradient = staticmethod(reste_weight_gradient)


@dataclass(frozen=True)
class ReSTE(Method):
    """ReSTE (arXiv 2308.06689): f(x) = sign(x) |x|^(1/o), f'(x) = (1/o) |x|^((1 - o)/o), for inputs and weights.

    o grows over training from 1, the straight-through estimator, to `o_end`: o = 1 + (o_end - 1) (1 - cos(pi p / 2)) at
    the share p of the steps, the schedule of the authors' code (github.com/DravenALG/ReSTE). The gradient is 0 where
    |x| > `threshold`; where |x| <= `interval` = m it is the difference quotient f(m) / m, because f' has a pole at 0.
    `threshold` is the clip bound of inputs.

    Deviations. `standardize`: weights are taken in units of their output channel's standard deviation, in the gradient
    only: f'(w / std), where std is a constant and no factor. The authors' code does not divide (False), but the weights
    of a pretrained transformer, about 0.03, would then all lie within `interval`, where f' is constant. In that code o
    grows by the epoch, here by the step. There a layer has one scale (here with `weight_scaling="layer"`), through
    which a gradient flows (here it does not).

    >>> ReSTE(o_end=2.0).to_dict()
    {'name': 'reste', 'o_end': 2.0, 'threshold': 1.5, 'interval': 0.1, 'standardize': True}
    """

    name: ClassVar[str] = "reste"
    paper: ClassVar[str] = "ReSTE, arXiv 2308.06689"
    idea: ClassVar[str] = "the gradient of a power function that bends from the identity towards the sign"
    scheduled: ClassVar[bool] = True

    o_end: float = 3.0
    threshold: float = 1.5
    interval: float = 0.1
    standardize: bool = True

    def __post_init__(self) -> None:
        if not self.o_end >= 1:
            raise ValueError(f"o_end={self.o_end}: expected a number >= 1")
        if not self.interval > 0:
            raise ValueError(f"interval={self.interval}: expected a number > 0")
        if not self.threshold >= self.interval:
            raise ValueError(f"threshold={self.threshold}: expected a number >= interval={self.interval}")

    def order(self, progress: float) -> float:
        """o at `progress`, a fraction of training, 0 to 1."""
        return 1 + (self.o_end - 1) * (1 - math.cos(math.pi / 2 * min(progress, 1.0)))

    def weight_binarizer(self, site: Site) -> Part:
        return ReSTEWeightSign(self) if self.standardize else ReSTESign(self)

    def input_binarizer(self, site: Site, shape: tuple[int, ...]) -> Part:
        return ReSTESign(self)
