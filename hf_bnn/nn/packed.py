"""Inference layers: the bits of the weights under the key `weight`, and one scale per output channel."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from ..functional import clipped_sign, pack_bits, unpack_bits
from ..kernels.sources import Source, Sources, tensors_of
from ..kernels.weights import groups_are_large, takes_panels
from ..observers import looked_on
from .embeddings import BinaryEmbedding, Int8Embedding
from .layers import BinaryConv2d, BinaryLinear, WeightedLayer, one_image, padding_of, rescale, sign_product
from .levels import SignedLevels
from .products import Conv2dProduct, LinearProduct
from .state_forms import own_form

logger = logging.getLogger(__name__)

LEVELS_POSITION = 8  # of `levels` among the arguments of PackedConv2d


@cache
def warn_of_training() -> None:
    """Say, once in a process, what does not learn where a packed model is trained."""
    logger.warning(
        "a packed model is being trained: its binary weights are bits and do not learn, only what is still float does "
        "(biases, levels, norms, the head). Train the latent model with hf_bnn.BinaryTrainer (hf_bnn.unpack_ makes one "
        "of this), put adapters on it with peft, or freeze the packed layers if the rest is all that you mean to train"
    )


class _Packed(nn.Module):
    """What packed layers and tables share: integers under `weight`, and scales whose type no cast of the model changes.

    The latent module computes its scales in that type, whatever its own: in another they would round otherwise.
    """

    weight_scale: Tensor
    float_dtype: torch.dtype  # what it is cast to: of the numbers that it puts out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        scale = self.weight_scale
        self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, nn.Parameter):
            raise ValueError(
                f"the weight of a {type(self).__name__} is bits, which take no parameter in their place: a "
                "normalization cannot be folded into them (torch.nn.utils.fusion). Keep the normalization; "
                "hf_bnn.unpack_(model) makes the weights parameters again"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        *_, unexpected, _ = rest
        state_dict = own_form(state_dict, f"{prefix}weight", self.weight, unexpected)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _PackedWeight(_Packed):
    """What both packed layers share. Comes before the float layer whose place they take."""

    product: LinearProduct | Conv2dProduct
    has_kernel = True  # whether compiled kernels, where there are any, are faster than torch
    _prepared: "_Prepared | None" = None
    _warned = False

    def hold(
        self,
        bytes_shape: tuple[int, ...],
        bias: bool,
        levels: SignedLevels | None,
        binary_inputs: bool,
        weight_scaling: str,
        device: torch.device | str | None,
    ) -> None:
        """Register the bits, the scales and the bias, all of them still to be loaded."""
        self.binary_inputs, self.weight_scaling = binary_inputs, weight_scaling
        self.input_levels = SignedLevels() if levels is None else levels
        out = bytes_shape[0]
        self.float_dtype = torch.get_default_dtype()
        self.register_buffer("weight", torch.zeros(bytes_shape, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.zeros(out, dtype=torch.float32, device=device))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out, device=device)) if bias else None)

    @classmethod
    def empty(
        cls, layer: nn.Module, levels: SignedLevels | None, binary_inputs: bool, weight_scaling: str
    ) -> "_PackedWeight":
        """The packed form of a float or latent `layer`, its bits still to be loaded."""
        structure = (levels, binary_inputs, weight_scaling, layer.weight.device)
        new = cls(*cls.geometry(layer), layer.bias is not None, *structure)
        new.bias, new.float_dtype = layer.bias, layer.weight.dtype
        return new

    @classmethod
    def empty_like(cls, layer: WeightedLayer) -> "_PackedWeight":
        """The packed form of a latent `layer`, its bits still to be loaded."""
        return cls.empty(layer, layer.input_levels, layer.binarize == "both", layer.weight_scaling)

    @classmethod
    def from_latent(cls, layer: WeightedLayer) -> "_PackedWeight":
        new = cls.empty_like(layer)
        new.weight.copy_(new.pack(layer.weight))
        new.weight_scale.copy_(layer.scale())
        return new

    def to_latent(self) -> WeightedLayer:
        """A trainable layer whose latent weights are the signs times their scale."""
        binarize = "both" if self.binary_inputs else "weights"
        structure = (self.bias is not None, binarize, self.input_levels, self.weight_scaling)
        layer = self.latent(*self.geometry(self), *structure)
        signs = self.signs()
        layer.weight = nn.Parameter(signs * self.weight_scale.view(-1, *[1] * (signs.dim() - 1)))
        layer.bias = self.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(
                f"a packed layer was given {x.dtype} inputs: perhaps the model casts them to the dtype of the layer's "
                "weight, as T5 does; leave that layer float (exclude=...) when the model is made binary"
            )
        compiled = self.binary_inputs and not torch.is_grad_enabled() and not looked_on()
        if compiled and x.numel() and x.device == self.weight.device and takes_panels(self.weight) and self.has_kernel:
            return self.run_compiled(x)
        signs, product = self.signs(), self.product
        if torch.is_grad_enabled() and (x.requires_grad or self.training):
            if self.training and not self._warned and not torch.compiler.is_compiling():
                self._warn_of_training()
            inputs = clipped_sign(self.input_levels.normalize(x)) if self.binary_inputs else x
            total = product.weight_sum(signs, x) if self.input_levels.shifted else None
            bias = None if self.bias is None else product.per_channel(self.bias)
            scale = product.per_channel(self.weight_scale)
            return rescale(product(inputs, signs.to(inputs.dtype)), scale, total, self.input_levels, bias).to(x.dtype)
        return sign_product(product, x, signs, self.weight_scale, self.input_levels, self.bias, self.binary_inputs)

    def _warn_of_training(self) -> None:
        """Say, once, that bits do not learn, unless all that could learn here is frozen, as under an adapter."""
        self._warned = True
        if any(parameter.requires_grad for parameter in self.parameters()):
            warn_of_training()

    def entries(self) -> list[Source]:
        """Of all that `make_operands` reads."""
        levels = self.input_levels
        return [*tensors_of(self), (self._modules, "input_levels"), *tensors_of(levels)]

    def call_of(self, operands: tuple) -> Callable[[Tensor], Tensor]:
        """The product with what `make_operands` has made."""
        raise NotImplementedError(f"{type(self).__name__} must say what runs it")

    def operands(self) -> tuple:
        """What `make_operands` makes: when first asked for, and anew when a tensor that it is made of has changed."""
        return self.prepared().operands

    def run_compiled(self, x: Tensor) -> Tensor:
        return self.prepared().call(x)

    def prepared(self) -> "_Prepared":
        """What `operands` returns, and a call of it."""
        found = self._prepared
        if found is None or found.backend != kernels.backend() or not found.sources.same():
            with torch.inference_mode(False), torch.no_grad():
                sources, operands = Sources(self.entries()), self.make_operands()
                found = self._prepared = _Prepared(sources, kernels.backend(), operands, self.call_of(operands))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # a copy, or a pickle, makes its own


class _Prepared(NamedTuple):
    """Operands as a backend's kernel takes them, and what they were made of."""

    sources: Sources
    backend: str
    operands: tuple
    call: Callable[[Tensor], Tensor]


class PackedLinear(_PackedWeight, nn.Linear):
    """`(..., in) -> (..., out)` from one bit per weight: uint8 `(out, ceil(in / 8))`, bit 1 = negative.

    A gradient asked of the input (an adapter in an earlier layer learns) is the straight-through estimator's.
    """

    product = LinearProduct()
    latent = BinaryLinear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        levels: SignedLevels | None = None,
        binary_inputs: bool = True,
        weight_scaling: str = "channel",
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Linear's: it would register a float parameter under `weight`
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, -(-in_features // 8))
        self.hold(shape, bias, levels, binary_inputs, weight_scaling, device)

    @staticmethod
    def geometry(layer: nn.Linear) -> tuple[int, int]:
        return layer.in_features, layer.out_features

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        return pack_bits(weight)

    def signs(self) -> Tensor:
        """The weights' signs, int8 `(out, in)`."""
        return unpack_bits(self.weight, self.in_features)

    def make_operands(self) -> tuple:
        """What a kernel takes beside the inputs: it then computes what `sign_product` does, bit for bit."""
        levels, offset = self.input_levels, self.bias
        scale, shift = levels.affine()
        if levels.shifted:
            offset = self.product.weight_sum(self.signs(), None) * (self.weight_scale * shift)
            offset = offset if self.bias is None else offset + self.bias
        return self.make_weight(), self.weight_scale * scale, offset, levels.threshold()

    def make_weight(self) -> kernels.LinearWeight:
        """The bits as a kernel takes them."""
        return kernels.LinearWeight.from_bits(self.weight, self.in_features)

    def call_of(self, operands: tuple) -> Callable[[Tensor], Tensor]:
        return kernels.LinearCall(*operands)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedConv2d(_PackedWeight, nn.Conv2d):
    """`(N, in, H, W) -> (N, out, H', W')` from one bit per weight, bit 1 = negative; N may be absent.

    The bits run along the input channels: uint8 `(out, ceil(in / groups / 8), kh, kw)`. Gradients as in PackedLinear.
    Without `levels` the constructor makes a float nn.Conv2d: PEFT builds its adapters as `type(layer)(in, out, ...)`.
    """

    latent = BinaryConv2d

    def __new__(cls, *args, **kwargs):
        packed = "levels" in kwargs or len(args) > LEVELS_POSITION or not (args or kwargs)  # none: a copy or a pickle
        return super().__new__(cls) if packed else nn.Conv2d(*args, **kwargs)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        levels: SignedLevels | None = None,
        binary_inputs: bool = True,
        weight_scaling: str = "channel",
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Conv2d's: it would register a float parameter under `weight`
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.padding_mode, self.transposed, self.output_padding = "zeros", False, (0, 0)
        shape = (out_channels, -(-in_channels // groups // 8), *kernel_size)
        self.hold(shape, bias, levels, binary_inputs, weight_scaling, device)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 4 else super().forward(one_image(x)).squeeze(0)

    @staticmethod
    def geometry(layer: nn.Conv2d) -> tuple:
        size = (layer.in_channels, layer.out_channels, layer.kernel_size)
        return *size, layer.stride, padding_of(layer), layer.dilation, layer.groups

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        rows = weight.permute(0, 2, 3, 1)
        return pack_bits(rows.flatten(0, 2)).view(*rows.shape[:3], -1).permute(0, 3, 1, 2)

    def signs(self) -> Tensor:
        """The weights' signs, int8 `(out, in / groups, kh, kw)`."""
        rows = self.weight.permute(0, 2, 3, 1)
        signs = unpack_bits(rows.flatten(0, 2), self.in_channels // self.groups)
        return signs.view(*rows.shape[:3], -1).permute(0, 3, 1, 2)

    @property
    def product(self) -> Conv2dProduct:
        return Conv2dProduct(self.stride, self.padding, self.dilation, self.groups)

    @property
    def has_kernel(self) -> bool:
        return groups_are_large(self.in_channels, self.out_channels, self.groups)

    def make_operands(self) -> tuple:
        """What a kernel takes beside the inputs: it then computes what `sign_product` does, bit for bit."""
        levels = self.input_levels
        scale, shift = levels.affine()
        shift = self.weight_scale * shift if levels.shifted else None
        geometry = (self.stride, self.padding, self.dilation)
        return self.make_weight(), self.weight_scale * scale, self.bias, shift, *geometry, levels.threshold()

    def make_weight(self) -> kernels.Conv2dWeight:
        """The bits as a kernel takes them."""
        return kernels.Conv2dWeight.from_bits(self.weight, self.in_channels, self.groups)

    def call_of(self, operands: tuple) -> Callable[[Tensor], Tensor]:
        return lambda x: kernels.conv2d(x, *operands)


class _PackedEmbedding(_Packed, nn.Embedding):
    """The base of both packed tables: integers under `weight`, one scale per row under `weight_scale`."""

    weight_dtype: torch.dtype
    scale_dtype: torch.dtype

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Embedding's: it would register a float parameter under `weight`
        self.float_dtype = torch.get_default_dtype() if dtype is None else dtype
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        shape = (num_embeddings, self.row_bytes(embedding_dim))
        self.register_buffer("weight", torch.zeros(shape, dtype=self.weight_dtype, device=device))
        self.register_buffer("weight_scale", torch.zeros(num_embeddings, dtype=self.scale_dtype, device=device))

    @staticmethod
    def row_bytes(embedding_dim: int) -> int:
        return embedding_dim

    @classmethod
    def empty_like(cls, layer: nn.Embedding) -> "_PackedEmbedding":
        """The packed form of `layer`, its integers still to be loaded."""
        size = (layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
        return cls(*size, layer.weight.device, layer.weight.dtype)

    def integers(self, rows: Tensor) -> Tensor:
        """Stored rows `(n, row_bytes)` as int8 `(n, dim)`."""
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        scale = self.weight_scale.index_select(0, flat)  # unlike indexing it takes no -1, as nn.Embedding takes none
        rows = self.integers(self.weight.index_select(0, flat)).float() * scale.float().unsqueeze(-1)
        return rows.to(self.float_dtype).view(*ids.shape, self.embedding_dim)


class PackedInt8Embedding(_PackedEmbedding):
    """ids `(...)` to rows `(..., dim)`, from int8 `(rows, dim)` and a float32 scale per row, in `float_dtype`."""

    weight_dtype, scale_dtype = torch.int8, torch.float32

    @classmethod
    def from_latent(cls, layer: Int8Embedding) -> "PackedInt8Embedding":
        new = cls.empty_like(layer)
        new.weight, new.weight_scale = layer.quantize(layer.weight.detach())
        return new

    def to_latent(self) -> Int8Embedding:
        """A trainable table with the rounded rows as its parameter."""
        return _latent_table(self, Int8Embedding)


class PackedBinaryEmbedding(_PackedEmbedding):
    """ids `(...)` to rows `(..., dim)`, from uint8 `(rows, ceil(dim / 8))`, bit 1 = negative, and a float16 scale."""

    weight_dtype, scale_dtype = torch.uint8, torch.float16

    @staticmethod
    def row_bytes(embedding_dim: int) -> int:
        return -(-embedding_dim // 8)

    @classmethod
    def from_latent(cls, layer: BinaryEmbedding) -> "PackedBinaryEmbedding":
        new = cls.empty_like(layer)
        signs, new.weight_scale = layer.quantize(layer.weight.detach())
        new.weight = pack_bits(signs)
        return new

    def to_latent(self) -> BinaryEmbedding:
        """A trainable table with the signs times their scale as its parameter."""
        return _latent_table(self, BinaryEmbedding)

    def integers(self, rows: Tensor) -> Tensor:
        return unpack_bits(rows, self.embedding_dim)


def _latent_table(packed: _PackedEmbedding, cls: type) -> nn.Embedding:
    table = cls(packed.num_embeddings, packed.embedding_dim, packed.padding_idx)
    rows = packed.integers(packed.weight).float() * packed.weight_scale.float().unsqueeze(-1)
    table.weight = nn.Parameter(rows.to(packed.float_dtype))
    return table


PACKED = {
    BinaryLinear: PackedLinear,
    BinaryConv2d: PackedConv2d,
    Int8Embedding: PackedInt8Embedding,
    BinaryEmbedding: PackedBinaryEmbedding,
}


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of `model` holds packed weights."""
    return any(isinstance(module, tuple(PACKED.values())) for module in model.modules())
