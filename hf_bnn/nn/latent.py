"""The base of binary layers for training: a latent float weight, and slots that a method fills with parts.

The layers know no method.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..functional import WEIGHT_SCALINGS, learning_scale, sign, sign_int8, silence, weight_scale
from .levels import SignedLevels
from .products import Conv2dProduct, LinearProduct
from .rescaling import output_offset, rescale, sign_product
from .sign_products import PackedSigns, product_on_bits, takes, whole_precision
from .state_forms import own_form

if TYPE_CHECKING:
    from ..methods.base import Method, Part, Site

BINARIZE = ("both", "weights", "activations")
HALF = (torch.bfloat16, torch.float16)


def signs_of(x: Tensor, levels: SignedLevels, binarizer: "Part", on_bits: bool, retained: bool) -> Tensor:
    """An input as the method's part makes signs of it.

    `on_bits`: keep little of it for the backward pass, unless the part keeps all of it. `retained`: see `normalized`.
    """
    if on_bits and not binarizer.keeps_inputs:
        return binarizer(levels.normalize_compactly(x, retained))
    return binarizer(levels.normalize(x))


class BinaryLayer(nn.Module):
    """The base of all binary layers: it has slots, which a method fills with parts and packing empties."""

    slots: ClassVar[tuple[str, ...]]
    binary_weight = False  # whether it has a weight and uses only its signs
    runs_on_bits = True  # whether products of signs run on bits in training, and only bits of inputs are kept
    partial = False  # whether the method's parts run in evaluation too: see training.partial_evaluation

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
        """Fit the learned levels of the layer's inputs to `inputs`, in place."""
        raise NotImplementedError(f"{type(self).__name__} must say which levels it has")

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """(slot, part) of every part that a method has put into this layer."""
        for slot in self.slots:
            if (part := self._modules[slot]) is not None:
                yield slot, part

    def begin_step(self) -> None:
        """Called before the first forward of an optimizer step."""

    def end_backward(self) -> None:
        """Called after the last backward of an optimizer step."""

    def learns(self, *tensors: Tensor) -> bool:
        """Whether the method's parts must run: in training, or when a gradient is asked for."""
        return self.training or self.partial or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))

    def raise_unless_trainable(self) -> None:
        """Raise RuntimeError if no method is installed. A layer calls this before its method's parts run."""
        if self.around is None:
            raise RuntimeError(
                "a binary layer without a method cannot be trained: call hf_bnn.install_method(model, method) first"
            )


class WeightedLayer(BinaryLayer):
    """The base of BinaryLinear and BinaryConv2d. It precedes the float layer, whose parameters and keys they keep."""

    slots = ("weight_binarizer", "input_binarizer", "around")
    product: LinearProduct | Conv2dProduct
    _step_cache: dict[str, Any] | None = None
    master_weights = False  # whether the optimizer steps on float32 copies of its own, as under FSDP and DeepSpeed
    _noted: tuple[int, int] | None = None  # (id, version) of the half-precision weight in the last pass that learned

    def set_structure(self, binarize: str, levels: SignedLevels | None, weight_scaling: str) -> None:
        """Set which operands are binary, the levels of the inputs, and the scaling of the weights' signs."""
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

    def raise_unless_trainable(self) -> None:
        """Raise RuntimeError if no method is installed, and ValueError if a half-precision weight is being trained.

        To detect the latter, it notes the version of the weight in each pass that learns.
        """
        super().raise_unless_trainable()
        if self.training and self.weight.dtype in HALF and not self.master_weights:
            self._refuse_steps_in_half()

    def _refuse_steps_in_half(self) -> None:
        """Raise ValueError if the weight was changed in place since the last pass that learned.

        Gradients without optimizer steps are fine in any precision.
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
            self.raise_unless_trainable()
            return self.around(self._learning_forward, x)
        if self.binarize == "activations":
            return self._with_float_weight(sign(x - self.input_levels.threshold()))
        binary_inputs = self.binarize == "both"
        signs = sign_int8(self.weight)
        return sign_product(self.product, x, signs, self.scale(), self.input_levels, self.bias, binary_inputs)

    def _learning_forward(self, x: Tensor) -> Tensor:
        """The differentiable binary operator on floats, which the part `around` runs."""
        if self.weight_binarizer is None:
            return self._with_float_weight(self._input_signs(x))
        on_bits = self.runs_on_bits and self.input_binarizer is not None
        x = whole_precision(x) if on_bits else x
        signs = self._input_signs(x)
        signed, scale = self.weight_binarizer(self.weight), self.scale()
        weight = signed
        if self.weight_scaling != "none":
            # In a channel of zeros the signs become 0, not the scale, so that its weights get a gradient.
            weight, scale = silence(signed, scale), learning_scale(scale, weight[0].numel())
        total = self.product.weight_sum(weight, x) if self.input_levels.shifted else None
        bias = None if self.bias is None else self.product.per_channel(self.bias)
        per_channel = self.product.per_channel(scale)
        pure = on_bits and weight is signed and self.weight_binarizer.emits_signs and self.input_binarizer.emits_signs
        if pure and takes(self.product, signs, weight, self.weight):
            offset = output_offset(per_channel, total, self.input_levels, bias)
            level = torch.as_tensor(self.input_levels.affine()[0])
            y = product_on_bits(self.product, signs, weight, scale, level, offset, self._packed_signs())
        else:
            y = rescale(self.product(signs, weight), per_channel, total, self.input_levels, bias)
        return y.to(self.weight.dtype)

    def _input_signs(self, x: Tensor) -> Tensor:
        """The inputs as the method's part makes signs of them; `x` itself where inputs stay float."""
        if self.input_binarizer is None:
            return x
        return signs_of(x, self.input_levels, self.input_binarizer, self.runs_on_bits, self.around.keeps_inputs)

    def _packed_signs(self) -> PackedSigns:
        """The weight's bits: made once in an optimizer step, if a training loop says when one begins and ends."""
        version = (id(self.weight), self.weight._version)
        if self._step_cache is None:
            return PackedSigns.of(self.weight)
        if self._step_cache.get("version") != version:
            self._step_cache.update(version=version, signs=PackedSigns.of(self.weight))
        return self._step_cache["signs"]

    def begin_step(self) -> None:
        """Called before the first forward of an optimizer step: until `end_backward` the weight does not change."""
        self._step_cache = {}

    def end_backward(self) -> None:
        """Called after the last backward of an optimizer step."""
        self._step_cache = None

    def _with_float_weight(self, signs: Tensor) -> Tensor:
        scale, shift = self.input_levels.affine()
        y = self.product(signs * scale + shift, self.weight)
        return y if self.bias is None else y + self.product.per_channel(self.bias)


def binary_layers(model: nn.Module) -> list[BinaryLayer]:
    """The model's binary layers in forward (definition) order."""
    return [module for module in model.modules() if isinstance(module, BinaryLayer)]
