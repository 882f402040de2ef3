"""SURGE: a full-precision branch beside each binary operator, used in the backward pass only (arXiv 2605.10989)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..estimators import clipped_sign
from .base import ClippedInputs, ClippedSign, Part, RecordingPart, Site

AUX = ("own", "shared", "lowrank", "leaky")


def gradient_scale(eta: float, main: Tensor, extra: Tensor) -> Tensor:
    """The Adaptive Gradient Scaler: eta ||g_b|| / (||g_a|| + 1e-8), a float32 scalar."""
    return eta * main.float().norm() / (extra.float().norm() + 1e-8)


class StatisticsWriter(NamedTuple):
    """Writes the statistics of a backward pass to `values`. `clipped` marks the inputs beyond the clip bound."""

    values: Tensor
    clipped: Tensor

    def write(self, main: Tensor, extra: Tensor, scale: Tensor) -> None:
        """Write the share of clipped inputs, lambda and cos(g_b, g_a).

        Inputs that no gradient reaches, such as padding, do not count.
        """
        b, a = main.float().flatten(), extra.float().flatten()
        cosine = torch.dot(b, a) / (b.norm() * a.norm() + 1e-12)
        counts = extra != 0
        share = (self.clipped & counts).sum() / counts.sum().clamp_min(1)
        self.values.copy_(torch.stack([share, scale, cosine]))


class _Open(torch.autograd.Function):
    """x, auxiliary weights -> x, token. The token's gradient is G = dL/dy, brought here by `_Join`."""

    @staticmethod
    def forward(ctx, x, product, weight_shape, output_dtype, eta, writer, *aux):
        ctx.save_for_backward(x, *aux)
        ctx.product, ctx.weight_shape, ctx.eta, ctx.writer = product, weight_shape, eta, writer
        ctx.set_materialize_grads(False)
        token = torch.zeros((), dtype=output_dtype, device=x.device)
        return x.view_as(x), token.expand(product.output_shape(x, weight_shape))

    @staticmethod
    @once_differentiable
    def backward(ctx, main, G):
        x, *aux = ctx.saved_tensors
        nothing = (None,) * 5
        if G is None or not ctx.needs_input_grad[0]:
            # Zeros, not None: a distributed reducer waits for every parameter that took part in the forward pass.
            return main, *nothing, *(torch.zeros_like(w) for w in aux)
        main = torch.zeros_like(x) if main is None else main
        aux_same = [w.to(G.dtype) for w in aux]
        if len(aux) == 1:
            extra, aux_gradients = _dense(ctx.product, G, x, aux_same, ctx.needs_input_grad[6:])
        elif len(ctx.weight_shape) == 2:
            extra, aux_gradients = _lowrank(G, x, aux_same)
        else:
            extra, aux_gradients = _lowrank_kernels(ctx.product, G, x, aux_same, ctx.weight_shape)
        scale = gradient_scale(ctx.eta, main, extra)
        if ctx.writer is not None:
            ctx.writer.write(main, extra, scale)
        aux_gradients = [
            None if g is None else g.mul_(scale).to(w.dtype) for g, w in zip(aux_gradients, aux, strict=True)
        ]
        extra = extra.to(main.dtype)  # its memory takes the sum: fresh memory costs more than the addition
        return torch.addcmul(main, scale.to(main.dtype), extra, out=extra), *nothing, *aux_gradients


def _dense(product, G: Tensor, x: Tensor, aux: list[Tensor], needed: tuple[bool, ...]):
    """g_a = G W_a and the branch's own gradient G^T x, before lambda."""
    x = x.to(G.dtype)  # one dtype: under autocast, torch's adjoint of a convolution takes no mixture on every processor
    extra = product.grad_input(G, x, aux[0])
    return extra, [product.grad_weight(G, x, aux[0]) if needed[0] else None]


def _lowrank(G: Tensor, x: Tensor, aux: list[Tensor]):
    """The same for W_a = U V, with U `(out, r)`, V `(r, in)`: the full-sized product is never formed."""
    left, right = aux
    inner = G @ left
    rows, narrow = x.reshape(-1, x.shape[-1]).to(G.dtype), inner.reshape(-1, inner.shape[-1])
    return inner @ right, [G.reshape(-1, G.shape[-1]).t() @ (rows @ right.t()), narrow.t() @ rows]


def _lowrank_kernels(product, G: Tensor, x: Tensor, aux: list[Tensor], weight_shape: torch.Size):
    """The same for the kernels of a convolution, V `(r, in * kh * kw)`: fewer parameters, not fewer operations."""
    left, right = aux
    extra, (grad,) = _dense(product, G, x, [(left @ right).view(weight_shape)], (True,))
    grad = grad.flatten(1)
    return extra, [grad @ right.t(), left.t() @ grad]


class _Join(torch.autograd.Function):
    """y, token -> y. Hands G to the operator and to `_Open`."""

    @staticmethod
    def forward(ctx, y, token):
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        return G, G


class BackwardRecorder(RecordingPart):
    """Records the last logged backward pass of its layer.

    clipped: the share of inputs beyond the clip bound, among those that a gradient reaches; lambda; cosine.
    """

    statistic_names = ("clipped", "lambda", "cosine")

    def writer(self, u: Tensor, bound: float) -> StatisticsWriter | None:
        """The writer for inputs `u` in units of their levels, or None in a step that is not logged.

        A compiled graph records nothing, because its backward may not write to buffers.
        """
        if not self.recording or torch.compiler.is_compiling():
            return None
        return StatisticsWriter(self.recorded, u.detach().abs() > bound)


class AuxiliaryBranch(BackwardRecorder):
    """The Dual-Path Gradient Compensator: runs a binary operator and adds lambda g_a to its input's gradient.

    The branch itself, f_a(x) = W_a x, is never computed. `initial` is what W_a starts as: one tensor, or the factors
    (U, V) of one; with None it is the layer's latent weight as it stands, and nothing is kept here.
    """

    keeps_inputs = True

    def __init__(self, layer: nn.Module, eta: float, initial: tuple[Tensor, ...] | None):
        super().__init__()
        self.eta = eta
        self.product = layer.product
        self._layer = (layer,)  # in a tuple, so that the layer does not become this part's submodule
        self.aux = nn.ParameterList() if initial is None else nn.ParameterList(nn.Parameter(w) for w in initial)

    def forward(self, operator: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return operator(x)
        (layer,) = self._layer
        aux = tuple(self.aux) if len(self.aux) else (layer.weight.detach(),)
        writer = self._writer_for(layer, x) if self.recording else None
        x_open, token = _Open.apply(x, self.product, layer.weight.shape, _output_dtype(x), self.eta, writer, *aux)
        return _Join.apply(operator(x_open), token)

    @torch.no_grad()
    def _writer_for(self, layer: nn.Module, x: Tensor) -> StatisticsWriter | None:
        binarizer = layer.input_binarizer  # another method's, in a sum
        bound = math.inf if binarizer is None else binarizer.clip_bound()
        return self.writer(layer.input_levels.normalize(x), bound)


def _output_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def leaky_gradient(main: Tensor, extra: Tensor, eta: float, writer: StatisticsWriter | None) -> Tensor:
    """g_b + lambda g_a where g_a, the branch's share, is the unclipped gradient itself."""
    scale = gradient_scale(eta, main, extra)
    if writer is not None:
        writer.write(main, extra, scale)
    return main.addcmul_(scale.to(main.dtype), extra)


class LeakySign(BackwardRecorder):
    """sign(x), with the clipped gradient plus lambda times the unclipped one: SURGE with W_a = the binary weights."""

    emits_signs = True

    def __init__(self, clip: float, eta: float):
        super().__init__()
        self.clip, self.eta = clip, eta

    def forward(self, x: Tensor) -> Tensor:
        return clipped_sign(x, self.clip, partial(leaky_gradient, eta=self.eta, writer=self.writer(x, self.clip)))

    def clip_bound(self) -> float:
        return self.clip


@dataclass(frozen=True)
class Surge(ClippedInputs):
    """SURGE (arXiv 2605.10989): dL/dx = g_b + lambda g_a, with lambda = eta ||g_b|| / (||g_a|| + 1e-8), g_a = G W_a.

    `aux` chooses W_a: "own" (as in the paper: separate weights, initially a copy of the latent ones, with the gradient
    lambda G^T x), "shared" (the latent weights themselves), "lowrank" (own, of rank `rank`), "leaky" (the binary
    weights: a leaky straight-through estimator without branch or extra product; lambda reaches elastic levels too).
    `eta`: 0.03 to 0.1 suits transformers.

    lambda is computed per micro-batch and rank, so that gradient accumulation changes it by a few percent. Deviation:
    the paper prints y = f_b - sg(lambda f_a) + lambda f_a; here f_a is not computed, so that y equals f_b bit for bit.

    >>> Surge(eta=0.3, aux="leaky").to_dict()
    {'name': 'surge', 'clip': 1.0, 'eta': 0.3, 'aux': 'leaky', 'rank': 32}
    """

    name: ClassVar[str] = "surge"
    paper: ClassVar[str] = "SURGE, arXiv 2605.10989"
    idea: ClassVar[str] = "the input's gradient is compensated by that of a full-precision branch, scaled to its norm"

    eta: float = 0.1
    aux: str = "own"
    rank: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eta >= 0:
            raise ValueError(f"eta={self.eta}: expected a number >= 0")
        if self.aux not in AUX:
            raise ValueError(f"aux={self.aux!r}: expected one of {', '.join(AUX)}")
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: expected an integer >= 1")

    def input_binarizer(self, site: Site, shape: tuple[int, ...]) -> Part:
        leaky = self.aux == "leaky" and site.weight_shape is not None
        return LeakySign(self.clip, self.eta) if leaky else ClippedSign(self.clip)

    def around(self, site: Site, layer: nn.Module) -> Part:
        if self.aux == "leaky" or site.weight_shape is None:  # a product of two activations has no weight to pair with
            return super().around(site, layer)
        weight = layer.weight.detach()
        if self.aux == "shared":
            return AuxiliaryBranch(layer, self.eta, None)
        if self.aux == "own":
            return AuxiliaryBranch(layer, self.eta, (weight.clone(),))
        matrix = weight.flatten(1)
        return AuxiliaryBranch(layer, self.eta, _factors(matrix, min(self.rank, *matrix.shape), site.index))

    def claims(self) -> frozenset[str]:
        return frozenset({"input_binarizer" if self.aux == "leaky" else "around"})


def _factors(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """U `(out, r)`, V `(r, in)` with U V close to `weight`, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all other devices too, for good
        left, values, right = torch.svd_lowrank(weight.float().cpu(), rank)
    root = values.sqrt()
    factors = left * root, (right * root).t().contiguous()
    return tuple(factor.to(weight.device, weight.dtype) for factor in factors)
