"""IR-Net: balanced weights, and a surrogate gradient that sharpens as training goes on (arXiv 1909.10788)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..functional import surrogate_sign
from .base import Method, Part, Site, Step


def centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of `(out, n)` minus its mean, and 1 / its standard deviation `(out, 1)`; 1 for constant rows."""
    z = rows - rows.mean(1, keepdim=True)
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)  # on a CPU ten times faster than torch.std
    return z, torch.where(norm > 0, math.sqrt(rows.shape[1] - 1) / norm, 1.0)


def in_deviations(rows: Tensor) -> Tensor:
    """Each row of `(out, n)` over its standard deviation."""
    z, inverse = centred(rows)
    return torch.mul(rows, inverse, out=z)


def ede_gradient(grad: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """`grad` times g'(x) = k t (1 - tanh^2(t x)), where k = max(1 / t, 1), so that k t = max(1, t)."""
    peak = t.clamp(min=1)
    return (x * t).tanh_().square_().mul_(-peak).add_(peak).mul_(grad)  # in place: one pass of fresh memory


def ede_weight_gradient(grad: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    """The same at W in units of its output channel's standard deviation, which are taken as constants."""
    return ede_gradient(grad.flatten(1), in_deviations(weight.flatten(1)), t).view(weight.shape)


def libra_gradient(grad: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    """The gradient of g((W - mean(W)) / std(W - mean(W))), both per output channel.

    With z = (W - m) / d over n weights and h = dL/dz: dL/dW = (h - mean(h) - z sum(h z) / (n - 1)) / d.
    """
    rows = weight.flatten(1)
    z, inverse = centred(rows)
    z.mul_(inverse)
    h = ede_gradient(grad.flatten(1), z, t)
    along = (h * z).sum(1, keepdim=True) / (rows.shape[1] - 1)
    return h.sub_(h.mean(1, keepdim=True)).addcmul_(z, along, value=-1).mul_(inverse).view(weight.shape)


class EDESign(Part):
    """sign(x), with the gradient of the error decay estimator g(x) = k tanh(t x), where t grows over training."""

    emits_signs = keeps_inputs = True
    gradient = staticmethod(ede_gradient)

    def __init__(self, method: "IRNet"):
        super().__init__()
        self.method = method
        # A tensor, because torch.compile recompiles for every new number; not saved, because it follows from the step.
        self.register_buffer("t", torch.tensor(method.sharpness(0.0), dtype=torch.float32), persistent=False)

    def begin_step(self, layer: nn.Module, step: Step) -> None:
        self.t.fill_(self.method.sharpness(step.index / max(step.total, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return surrogate_sign(x, self.gradient, self.t)


class EDEWeightSign(EDESign):
    """sign(w), with the gradient of the estimator at w in units of its output channel's standard deviation."""

    gradient = staticmethod(ede_weight_gradient)


class LibraSign(EDESign):
    """sign(w) of weights that are kept balanced, with the gradient of the estimator at the standardized weights.

    After `IRNet.optimizer_hook`, the latent weights have mean 0 per output channel from the first step on.
    """

    gradient = staticmethod(libra_gradient)
    hooked = False

    def begin_step(self, layer: nn.Module, step: Step) -> None:
        super().begin_step(layer, step)
        if step.index == 0:  # later, the optimizer's hook has done it
            balance_(layer.weight)

    def end_backward(self, layer: nn.Module, step: Step) -> None:
        if not self.hooked:
            raise RuntimeError(
                "IR-Net keeps its weights balanced after each step of the optimizer, and was not told of any: call "
                "hf_bnn.training.hook_optimizer(model, optimizer, method) first, or set libra=False"
            )


@torch.no_grad()
def balance_(weight: Tensor) -> None:
    """Subtract the mean of each output channel, in place, unless the weights are frozen."""
    if weight.requires_grad:
        weight.sub_(weight.mean(tuple(range(1, weight.dim())), keepdim=True))


@dataclass(frozen=True)
class IRNet(Method):
    """IR-Net (arXiv 1909.10788): the gradient of g(x) = k tanh(t x) for inputs and weights, and balanced weights.

    Error decay estimator (section 3.3): t = t_min 10^(p log10(t_max / t_min)), k = max(1 / t, 1), with the progress
    p = step / steps. Libra parameter binarization (section 3.2; `libra`): sign((W - mean) / std) per output channel,
    with the gradient through both. The mean is subtracted from the latent weights themselves, before the first step and
    after each step of the optimizer, so that the model can keep computing sign(W) = sign(W - mean).

    Deviations: the scale is the model's structure (mean |w| unless it says otherwise), not the paper's power of two
    2^round(log2(mean |W_std|)); W is divided by its standard deviation in the gradient only. With `libra` False,
    weights take the estimator alone, at w over its channel's standard deviation, taken as a constant unit: g'(w / std).
    Inputs have no clip bound.

    >>> IRNet(libra=False).to_dict()
    {'name': 'ir_net', 't_min': 0.1, 't_max': 10.0, 'libra': False}
    """

    name: ClassVar[str] = "ir_net"
    paper: ClassVar[str] = "IR-Net, arXiv 1909.10788"
    idea: ClassVar[str] = "balanced weights, and the gradient of a tanh that sharpens from a line to the sign"
    scheduled: ClassVar[bool] = True

    t_min: float = 0.1
    t_max: float = 10.0
    libra: bool = True

    def __post_init__(self) -> None:
        if not self.t_min > 0:
            raise ValueError(f"t_min={self.t_min}: expected a number > 0")
        if not self.t_max >= self.t_min:
            raise ValueError(f"t_max={self.t_max}: expected a number >= t_min={self.t_min}")

    def sharpness(self, progress: float) -> float:
        """t at `progress`, a fraction of training, 0 to 1."""
        return self.t_min * (self.t_max / self.t_min) ** min(progress, 1.0)

    def weight_binarizer(self, site: Site) -> Part:
        if self.libra and math.prod(site.weight_shape[1:]) == 1:
            raise ValueError(
                f"a weight of shape {site.weight_shape} has one entry per output channel, which cannot be balanced: "
                "leave the layer float (exclude=...), or set libra=False"
            )
        return LibraSign(self) if self.libra else EDEWeightSign(self)

    def input_binarizer(self, site: Site, shape: tuple[int, ...]) -> Part:
        return EDESign(self)

    def optimizer_hook(self, optimizer: torch.optim.Optimizer, layers: list[tuple[Site, nn.Module]]) -> None:
        if not self.libra:
            return
        binarizers = [(layer, layer.weight_binarizer) for _, layer in layers]

        def balance(*_) -> None:
            for layer, binarizer in binarizers:
                if layer.weight_binarizer is binarizer:  # no other method has been installed since
                    balance_(layer.weight)

        optimizer.register_step_post_hook(balance)
        for _, binarizer in binarizers:
            binarizer.hooked = True

    def claims(self) -> frozenset[str]:
        return super().claims() - (frozenset() if self.libra else {"optimizer_hook"})
