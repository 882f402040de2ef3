"""Bases of packed modules: integer weights with float scales, and the operands that kernels take."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from ..estimators import clipped_sign
from ..kernels.sources import Source, Sources, tensors_of
from ..observers import looked_on
from .layers import WeightedLayer, rescale, sign_product
from .levels import SignedLevels
from .products import Conv2dProduct, LinearProduct
from .state_forms import own_form

logger = logging.getLogger(__name__)


@cache
def warn_of_training() -> None:
    """Warn, once per process, that the weights of a packed model do not learn."""
    logger.warning(
        "a packed model is being trained: its binary weights are bits and do not learn, only what is still float does "
        "(biases, levels, norms, the head). Train the latent model with hf_bnn.BinaryTrainer (hf_bnn.unpack_ makes one "
        "of this), put adapters on it with peft, or freeze the packed layers if the rest is all that you mean to train"
    )


class Packed(nn.Module):
    """Base of packed layers and tables. `weight` holds integers, `weight_scale` scales.

    A cast of the model leaves the dtype of the scales unchanged. The latent module computes its scales in that dtype
    too; in another one they would round differently.
    """

    weight_scale: Tensor
    float_dtype: torch.dtype  # of the outputs of a table, and of weights made latent again

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


class PackedWeight(Packed):
    """Base of both packed layers. Stands before the float layer class that it replaces."""

    product: LinearProduct | Conv2dProduct
    has_kernel = True  # whether compiled kernels are faster than torch for this layer
    _prepared: "Prepared | None" = None
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
        """Register the bits, the scales and the bias, to be loaded later."""
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
    ) -> "PackedWeight":
        """The packed form of a float or latent `layer`, its bits still to be loaded."""
        structure = (levels, binary_inputs, weight_scaling, layer.weight.device)
        new = cls(*cls.geometry(layer), layer.bias is not None, *structure)
        new.bias, new.float_dtype = layer.bias, layer.weight.dtype
        return new

    @classmethod
    def empty_like(cls, layer: WeightedLayer) -> "PackedWeight":
        """The packed form of a latent `layer`, its bits still to be loaded."""
        return cls.empty(layer, layer.input_levels, layer.binarize == "both", layer.weight_scaling)

    @classmethod
    def from_latent(cls, layer: WeightedLayer) -> "PackedWeight":
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
        if compiled and x.is_cpu and x.numel() and self.weight.is_cpu:
            running = kernels.backend()
            if running != "torch" and self.has_kernel:
                return self.run_compiled(x, running)
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
        """Warn that bits do not learn, unless every parameter here is frozen, as under an adapter."""
        self._warned = True
        if any(parameter.requires_grad for parameter in self.parameters()):
            warn_of_training()

    def entries(self) -> list[Source]:
        """The entries that `make_operands` reads."""
        levels = self.input_levels
        return [*tensors_of(self), (self._modules, "input_levels"), *tensors_of(levels)]

    def call_of(self, operands: tuple) -> Callable[[Tensor], Tensor]:
        """The product with these operands, those of `make_operands`."""
        raise NotImplementedError(f"{type(self).__name__} must say what runs it")

    def operands(self) -> tuple:
        """The operands of the kernel, as `make_operands` returns them. Cached until a source or the backend changes."""
        return self.prepared(kernels.backend()).operands

    def run_compiled(self, x: Tensor, running: str) -> Tensor:
        """The forward with the kernel of the backend `running`."""
        return self.prepared(running).call(x)

    def prepared(self, running: str) -> "Prepared":
        """The operands for the backend `running`, which is the one in use, and a call with them."""
        found = self._prepared
        if found is None or found.backend != running or not found.sources.same():
            with torch.inference_mode(False), torch.no_grad():
                sources, operands = Sources(self.entries()), self.make_operands()
                found = self._prepared = Prepared(sources, running, operands, self.call_of(operands))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # copies and pickles make their own


class Prepared(NamedTuple):
    """Operands as the kernel of a backend takes them, with the sources from which they were made."""

    sources: Sources
    backend: str
    operands: tuple
    call: Callable[[Tensor], Tensor]
