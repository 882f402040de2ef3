"""Binary layers for training: a latent float weight, and three slots that a method fills. They know no method."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .functional import channel_scale, exact_matmul, integer_product, sign, sign_int8, straight_through
from .levels import ElasticLevels, SignedLevels
from .products import LinearProduct

if TYPE_CHECKING:
    from .methods.base import Method, Site

BINARIZE = ("both", "weights", "activations")


class _Rescale(torch.autograd.Function):
    """product * (weight_scale * scale) + offset, float32, with few passes over memory. `weight_scale` is a constant."""

    @staticmethod
    def forward(ctx, product: Tensor, weight_scale: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        ctx.save_for_backward(product, weight_scale, scale)
        y = product * (weight_scale * scale)
        return y if offset is None else y.add_(offset)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        product, weight_scale, scale = ctx.saved_tensors
        grad_product = (grad * (weight_scale * scale)).to(product.dtype)
        grad_scale = grad_offset = None
        if ctx.needs_input_grad[2]:  # sum of grad * product * weight_scale
            grad_scale = (grad_product.flatten().float() @ product.flatten().float() / scale).view(scale.shape)
        if ctx.needs_input_grad[3]:
            grad_offset = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_product, None, grad_scale, grad_offset


def rescale(
    product: Tensor, weight_scale: Tensor, weight_sum: Tensor | None, levels: SignedLevels, bias: Tensor | None
) -> Tensor:
    """A product of signs `(..., out)` in the units of the output; latent and packed layers share its roundings.

    Inputs on the levels a s + c against weights m t: sum (a s + c) m t = (a m) sum s t + (c m) sum t.
    `weight_sum`, the sum of t per output channel, is needed where the levels are shifted.
    """
    scale, shift = levels.affine()
    offset = bias
    if levels.shifted:
        offset = weight_sum * (weight_scale * shift)
        offset = offset if bias is None else offset + bias
    return _Rescale.apply(product, weight_scale, torch.as_tensor(scale, device=product.device), offset)


def sign_linear(
    x: Tensor,
    weight_signs: Tensor,
    weight_scale: Tensor,
    levels: SignedLevels,
    bias: Tensor | None,
    binary_inputs: bool,
) -> Tensor:
    """Inference of a layer with int8 weight signs `(out, in)`: exact sums if the inputs are binary too."""
    if binary_inputs:
        product = integer_product(sign_int8(x, levels.threshold()), weight_signs)
    else:
        product = F.linear(x, weight_signs.to(x.dtype))
    total = weight_signs.sum(1, dtype=torch.float32) if levels.shifted else None
    return rescale(product, weight_scale, total, levels, bias).to(x.dtype)


class BinaryLayer(nn.Module):
    """What all binary layers share: slots that a method fills with parts, and that packing empties."""

    slots: ClassVar[tuple[str, ...]]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for slot in self.slots:
            self.register_module(slot, None)

    def install(self, method: "Method", site: "Site") -> None:
        """Fill the slots with the method's parts."""
        raise NotImplementedError(f"{type(self).__name__} must say which parts it takes")

    def fit_levels(self, *inputs: Tensor) -> None:
        """Move the learned levels of the layer's inputs to where they represent `inputs` best."""
        raise NotImplementedError(f"{type(self).__name__} must say which levels it has")

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """(slot, part) of every part that a method has put into this layer."""
        for slot in self.slots:
            if (part := self._modules[slot]) is not None:
                yield slot, part

    def learns(self, *tensors: Tensor) -> bool:
        """Whether the method's parts must run: in training, or when a gradient is asked for."""
        learns = self.training or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        if learns and self.around is None:
            raise RuntimeError(
                "a binary layer without a method cannot be trained: call hf_bnn.install_method(model, method) first"
            )
        return learns


class BinaryLinear(BinaryLayer, nn.Linear):
    """`(..., in) -> (..., out)` with weights of +-1 times one scale per output channel, and inputs on two levels.

    `binarize` says which side is binary: "both", "weights" (inputs stay float) or "activations" (weights stay float).
    In evaluation the product runs on integers and is exact.

    >>> layer = BinaryLinear(8, 4).eval().requires_grad_(False)
    >>> layer(torch.randn(2, 8)).shape
    torch.Size([2, 4])
    """

    slots = ("weight_binarizer", "input_binarizer", "around")
    product = LinearProduct()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        binarize: str = "both",
        levels: SignedLevels | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if binarize not in BINARIZE:
            raise ValueError(f"binarize={binarize!r}: expected one of {', '.join(BINARIZE)}")
        self.binarize = binarize
        self.input_levels = SignedLevels() if levels is None or binarize == "weights" else levels

    @classmethod
    def from_float(
        cls, linear: nn.Linear, binarize: str = "both", levels: SignedLevels | None = None
    ) -> "BinaryLinear":
        """A binary layer that takes over the float layer's parameters."""
        size = (linear.in_features, linear.out_features, linear.bias is not None)
        new = cls(*size, binarize, levels, device="meta", dtype=linear.weight.dtype)
        new.weight, new.bias = linear.weight, linear.bias
        return new.train(linear.training)

    def install(self, method: "Method", site: "Site") -> None:
        binary = {"both": self.slots, "weights": ("weight_binarizer",), "activations": ("input_binarizer",)}
        slots = binary[self.binarize]
        self.weight_binarizer = method.weight_binarizer(site) if "weight_binarizer" in slots else None
        self.input_binarizer = method.input_binarizer(site, (self.in_features,)) if "input_binarizer" in slots else None
        self.around = method.around(site, self)

    def fit_levels(self, *inputs: Tensor) -> None:
        self.input_levels.fit(inputs[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.learns(x, self.weight):
            return self.around(self._learning_forward, x)
        if self.binarize == "activations":
            return self._with_float_weight(sign(x - self.input_levels.threshold()))
        scale, signs = channel_scale(self.weight), sign_int8(self.weight)
        return sign_linear(x, signs, scale, self.input_levels, self.bias, self.binarize == "both")

    def _learning_forward(self, x: Tensor) -> Tensor:
        """The binary operator as the method's parts see it: differentiable, on floats."""
        signs = x if self.input_binarizer is None else self.input_binarizer(self.input_levels.normalize(x))
        if self.weight_binarizer is None:
            return self._with_float_weight(signs)
        weight = self.weight_binarizer(self.weight)
        total = weight.sum(1) if self.input_levels.shifted else None
        y = rescale(self.product(signs, weight), channel_scale(self.weight), total, self.input_levels, self.bias)
        return y.to(self.weight.dtype)

    def _with_float_weight(self, signs: Tensor) -> Tensor:
        scale, shift = self.input_levels.affine()
        return F.linear(signs * scale + shift, self.weight, self.bias)


class BinaryMatmul(BinaryLayer):
    """`(..., n, k) @ (..., k, m)` with both operands on two levels.

    >>> product = BinaryMatmul(SignedLevels(), SignedLevels()).eval()
    >>> product(torch.ones(2, 3), -torch.ones(3, 1)).flatten()
    tensor([-3., -3.])
    """

    slots = ("left_binarizer", "right_binarizer", "around")
    product = None

    def __init__(self, left_levels: SignedLevels, right_levels: SignedLevels):
        super().__init__()
        self.left_levels, self.right_levels = left_levels, right_levels

    def install(self, method: "Method", site: "Site") -> None:
        self.left_binarizer = method.input_binarizer(site, (1, 1))
        self.right_binarizer = method.input_binarizer(site, (1, 1))
        self.around = method.around(site, self)

    def fit_levels(self, *inputs: Tensor) -> None:
        self.left_levels.fit(inputs[0])
        self.right_levels.fit(inputs[1])

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        if self.learns(left, right):
            return self.around(self._learning_forward, left, right)
        left_signs = sign(left.float() - self.left_levels.threshold())
        right_signs = sign(right.float() - self.right_levels.threshold())
        return self._rescale(left_signs, right_signs, exact_matmul(left_signs, right_signs)).to(left.dtype)

    def _learning_forward(self, left: Tensor, right: Tensor) -> Tensor:
        left_signs = self.left_binarizer(self.left_levels.normalize(left))
        right_signs = self.right_binarizer(self.right_levels.normalize(right))
        return self._rescale(left_signs, right_signs, left_signs @ right_signs)

    def _rescale(self, left: Tensor, right: Tensor, product: Tensor) -> Tensor:
        """sum (a s + c) (b t + d) = ab sum st + cb sum t + ad sum s + cd k."""
        (a, c), (b, d) = self.left_levels.affine(), self.right_levels.affine()
        y = product * (a * b)
        if self.left_levels.shifted:
            y = y + (c * b) * right.sum(-2, keepdim=True)
        if self.right_levels.shifted:
            y = y + (a * d) * left.sum(-1, keepdim=True)
        if self.left_levels.shifted and self.right_levels.shifted:
            y = y + c * d * left.shape[-1]
        return y


class BinaryAttention(nn.Module):
    """softmax(q k^T + mask) v with both products binary (BiT, arXiv 2205.13016, section 3.2).

    q, k, v `(batch, heads, tokens, head_dim)` are signed; the probabilities take {0, a}, so that a masked token, whose
    probability is 0, still adds nothing. Returns `(batch, heads, tokens, head_dim)` and the float probabilities.

    >>> attention = BinaryAttention().eval().requires_grad_(False)
    >>> attention(*torch.randn(3, 1, 2, 5, 8).unbind(), scaling=8**-0.5)[0].shape
    torch.Size([1, 2, 5, 8])
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores = BinaryMatmul(ElasticLevels(), ElasticLevels())
        self.context = BinaryMatmul(ElasticLevels(signed=False, width=0.1), ElasticLevels())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        scaling: float = 1.0,
        dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        scores = self.scores(query, key.transpose(-1, -2)) * scaling
        if mask is not None:
            scores = scores + mask
        probabilities = scores.softmax(-1)
        kept = F.dropout(probabilities, dropout, self.training)
        return self.context(kept, value), probabilities


class RoundedEmbedding(nn.Embedding):
    """A table whose rows are rounded when they are looked up, with a straight-through gradient: base of two kinds."""

    @classmethod
    def from_float(cls, embedding: nn.Embedding) -> "RoundedEmbedding":
        """A rounded table that takes over the float table's parameter."""
        size = (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        new = cls(*size, device="meta", dtype=embedding.weight.dtype)
        new.weight = embedding.weight
        return new.train(embedding.training)

    @staticmethod
    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Integers `(..., dim)` and a scale per row `(...)`, whose product is the rounded rows."""
        raise NotImplementedError("RoundedEmbedding is a base class: use Int8Embedding or BinaryEmbedding")

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight, self.padding_idx)
        integers, scale = self.quantize(rows.detach())
        return straight_through((integers.float() * scale.float().unsqueeze(-1)).to(rows.dtype), rows)


class Int8Embedding(RoundedEmbedding):
    """ids `(...)` to rows `(..., dim)` of 255 levels, one float32 scale per row: the row's largest |w| over 127.

    >>> Int8Embedding(10, 4)(torch.tensor([1, 2])).shape
    torch.Size([2, 4])
    """

    @staticmethod
    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = (rows.float().abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return (rows.float() / scale.unsqueeze(-1)).round_().to(torch.int8), scale


class BinaryEmbedding(RoundedEmbedding):
    """ids `(...)` to rows `(..., dim)` of +-1 times the row's mean |w| (BiT, arXiv 2205.13016), held in float16.

    >>> BinaryEmbedding(10, 4)(torch.tensor([1, 2])).shape
    torch.Size([2, 4])
    """

    @staticmethod
    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        return sign_int8(rows), rows.float().abs().mean(-1).half()


def binary_layers(model: nn.Module) -> list[BinaryLayer]:
    """The model's binary layers in forward (definition) order."""
    return [module for module in model.modules() if isinstance(module, BinaryLayer)]
