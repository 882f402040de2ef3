"""Packed layers that hold their weights only in the layout of a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels.operands import runs_directly
from ..kernels.sources import Source, lent_tensors_of
from ..kernels.weights import PANEL, Conv2dWeight, LinearWeight, conv2d_signs, linear_signs, takes_panels
from ..nn.layers import one_image
from ..nn.packed import PackedConv2d, PackedLinear
from .base import Fused, Planned


class _KernelLayer(Fused):
    """Base of both kernel layers. Reading `weight` rebuilds the bits of the checkpoint."""

    made = ("kernel_weight", "kernel_scale", "kernel_threshold")

    def derive(self) -> None:
        operands = self.make_operands()
        self._prepared = None
        self.keep(*operands)

    def entries(self) -> list[Source]:
        levels = self.input_levels
        own = lent_tensors_of(self, "bias", "weight_scale")
        return [*own, (self._modules, "input_levels"), *lent_tensors_of(levels)]

    def keep(self, *operands: Any) -> None:
        """Hold the result of `make_operands`."""
        raise NotImplementedError(f"{type(self).__name__} must say what its kernel takes")

    def weight_operand(self) -> LinearWeight | Conv2dWeight:
        """The weight in the layout of the kernel."""
        raise NotImplementedError(f"{type(self).__name__} must say how its weight is laid out")

    def make_weight(self) -> LinearWeight | Conv2dWeight:
        return super().make_weight() if "weight" in self._buffers else self.weight_operand()

    def hold_tensors(self, **tensors: Tensor | None) -> None:
        """Register buffers in place of the bits. They move with the module, but a state dict omits them."""
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach(), persistent=False)
        self._buffers.pop("weight", None)

    def kernel_signs(self) -> Tensor:
        """`signs()` from the layout of the kernel."""
        raise NotImplementedError(f"{type(self).__name__} must say how its weight is laid out")

    def signs(self) -> Tensor:
        return super().signs() if "weight" in self._buffers else self.kernel_signs()

    @property
    def weight(self) -> Tensor:
        """The bits in the layout of a checkpoint, uint8, in a new tensor."""
        bits = self._buffers.get("weight")
        return self.pack(self.kernel_signs()) if bits is None else bits

    @weight.setter
    def weight(self, bits: Tensor) -> None:
        self._buffers["weight"] = bits
        with torch.no_grad():
            self.derive()

    def restore(self) -> None:
        bits = self.weight
        super().restore()
        self.register_buffer("weight", bits)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._buffers["weight"] = self.weight  # while it is loaded
        try:
            super()._load_from_state_dict(*args)
        except ValueError:
            del self._buffers["weight"]
            raise


class KernelLinear(_KernelLayer, PackedLinear):
    """A PackedLinear, with binary or float inputs, whose weight is laid out for a kernel. For inference.

    With float inputs the kernel sums in an order of its own: close to the packed layer, not equal.
    """

    made = (*_KernelLayer.made, "kernel_offset", "call")

    def keep(self, weight: LinearWeight, scale: Tensor, offset: Tensor | None, threshold: float | Tensor) -> None:
        threshold = torch.as_tensor(threshold, dtype=torch.float32, device=scale.device)
        self.hold_tensors(
            kernel_weight=weight.data, kernel_scale=scale, kernel_offset=offset, kernel_threshold=threshold
        )
        self.call = self.plan()

    def plan(self) -> kernels.LinearCall | kernels.LinearWeightOnlyCall:
        *operands, threshold = self.operands()
        return (
            kernels.LinearCall(*operands, threshold) if self.binary_inputs else kernels.LinearWeightOnlyCall(*operands)
        )

    def operands(self) -> tuple:
        return self.weight_operand(), self.kernel_scale, self.kernel_offset, self.kernel_threshold

    def weight_operand(self) -> LinearWeight:
        return LinearWeight(self.kernel_weight, self.in_features, self.out_features)

    def kernel_signs(self) -> Tensor:
        return linear_signs(self.kernel_weight, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        # Inline `wants_gradient`: calling a method takes a tenth of the time of a small product.
        plain = self.training or not x.is_floating_point() or (torch.is_grad_enabled() and x.requires_grad)
        if plain or not self.current():
            return super().forward(x)
        return self.call(x)

    def run_compiled(self, x: Tensor, running: str) -> Tensor:
        return self.call(x) if self.current() else super().forward(x)


class KernelConv2d(_KernelLayer, PackedConv2d):
    """A PackedConv2d whose weight is laid out for a kernel. For inference."""

    made = (*_KernelLayer.made, "kernel_corners", "kernel_shift", "call")

    def keep(self, weight: Conv2dWeight, scale: Tensor, bias: Tensor | None, shift: Tensor | None, *rest: Any) -> None:
        threshold = torch.as_tensor(rest[-1], dtype=torch.float32, device=scale.device)
        self.hold_tensors(
            kernel_weight=weight.data,
            kernel_corners=weight.corners,
            kernel_scale=scale,
            kernel_shift=shift,
            kernel_threshold=threshold,
        )
        self.call = self.plan()

    def plan(self) -> kernels.Conv2dBlock | None:
        taken = takes_panels(self.kernel_weight) and self.kernel_weight.dtype == torch.int32 and self.groups == 1
        return kernels.Conv2dBlock(*self.operands()) if taken else None

    def operands(self) -> tuple:
        geometry = (self.stride, self.padding, self.dilation)
        return self.weight_operand(), self.kernel_scale, self.bias, self.kernel_shift, *geometry, self.kernel_threshold

    def weight_operand(self) -> Conv2dWeight:
        return Conv2dWeight(self.kernel_weight, self.kernel_corners, self.in_channels, self.groups)

    def kernel_signs(self) -> Tensor:
        return conv2d_signs(self.kernel_weight, self.kernel_corners, self.in_channels, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.wants_gradient(x) or not x.is_floating_point() or not self.current():
            return super().forward(x)
        if self.call is not None and x.dtype == torch.float32 and x.dim() == 4 and runs_directly(x):
            return self.call(x)[0]
        y = kernels.conv2d(x if x.dim() == 4 else one_image(x), *self.operands())
        return y if x.dim() == 4 else y.squeeze(0)

    def run_compiled(self, x: Tensor, running: str) -> Tensor:
        return kernels.conv2d(x, *self.operands()) if self.current() else super().forward(x)


class JointLinear(Planned, nn.Module):
    """Several layers with the same inputs as one product: `(..., in)` to a tuple of `(..., out)`.

    The weights of the layers become views of the joint weight, so that nothing is held twice.
    """

    def __init__(self, layers: Sequence[KernelLinear]):
        super().__init__()
        self.in_features, self.parts, self.out_features = layers[0].in_features, len(layers), layers[0].out_features
        offsets = [layer.kernel_offset for layer in layers]
        tensors = {
            "weight": torch.cat([layer.kernel_weight for layer in layers]),
            "scale": torch.cat([layer.kernel_scale for layer in layers]),
            "offset": None if offsets[0] is None else torch.cat(offsets),
            "threshold": torch.stack([layer.kernel_threshold.view(1) for layer in layers]),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        for layer, part in zip(layers, self.weight.chunk(self.parts), strict=True):
            layer.kernel_weight = part
            layer.call.move(layer.weight_operand())
        self.call = self.plan()

    @staticmethod
    def takes(layers: Sequence[nn.Module]) -> bool:
        """Whether these layers can run as one product."""
        if not all(isinstance(layer, KernelLinear) and layer.binary_inputs for layer in layers):
            return False
        alike = {(layer.in_features, layer.out_features, layer.kernel_offset is None) for layer in layers}
        return len(alike) == 1 and layers[0].out_features % PANEL == 0

    def plan(self) -> kernels.LinearCall:
        weight = LinearWeight(self.weight, self.in_features, self.parts * self.out_features)
        return kernels.LinearCall(weight, self.scale, self.offset, self.threshold)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.call(x).split(self.out_features, -1)
