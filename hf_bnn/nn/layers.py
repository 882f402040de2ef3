"""Binary layers for training: a latent float weight, and three slots that a method fills. They know no method."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..functional import WEIGHT_SCALINGS, learning_scale, sign, sign_int8, silence, weight_scale
from .levels import SignedLevels
from .products import Conv2dProduct, LinearProduct
from .sign_products import PackedSigns, takes
from .sign_products import sign_product as sign_product_on_bits
from .state_forms import own_form

if TYPE_CHECKING:
    from ..methods.base import Method, Part, Site

BINARIZE = ("both", "weights", "activations")
HALF = (torch.bfloat16, torch.float16)


class _Rescale(torch.autograd.Function):
    """product * (weight_scale * scale) + offset, float32, with few passes over memory. `weight_scale` is a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(product: Tensor, weight_scale: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        y = product * (weight_scale * scale)
        return y if offset is None else y.add_(offset)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        product, weight_scale, scale, offset = inputs
        ctx.save_for_backward(product, weight_scale, scale)
        ctx.offset_shape = None if offset is None else offset.shape

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        product, weight_scale, scale = ctx.saved_tensors
        grad_product = (grad * (weight_scale * scale)).to(product.dtype)
        grad_scale = grad_offset = None
        if ctx.needs_input_grad[2]:  # sum of grad * product * weight_scale
            grad_scale = (grad_product.flatten().float() @ product.flatten().float() / scale).view(scale.shape)
        if ctx.needs_input_grad[3]:
            grad_offset = grad.sum_to_size(ctx.offset_shape)
        return grad_product, None, grad_scale, grad_offset


def rescale(
    product: Tensor, weight_scale: Tensor, weight_sum: Tensor | None, levels: SignedLevels, bias: Tensor | None
) -> Tensor:
    """A product of signs in the units of the output; latent and packed layers share its roundings.

    Inputs on the levels a s + c against weights m t: sum (a s + c) m t = (a m) sum s t + (c m) sum t. `weight_sum`,
    the sum of t over what an output sees, is needed where the levels are shifted. `weight_scale`, `weight_sum` and
    `bias` have shapes that broadcast to that of `product`.
    """
    scale, shift = levels.affine()
    offset = bias
    if levels.shifted:
        offset = weight_sum * (weight_scale * shift)
        offset = offset if bias is None else offset + bias
    return _Rescale.apply(product, weight_scale, torch.as_tensor(scale, device=product.device), offset)


def sign_product(
    product: LinearProduct | Conv2dProduct,
    x: Tensor,
    weight_signs: Tensor,
    weight_scale: Tensor,
    levels: SignedLevels,
    bias: Tensor | None,
    binary_inputs: bool,
) -> Tensor:
    """Inference of a layer with int8 weight signs: exact sums if the inputs are binary too."""
    if binary_inputs:
        y = product.of_signs(sign_int8(x, levels.threshold()), weight_signs)
    else:
        y = product(x, weight_signs.to(x.dtype))
    total = product.weight_sum(weight_signs, x) if levels.shifted else None
    bias = None if bias is None else product.per_channel(bias)
    return rescale(y, product.per_channel(weight_scale), total, levels, bias).to(x.dtype)


class BinaryLayer(nn.Module):
    """What all binary layers share: slots that a method fills with parts, and that packing empties."""

    slots: ClassVar[tuple[str, ...]]
    binary_weight = False  # whether it has a weight of which only the signs are used
    partial = False  # in evaluation too, the method's parts run: see training.partial_evaluation

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for slot in self.slots:
            self.register_module(slot, None)

    def install(self, method: "Method", site: "Site") -> None:
        """Fill the slots with the method's parts."""
        for slot, part in zip(self.slots, self.make_parts(method, site), strict=True):
            setattr(self, slot, part)
        self.set_site(site)

    def set_site(self, site: "Site") -> None:
        """Tell the parts where in the network they are."""
        for _, part in self.parts():
            part.site = site

    def make_parts(self, method: "Method", site: "Site") -> "tuple[Part | None, ...]":
        """One part per slot; None: a slot stays empty."""
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
        learns = self.training or self.partial or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        if learns and self.around is None:
            raise RuntimeError(
                "a binary layer without a method cannot be trained: call hf_bnn.install_method(model, method) first"
            )
        return learns


class WeightedLayer(BinaryLayer):
    """What BinaryLinear and BinaryConv2d share. Comes before the float layer whose parameters and keys they keep."""

    slots = ("weight_binarizer", "input_binarizer", "around")
    product: LinearProduct | Conv2dProduct
    runs_on_bits = True  # whether products of signs in training run on bits
    master_weights = False  # whether the optimizer steps on float32 copies of its own, as under FSDP and DeepSpeed
    _noted: tuple[int, int] | None = None  # which weight learned last in half precision, in which version

    def set_structure(self, binarize: str, levels: SignedLevels | None, weight_scaling: str) -> None:
        """What is binary, on which levels, and how the weights' signs are scaled."""
        if binarize not in BINARIZE:
            raise ValueError(f"binarize={binarize!r}: expected one of {', '.join(BINARIZE)}")
        if weight_scaling not in WEIGHT_SCALINGS:
            raise ValueError(f"weight_scaling={weight_scaling!r}: expected one of {', '.join(WEIGHT_SCALINGS)}")
        self.binarize, self.weight_scaling = binarize, weight_scaling
        self.input_levels = SignedLevels() if levels is None or binarize == "weights" else levels

    @property
    def binary_weight(self) -> bool:
        return self.binarize != "activations"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input example, 1 where it may vary."""
        raise NotImplementedError(f"{type(self).__name__} must say what its inputs look like")

    def make_parts(self, method: "Method", site: "Site") -> "tuple[Part | None, ...]":
        site = site._replace(weight_scaling=self.weight_scaling)
        return (
            method.weight_binarizer(site) if self.binarize != "activations" else None,
            method.input_binarizer(site, self.input_shape) if self.binarize != "weights" else None,
            method.around(site, self),
        )

    def set_site(self, site: "Site") -> None:
        super().set_site(site._replace(weight_scaling=self.weight_scaling))

    def fit_levels(self, *inputs: Tensor) -> None:
        self.input_levels.fit(inputs[0])

    def learns(self, *tensors: Tensor) -> bool:
        learns = super().learns(*tensors)
        if learns and self.training and self.weight.dtype in HALF and not self.master_weights:
            self._refuse_steps_in_half()
        return learns

    def _refuse_steps_in_half(self) -> None:
        """Raise ValueError once the weight, in half precision, has been changed in place between two passes that learn.

        Gradients alone may be asked for in any precision.
        """
        weight = self.weight
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
            return
        before, self._noted = self._noted, (id(weight), weight._version)
        if before is not None and before[0] == id(weight) and before[1] != weight._version:
            raise ValueError(
                f"latent weights in {weight.dtype} do not learn: most updates are smaller than its steps, and are "
                "rounded away. Call model.float() before the optimizer is made, and torch.autocast for speed; or, if "
                "the optimizer keeps float32 copies, set master_weights = True on the binary layers"
            )

    def scale(self) -> Tensor:
        """The scale of each output channel's signs, shape `(out,)`."""
        return weight_scale(self.weight, self.weight_scaling)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, nn.Parameter) and not self.training and self._loses_factors(value):
            raise ValueError(
                f"a {type(self).__name__} with weight_scaling={self.weight_scaling!r} was given its weights times a "
                "factor per output channel, which their signs would not have: a normalization cannot be folded into it "
                "(torch.nn.utils.fusion); keep the normalization behind the layer"
            )
        super().__setattr__(name, value)

    @torch.no_grad()
    def _loses_factors(self, weight: Tensor) -> bool:
        """Whether `weight` is the present one, times factors per output channel, and its scaled signs are not."""
        old = self._parameters.get("weight")
        if old is None or not self.binary_weight or old.is_meta or weight.is_meta or old.shape != weight.shape:
            return False
        rows, new = old.flatten(1).double(), weight.to(old.device).flatten(1).double()
        factors = ((rows * new).sum(1) / rows.square().sum(1).clamp_min(1e-30)).unsqueeze(1)
        if not torch.allclose(new, rows * factors, 1e-3, 1e-3 * float(new.abs().mean())):
            return False  # other weights

        def binary(w: Tensor) -> Tensor:
            return sign(w) * weight_scale(w, self.weight_scaling).unsqueeze(1)

        expected = binary(rows) * factors
        return not torch.allclose(binary(new), expected, 1e-3, 1e-3 * float(expected.abs().mean()))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        *_, unexpected, _ = rest
        state_dict = own_form(state_dict, f"{prefix}weight", self.weight, unexpected)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        if self.learns(x, self.weight):
            return self.around(self._learning_forward, x)
        if self.binarize == "activations":
            return self._with_float_weight(sign(x - self.input_levels.threshold()))
        binary_inputs = self.binarize == "both"
        signs = sign_int8(self.weight)
        return sign_product(self.product, x, signs, self.scale(), self.input_levels, self.bias, binary_inputs)

    def _learning_forward(self, x: Tensor) -> Tensor:
        """The binary operator as the method's parts see it: differentiable, on floats."""
        signs = x
        if self.input_binarizer is not None:
            compact = self.runs_on_bits and not self.input_binarizer.keeps_inputs
            signs = self.input_binarizer(self.input_levels.normalize(x, compact, self.around.keeps_inputs))
        if self.weight_binarizer is None:
            return self._with_float_weight(signs)
        weight, scale = self.weight_binarizer(self.weight), self.scale()
        pure = self.runs_on_bits and self.weight_binarizer.emits_signs
        pure = pure and self.input_binarizer is not None and self.input_binarizer.emits_signs
        if self.weight_scaling != "none":
            # A channel of zeros puts out 0 because its signs do, not its scale: so its weights get a gradient.
            silenced, scale = silence(weight, scale), learning_scale(scale, weight[0].numel())
            pure, weight = pure and silenced is weight, silenced
        if pure and takes(self.product, signs, weight):
            return self._product_on_bits(signs, weight, scale)
        total = self.product.weight_sum(weight, x) if self.input_levels.shifted else None
        bias = None if self.bias is None else self.product.per_channel(self.bias)
        scale = self.product.per_channel(scale)
        y = rescale(self.product(signs, weight), scale, total, self.input_levels, bias)
        return y.to(self.weight.dtype)

    def _product_on_bits(self, signs: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
        level, shift = self.input_levels.affine()
        offset = None if self.bias is None else self.product.per_channel(self.bias)
        if self.input_levels.shifted:
            total = self.product.weight_sum(weight, signs) * (self.product.per_channel(weight_scale) * shift)
            offset = total if offset is None else total + offset
        level = torch.as_tensor(level, device=signs.device)
        packed = PackedSigns.of(self.weight)
        y = sign_product_on_bits(self.product, signs, weight, weight_scale, level, offset, packed)
        return y.to(self.weight.dtype)

    def _with_float_weight(self, signs: Tensor) -> Tensor:
        scale, shift = self.input_levels.affine()
        y = self.product(signs * scale + shift, self.weight)
        return y if self.bias is None else y + self.product.per_channel(self.bias)


class BinaryLinear(WeightedLayer, nn.Linear):
    """`(..., in) -> (..., out)` with weights of +-1 times a scale, and inputs on two levels.

    `binarize` says which side is binary: "both", "weights" (inputs stay float) or "activations" (weights stay float).
    `weight_scaling`: one scale per output "channel" (mean |w|), one per "layer", or "none". In evaluation the product
    runs on integers and is exact.

    >>> layer = BinaryLinear(8, 4).eval().requires_grad_(False)
    >>> layer(torch.randn(2, 8)).shape
    torch.Size([2, 4])
    """

    product = LinearProduct()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        binarize: str = "both",
        levels: SignedLevels | None = None,
        weight_scaling: str = "channel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.set_structure(binarize, levels, weight_scaling)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        binarize: str = "both",
        levels: SignedLevels | None = None,
        weight_scaling: str = "channel",
    ) -> "BinaryLinear":
        """A binary layer that takes over the float layer's parameters."""
        size = (linear.in_features, linear.out_features, linear.bias is not None)
        new = cls(*size, binarize, levels, weight_scaling, device="meta", dtype=linear.weight.dtype)
        new.weight, new.bias = linear.weight, linear.bias
        return new.train(linear.training)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.in_features,)


class BinaryConv2d(WeightedLayer, nn.Conv2d):
    """`(N, in, H, W) -> (N, out, H', W')` with weights of +-1 times a scale, and inputs on two levels; N may be absent.

    `binarize` and `weight_scaling` as in BinaryLinear. A padded position adds exactly nothing, whatever the levels.

    >>> layer = BinaryConv2d(8, 4, 3, padding=1).eval().requires_grad_(False)
    >>> layer(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 4, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        binarize: str = "both",
        levels: SignedLevels | None = None,
        weight_scaling: str = "channel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        super().__init__(*geometry, bias, device=device, dtype=dtype)
        self.padding = padding_of(self)
        self.set_structure(binarize, levels, weight_scaling)

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        binarize: str = "both",
        levels: SignedLevels | None = None,
        weight_scaling: str = "channel",
    ) -> "BinaryConv2d":
        """A binary layer that takes over the float layer's parameters. Raises ValueError unless it pads with zeros."""
        new = cls(
            *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, padding_of(conv), conv.dilation),
            *(conv.groups, conv.bias is not None, binarize, levels, weight_scaling),
            device="meta",
            dtype=conv.weight.dtype,
        )
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 4 else super().forward(one_image(x)).squeeze(0)

    @property
    def product(self) -> Conv2dProduct:
        return Conv2dProduct(self.stride, self.padding, self.dilation, self.groups)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.in_channels, 1, 1)


def one_image(x: Tensor) -> Tensor:
    """`(C, H, W)` as a batch of one. Raises ValueError for inputs of other dimensions."""
    if x.dim() != 3:
        raise ValueError(f"inputs of shape {tuple(x.shape)}: a convolution takes (N, C, H, W), or (C, H, W)")
    return x.unsqueeze(0)


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    """(rows, columns) of zeros on each side. Raises ValueError for padding of another kind."""
    if conv.padding_mode != "zeros":
        raise ValueError(
            f"padding_mode={conv.padding_mode!r}: a binary convolution pads with zeros; leave it float (exclude=...)"
        )
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(n % 2 for n in total):
            raise ValueError(
                f"padding='same' with kernel_size={conv.kernel_size} pads more on one side than on the other: "
                "a binary convolution pads alike; leave it float (exclude=...)"
            )
        return tuple(n // 2 for n in total)
    return conv.padding


def binary_layers(model: nn.Module) -> list[BinaryLayer]:
    """The model's binary layers in forward (definition) order."""
    return [module for module in model.modules() if isinstance(module, BinaryLayer)]


BINARY_CLASSES = {
    nn.Linear: BinaryLinear,
    nn.Conv2d: BinaryConv2d,
}  # what becomes of a float layer of exactly this class
