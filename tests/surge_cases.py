"""The layer of SURGE's formulas, cases of it, and its two oracles."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hf_bnn.estimators import clipped_sign, identity_sign
from hf_bnn.methods.surge import AuxiliaryBranch
from hf_bnn.nn.products import Conv2dProduct, LinearProduct

ETA = 0.3


class Operator(nn.Module):
    """A binary operator and nothing else, y = Q_w(W) * Q_x(x), with a branch around it: linear or convolution."""

    def __init__(self, product: Callable[..., Tensor], weight_shape: tuple[int, ...], eta: float = ETA):
        super().__init__()
        self.product = product
        self.weight = nn.Parameter(torch.randn(weight_shape))
        self.branch = AuxiliaryBranch(self, eta, (torch.randn(weight_shape),))

    @property
    def aux(self) -> nn.Parameter:
        return self.branch.aux[0]

    def base(self, x: Tensor) -> Tensor:
        return self.product(clipped_sign(x), identity_sign(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(self.base, x)


class Case(NamedTuple):
    product: Callable[..., Tensor]
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]

    def operator(self, **kwargs) -> Operator:
        return Operator(self.product, self.weight_shape, **kwargs)

    def tensors(self, operator: Operator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """An input that asks for a gradient, with entries on both kinks, and G."""
        x = torch.randn(self.input_shape, dtype=dtype)
        x.flatten()[:4] = torch.tensor([1.0, -1.0, 0.0, -0.0], dtype=dtype)
        with torch.no_grad():
            G = torch.randn_like(operator.base(x))
        return x.requires_grad_(), G


CASES = {
    "linear 2-D": Case(LinearProduct(), (5, 12), (8, 12)),
    "linear 3-D": Case(LinearProduct(), (3, 5, 12), (8, 12)),
    "linear 4-D": Case(LinearProduct(), (2, 3, 5, 12), (8, 12)),
    "conv": Case(Conv2dProduct(), (2, 4, 7, 6), (6, 4, 3, 3)),
    "conv padded": Case(Conv2dProduct(padding=(1, 2)), (2, 4, 7, 6), (6, 4, 3, 3)),
    "conv strided": Case(Conv2dProduct(stride=(2, 1), padding=(1, 1)), (2, 4, 7, 6), (6, 4, 3, 3)),
    "conv dilated": Case(Conv2dProduct(dilation=(2, 1)), (2, 4, 7, 6), (6, 4, 3, 3)),
    "conv grouped": Case(Conv2dProduct(stride=(2, 2), padding=(1, 0), groups=2), (2, 4, 7, 6), (6, 2, 3, 2)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
both_kinds = pytest.mark.parametrize("case", [CASES["linear 3-D"], CASES["conv strided"]], ids=["linear", "conv"])


class Gradients(NamedTuple):
    x: Tensor
    weight: Tensor
    aux: Tensor


def run(operator: Operator, x: Tensor, G: Tensor) -> Gradients:
    """The gradients of one forward and backward pass."""
    operator.zero_grad()
    x = x.detach().clone().requires_grad_()
    operator(x).backward(G)
    return Gradients(x.grad, operator.weight.grad, operator.aux.grad)


def gradient_of_base(operator: Operator, x: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx and dL/dW of the operator without SURGE."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(operator.base(x), (x, operator.weight), G)


def product_gradients(product, x: Tensor, weight: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """G W and G^T x, by the textbook (linear), or by torch.nn.grad (convolution)."""
    if isinstance(product, LinearProduct):
        return torch.einsum("...o,oi->...i", G, weight), torch.einsum("no,ni->oi", G.flatten(0, -2), x.flatten(0, -2))
    geometry = (product.stride, product.padding, product.dilation, product.groups)
    return nn.grad.conv2d_input(x.shape, weight, G, *geometry), nn.grad.conv2d_weight(x, weight.shape, G, *geometry)


def closed_form(operator: Operator, x: Tensor, G: Tensor, gated_branch: bool = False) -> Gradients:
    """The formulas of the specification, line by line. `gated_branch` is a mistake, to see whether it is noticed."""
    x = x.detach()
    Wq = torch.where(operator.weight < 0, -1.0, 1.0).to(x.dtype)
    xq = torch.where(x < 0, -1.0, 1.0).to(x.dtype)
    gate = (x.abs() <= 1).to(x.dtype)
    g_b = product_gradients(operator.product, x, Wq, G)[0] * gate
    g_a, aux_gradient = product_gradients(operator.product, x, operator.aux.detach(), G)
    g_a = g_a * gate if gated_branch else g_a
    lam = operator.branch.eta * g_b.norm() / (g_a.norm() + 1e-8)
    return Gradients(g_b + lam * g_a, product_gradients(operator.product, xq, Wq, G)[1], lam * aux_gradient)


def printed_formula(operator: Operator, x: Tensor, G: Tensor) -> Gradients:
    """Autograd of y = f_b - sg(lambda f_a) + lambda f_a."""
    x = x.detach().clone().requires_grad_()
    (g_b,) = torch.autograd.grad(operator.base(x), x, G)
    (g_a,) = torch.autograd.grad(operator.product(x, operator.aux), x, G)
    lam = (operator.branch.eta * g_b.norm() / (g_a.norm() + 1e-8)).detach()
    f_a = operator.product(x, operator.aux)
    y = operator.base(x) - (lam * f_a).detach() + lam * f_a
    return Gradients(*torch.autograd.grad(y, (x, operator.weight, operator.aux), G))


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())
