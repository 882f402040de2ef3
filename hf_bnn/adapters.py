"""PEFT adapters around binary layers: they train and run beside these, and cannot be merged into them.

A global torch hook reports every registration of a submodule. A module that gets a binary layer as its `base_layer` is
an adapter's layer. Its class is changed to one that raises ValueError where the adapter would silently be lost.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import register_module_module_registration_hook

from .nn.embeddings import RoundedEmbedding
from .nn.layers import BinaryConv2d, BinaryLayer
from .nn.packed import PACKED

KEEP = (
    "Keep the adapter: save it with PeftModel.save_pretrained, and load it on top of the binary model with "
    "PeftModel.from_pretrained"
)


def why_not_merged(base: nn.Module) -> str | None:
    """The reason why an adapter cannot be merged into `base`; None if `base` is no binary layer."""
    if isinstance(base, tuple(PACKED.values())):
        return "its weights are packed, to integers and a scale"
    if isinstance(base, RoundedEmbedding):
        return "its rows are rounded, and so would the adapter be"
    if isinstance(base, BinaryLayer):
        return "only the signs of its weights, or of its inputs, are used, and an adapter is lost under a sign"
    return None


class AdaptedLayer(nn.Module):
    """A binary layer with its adapter beside it: what `merge_and_unload` leaves, since the two cannot become one."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.base_layer = layer  # PEFT's name: under another it would assign the parameters to this module too

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Itself: unloading a later adapter leaves this one in place."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(*args, **kwargs)


def refuse_adapted(model: nn.Module) -> None:
    """Raise ValueError if an adapter has become a part of `model`: a binary checkpoint has no place for it."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            base = module.base_layer.get_base_layer()
            raise ValueError(
                f"{name} is a {type(base).__name__} with an adapter, which merge_and_unload has left beside it, and a "
                f"binary checkpoint has no place for it. {KEEP}; unload() instead of merge_and_unload() drops it"
            )


class _Guarded:
    """Guards an adapter's layer around a binary layer. Comes before the layer's own class."""

    stock: type[nn.Module]
    settled = False  # whether the adapter has become a part of the model: see AdaptedLayer

    def merge(self, *args: Any, **kwargs: Any) -> None:
        base = self.get_base_layer()
        raise ValueError(f"an adapter cannot be merged into a {type(base).__name__}: {why_not_merged(base)}. {KEEP}")

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The module that replaces this layer in the model. PEFT calls this when it unloads adapters."""
        base = self.get_base_layer()
        if self.settled:
            return self
        if not merge:
            return base
        warnings.warn(
            f"adapters stay beside a {type(base).__name__} as float products: they cannot be merged into it, since "
            f"{why_not_merged(base)}. The model computes what it did, but cannot be saved. {KEEP}",
            UserWarning,
            stacklevel=2,
        )
        self.enable_adapters(True)
        if adapter_names:
            self.set_adapter(adapter_names)
        self.settled = True
        for name, part in self.named_modules():  # buffers: training a later adapter must not change them
            if name.partition(".")[0] != "base_layer":
                for key, parameter in list(part._parameters.items()):
                    del part._parameters[key]
                    part.register_buffer(key, None if parameter is None else parameter.detach())
        return AdaptedLayer(self)

    def enable_adapters(self, enabled: bool) -> None:
        if not self.settled:  # a later adapter is switched off; this one is part of the model
            super().enable_adapters(enabled)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        if not self.settled:
            super().set_adapter(*args, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, with float adapters, and without writing to the binary layer."""
        base = self.get_base_layer()
        if getattr(kwargs.get("config"), "use_dora", False) or kwargs.get("use_dora", False):
            raise ValueError(
                f"use_dora=True: DoRA divides by the norms of float weights, which a {type(base).__name__} does not "
                "have; leave it out for LoRA"
            )
        before = base.weight.detach().clone()
        super().update_layer(*args, **kwargs)
        if not torch.equal(base.weight, before):
            with torch.no_grad():
                base.weight.copy_(before)
            raise ValueError(
                f"this kind of initialization takes the adapter's part out of the weights of a {type(base).__name__}, "
                f"but {why_not_merged(base)}: choose another one, such as init_lora_weights=True"
            )
        for name, part in list(self.named_modules()):
            if isinstance(part, BinaryConv2d) and not name.startswith("base_layer"):
                self.set_submodule(name, _float_conv2d(part))  # PEFT made it as type(base_layer)(in, rank, ...)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in PEFT. Raises ValueError if it reads the binary layer's weight instead of calling the layer."""
        asked = self.__dict__.setdefault("_found_calling", set())  # checked once per mode: dropout takes another path
        if self.training in asked or is_compiling():
            return super().forward(*args, **kwargs)
        base, calls = self.get_base_layer(), []
        reads = (
            f"{self.stock.__module__}.{self.stock.__name__} reads the weight of a {type(base).__name__}, which is not "
            "that of a float layer: choose another adapter, such as LoRA or IA3"
        )
        try:
            with _counting(base, calls):
                output = super().forward(*args, **kwargs)
        except RuntimeError as error:
            if calls:
                raise
            raise ValueError(reads) from error
        if not calls:
            raise ValueError(reads)
        asked.add(self.training)
        return output

    def __reduce__(self) -> tuple:
        return _blank, (self.stock,), self.__dict__


@contextlib.contextmanager
def _counting(layer: nn.Module, calls: list[int]) -> Iterator[None]:
    """Append to `calls` whenever `layer` is called. Uses no hooks: some adapters warn of them."""
    own, forward = layer.__dict__.get("forward"), layer.forward

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return forward(*args, **kwargs)

    layer.forward = counted
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


@cache
def _guarded(stock: type[nn.Module]) -> type[nn.Module]:
    """The guarded form of an adapter layer's class, under the same name."""
    own = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock.__name__, (_Guarded, stock), {**own, "stock": stock})


def _blank(stock: type[nn.Module]) -> nn.Module:
    """An instance without attributes, which copies and pickles then fill."""
    cls = _guarded(stock)
    return cls.__new__(cls)


def _guard(module: nn.Module, name: str, part: nn.Module | None) -> None:
    if name != "base_layer" or isinstance(module, _Guarded) or not hasattr(type(module), "merge"):
        return
    while hasattr(part, "base_layer"):  # an adapter around an adapter
        part = part.base_layer
    if part is not None and why_not_merged(part) is not None:
        module.__class__ = _guarded(type(module))


def _float_conv2d(layer: BinaryConv2d) -> nn.Conv2d:
    """A float convolution with the parameters of `layer`."""
    size = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    new = nn.Conv2d(*size, layer.groups, layer.bias is not None, device="meta")
    new.weight, new.bias = layer.weight, layer.bias
    return new.train(layer.training)


register_module_module_registration_hook(_guard)
