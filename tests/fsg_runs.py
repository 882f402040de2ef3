"""Models whose optimizer FSG has hooked, for its tests."""

from typing import NamedTuple

import torch
from tiny import TinyMLP
from torch import Tensor, nn

from hf_bnn import binarize_
from hf_bnn.methods.fsg import Fsg
from hf_bnn.methods.fsg.gradient_hook import GradientHook
from hf_bnn.nn.layers import binary_layers

PAPER = {"init": "paper", "update_norm": "free"}
SLOW = ("mamba", "lstm")


class Run(NamedTuple):
    """A model whose weights are binary, an optimizer over all of it, and what FSG has hooked into that."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    hook: GradientHook

    @property
    def weights(self) -> list[nn.Parameter]:
        return [layer.weight for layer in binary_layers(self.model)]

    def step(self, gradients: list[Tensor]) -> list[Tensor]:
        """One step with these raw gradients of the binary weights; what became of them."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient.clone()
        self.optimizer.step()
        return [weight.grad.clone() for weight in self.weights]

    def random_gradients(self) -> list[Tensor]:
        return [torch.randn_like(weight) for weight in self.weights]


def hook_into(model: nn.Module, optimizer: torch.optim.Optimizer, method: Fsg) -> Run:
    layers = [(layer.weight_binarizer.site, layer) for layer in binary_layers(model)]
    return Run(model, optimizer, GradientHook(method, optimizer, layers))


def make_run(method: Fsg, model: nn.Module | None = None, scaling: str = "none", lr: float = 0.01) -> Run:
    """Of SGD; without a model, of TinyMLP with its weights spread over both sides of the gate |W| <= 1."""
    torch.manual_seed(0)
    if model is None:
        model = TinyMLP()
        for name in ("2", "3"):
            nn.init.normal_(model.get_submodule(name).weight)
    floats = [name for name in ("0", "4") if name in dict(model.named_modules())]
    model = binarize_(model, method, exclude=floats, binarize="weights", weight_scaling=scaling)
    return hook_into(model, torch.optim.SGD(model.parameters(), lr), method)


# The formulas, as the paper has them


def literal_calibration(weight: Tensor, binarizer: str) -> tuple[Tensor, Tensor]:
    """(W~, c * gate)."""
    if binarizer == "dorefa":
        largest = max(abs(t) for t in torch.tanh(weight).flatten().tolist())
        return torch.tanh(weight) / (2 * largest) + 1 / 2, (1 - torch.tanh(weight) ** 2) / largest
    gate = torch.where(weight.abs() <= 1, 1.0, 0.0)
    if binarizer == "bwn":
        return weight, gate
    c = torch.stack([row.abs().mean() for row in weight])
    return weight, gate * c.reshape(-1, *[1] * (weight.dim() - 1))


def literal_update(nets: nn.ModuleDict, method: Fsg, history: list[Tensor], weight: Tensor, layer: int) -> Tensor:
    """M = beta slow + (1 - beta) fast, before its norm is set. `history`: raw gradients, at most `length` of them."""
    H = torch.stack([gradient.flatten() for gradient in history])
    rms = (H**2).mean().sqrt()
    value, slope = literal_calibration(weight, method.binarizer)
    start = 1.0 if method.init == "ste" else 0.0
    slow = start * H[-1] + rms * nets["slow"](H / rms, layer) if method.beta > 0 else 0.0
    fast = H[-1] * (start + nets["fast"](value.flatten())) if method.beta < 1 else 0.0
    return slope * (method.beta * slow + (1 - method.beta) * fast).view_as(weight)
