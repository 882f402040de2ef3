"""Other architectures, as a quantizer of transformers: `from_pretrained(name, quantization_config=BinaryConfig())`."""

from __future__ import annotations

import copy
import inspect
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import _load_parameter_into_model
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..convert import is_binary, to_binary_, to_packed_
from ..functional import WEIGHT_SCALINGS
from ..install import install_method
from ..integrity import CorruptCheckpointError
from ..nn.layers import BINARIZE
from ..nn.levels import ElasticLevels, SignedLevels, UnsignedLevels
from ..nn.scalar_levels import has_scalar_levels, set_levels_shape_
from ..selection import (
    KINDS,
    candidates,
    check_patterns,
    choose_layers,
    covered,
    default_exclude,
    head_layers,
    obstacles,
    pattern_list,
)
from ..summary import composition
from .base import BinaryModelMixin
from .checkpoint import AGAIN, CONFIG_DIGEST, check_sizes
from .config import check_choice
from .loading import one_line, refuse_offloading

logger = logging.get_logger(__name__)

NAME = "hf_bnn"


@register_quantization_config(NAME)
class BinaryConfig(QuantizationConfigMixin):
    """The structure of a binary model without a binary class of its own: `quantization_config` in its config.json.

    - `binarize`: "both", "weights" or "activations".
    - `levels` of the binary layers' inputs: "elastic" (learned scale and threshold) or "signed" ({-1, 1}).
    - `unsigned`: patterns of the layers whose inputs are rarely negative, after ReLU or GELU. Their levels are {0, a}
      ("elastic") or {0, 1} ("signed").
    - `weight_scaling`: one scale per output "channel", per "layer", or "none".
    - `include`: patterns of the layers that become binary. None: all nn.Linear and nn.Conv2d.
    - `exclude`: patterns of the layers that stay float. None: heads, output embeddings, layers that read the image,
      poolers, and layers that cannot be binary; the names are stored when the model is built.
    - `weight_format`, `weights_sha256`: what the checkpoint holds ("latent" or "packed") and its files' digests,
      written when it is saved.

    Patterns are shell-style and match dotted module names, with or without the base model's prefix. A pattern that
    matches a module covers everything in it. Import hf_bnn before loading such a model: without it transformers skips
    the quantizer.

    >>> config = BinaryConfig(levels="signed", exclude=["lm_head"])
    >>> BinaryConfig.from_dict(config.to_dict()).exclude
    ['lm_head']
    """

    def __init__(
        self,
        binarize: str = "both",
        levels: str = "elastic",
        unsigned: list[str] | None = None,
        weight_scaling: str = "channel",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        weight_format: str = "latent",
        weights_sha256: dict[str, str] | None = None,
        quant_method: str = NAME,
    ):
        check_choice("binarize", binarize, BINARIZE)
        check_choice("levels", levels, ("elastic", "signed"))
        check_choice("weight_scaling", weight_scaling, WEIGHT_SCALINGS)
        check_choice("weight_format", weight_format, ("latent", "packed"))
        check_choice("quant_method", quant_method, (NAME,))
        self.quant_method = quant_method
        self.binarize, self.levels, self.weight_scaling = binarize, levels, weight_scaling
        self.unsigned = pattern_list("unsigned", unsigned)
        self.include, self.exclude = pattern_list("include", include), pattern_list("exclude", exclude)
        self.weight_format, self.weights_sha256 = weight_format, weights_sha256

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        # The digest is that of a file: an object made from it may differ.
        saved = CONFIG_DIGEST in config_dict
        config_dict = {key: value for key, value in config_dict.items() if key != CONFIG_DIGEST}
        known = list(inspect.signature(cls).parameters)
        if unknown := sorted(config_dict.keys() - set(known)):
            raise ValueError(
                f"quantization_config has the unknown keys {unknown}: this hf_bnn knows {known}. "
                "Upgrade hf_bnn if a newer one wrote them, or take them out"
            )
        try:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        except (TypeError, ValueError) as error:
            if not saved:
                raise
            message = f"the quantization_config of config.json is not one of hf_bnn: {one_line(error)}; {AGAIN}"
            raise CorruptCheckpointError(message) from error

    def apply_(self, model: PreTrainedModel) -> PreTrainedModel:
        """Make a float model in memory binary, in place, as from_pretrained does while loading.

        For models made by `from_config`, which ignores quantization_config.
        """
        quantizer = BinaryQuantizer(self, pre_quantized=False)
        quantizer.preprocess_model(model)
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
        return model

    def input_levels(self, name: str, base: str) -> SignedLevels:
        """The levels of the input of the layer `name`, in a model whose base model is called `base`."""
        signed = not covered(name, self.unsigned or [], base)
        if self.levels == "elastic":
            return ElasticLevels(signed)
        return SignedLevels() if signed else UnsignedLevels()

    def choose(self, model: PreTrainedModel, built: bool = False) -> dict[nn.Module, str]:
        """The layers of `model` to make binary, with their names. Stores the default `exclude`, if it is None.

        `built`: the checkpoint is already binary, perhaps under another head. Raises ValueError if no layer is left
        and, unless `built`, for a pattern that matches nothing and for a layer that cannot be binary.
        """
        if self.exclude is None:
            self.exclude = default_exclude(model)
        elif built and type(model).__name__ not in (model.config.architectures or ()):
            self.exclude = list(dict.fromkeys([*self.exclude, *head_layers(model)]))
        if not built:
            names = [name for names in candidates(model).values() for name in names]
            check_patterns(model, "unsigned", self.unsigned, names, KINDS)
        layers = choose_layers(model, self.include, self.exclude, check=not built)
        if built and (found := obstacles(model, layers)):  # made binary by an older hf_bnn
            name, reason = next(iter(found.items()))
            logger.warning(f"{len(found)} layers of this checkpoint should not be binary; {name!r}: {reason}")
        return layers


@register_quantizer(NAME)
class BinaryQuantizer(HfQuantizer):
    """Makes a model's linear and conv2d layers binary after it is built and before its weights are loaded."""

    quantization_config: BinaryConfig

    def __init__(self, quantization_config: BinaryConfig, **kwargs: Any):
        # A copy: the `exclude` stored for one model must not affect the next one loaded with the same config.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        if not self.pre_quantized and self.quantization_config.weight_format == "packed":
            raise ValueError(
                "weight_format='packed' says what a binary checkpoint holds, but these weights are float: leave it "
                "out, train the model, and call hf_bnn.pack_(model)"
            )

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        if self.pre_quantized:  # a quantizer's last look at the config before the model is built
            check_sizes(config.to_dict())
        return super().update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        config, base = self.quantization_config, model.base_model_prefix
        if is_binary(model):
            raise ValueError(f"{type(model).__name__} is binary already: leave BinaryConfig out")
        layers = config.choose(model, built=self.pre_quantized)
        structure = (layers, config.binarize, lambda name: config.input_levels(name, base), config.weight_scaling)
        if self.pre_quantized and config.weight_format == "packed":
            to_packed_(model, *structure)
        else:
            install_method(to_binary_(model, *structure))
        self.scalar_levels = self.pre_quantized and has_scalar_levels(None, checkpoint_files)
        if self.scalar_levels:
            set_levels_shape_(model, ())
        model.loaded_format = config.weight_format if self.pre_quantized else "float"
        model.expected_shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        model.config.quantization_config = config
        model.__class__ = _plugged_in(type(model))
        if self.pre_quantized:
            model.check_files(checkpoint_files, get_model_conversion_mapping(model, None, self))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model.__dict__.pop("expected_shapes", None)
        if self.scalar_levels:
            set_levels_shape_(model, (1,))
        if hasattr(model, "hf_device_map"):
            refuse_offloading(model, model.hf_device_map)
        if model.loaded_format == "float":
            logger.warning(f"{type(model).__name__}: {composition(model)}")
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # BinaryTrainer itself refuses packed weights, which hf_bnn.unpack_ makes trainable

    @property
    def is_compileable(self) -> bool:
        return True


class _PluggedIn(BinaryModelMixin):
    """Adds a binary checkpoint's checks, and its way of saving, to a stock model's class."""

    stock: type[PreTrainedModel]

    @property
    def binary_config(self) -> BinaryConfig:
        return self.config.quantization_config

    def wrote(self, source: dict[str, Any]) -> bool:
        plugged_in = source.get("quantization_config")
        return isinstance(plugged_in, dict) and plugged_in.get("quant_method") == NAME

    def mark_tied_weights_as_initialized(self, loading_info) -> None:
        for key, shape in self.__dict__.pop("expected_shapes", {}).items():
            tensor = self.get_parameter_or_buffer(key)
            if tensor.shape != shape:  # with a quantizer, transformers 5.17 accepts any shape
                loading_info.mismatched_keys.add((key, tensor.shape, shape))
                _load_parameter_into_model(self, key, torch.empty(shape, dtype=tensor.dtype, device="meta"))
        super().mark_tied_weights_as_initialized(loading_info)
        if self.loaded_format != "float":
            # Missing tensors are refused as corrupt; for mismatched ones transformers advises to ignore them.
            lost = {found for found in loading_info.mismatched_keys if not self.may_lack(found[0])}
            loading_info.mismatched_keys -= lost
            loading_info.missing_keys |= {found[0] for found in lost}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        # Trap: with a quantizer, transformers replaces the given state dict, which FSDP and ZeRO have gathered, by the
        # model's own.
        quantizer, self.hf_quantizer = getattr(self, "hf_quantizer", None), None
        try:
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        finally:
            self.hf_quantizer = quantizer

    def __reduce__(self):
        return _blank, (self.stock,), self.__dict__


@cache
def _plugged_in(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The binary form of a stock class, under the same name: transformers identifies classes by name."""
    if issubclass(stock, _PluggedIn):
        return stock
    own = {"__init__": stock.__init__, "from_pretrained": stock.from_pretrained, "stock": stock}
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (_PluggedIn, stock), {**own, **names})


def _blank(stock: type[PreTrainedModel]) -> PreTrainedModel:
    """An instance without attributes, which copies and pickles then fill."""
    cls = _plugged_in(stock)
    return cls.__new__(cls)
