"""The fields of a binary model's config that all families share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers.utils import CONFIG_NAME

from ..functional import WEIGHT_SCALINGS
from ..integrity import CorruptCheckpointError
from ..nn.layers import BINARIZE
from ..selection import pattern_list
from .checkpoint import AGAIN, CONFIG_DIGEST, check_sizes, verify_structure
from .loading import BUILDING_ERRORS, one_line

WEIGHT_FORMATS = ("float", "latent", "packed")


def check_choice(field: str, value: object, choices) -> None:
    """Raise ValueError, with the field, the value and the choices, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{field}={value!r}: expected one of {', '.join(map(str, choices))}")


@dataclass
class BinaryConfigFields:
    """The structure of a binary model, as fields of its config. Training settings are not among them."""

    float_model_type: ClassVar[str]  # the model_type of the float checkpoints that this family reads
    also_reads: ClassVar[tuple[str, ...]] = ()  # model types of related families whose float weights it can read

    levels_choices: ClassVar[tuple[str, ...]] = ("elastic", "signed")
    family_patterns: ClassVar[tuple[str, ...]] = ()  # the default of `exclude`; a head may lack some of these modules

    binarize: str = "both"  # both | weights | activations | none: a float model of the same structure
    levels: str = "elastic"  # of the binary layers' inputs: elastic | signed
    weight_scaling: str = "channel"  # one scale per output channel, per layer, or none: channel | layer | none
    exclude: list[str] | None = None  # patterns of the modules that stay float; None: the family's default
    method: dict[str, Any] | None = None  # the method that trained the weights, for the model card
    weight_format: str = "float"  # what the checkpoint holds: float | latent | packed
    weights_sha256: dict[str, str] | None = None  # of the weight files beside this config; written when they are saved

    def __post_init__(self, **kwargs):
        if (skip := kwargs.pop("skip", None)) is not None:  # the name in older configs
            if self.exclude is not None:
                raise ValueError(f"exclude={self.exclude!r} and skip={skip!r}: skip is an older name of exclude")
            self.exclude = skip
        self.exclude = pattern_list("exclude", self.exclude)
        super().__post_init__(**kwargs)
        self.model_type = type(self).model_type  # a float checkpoint's config brings its own
        check_choice("binarize", self.binarize, (*BINARIZE, "none"))
        check_choice("levels", self.levels, self.levels_choices)
        check_choice("weight_scaling", self.weight_scaling, WEIGHT_SCALINGS)
        check_choice("weight_format", self.weight_format, WEIGHT_FORMATS)
        if self.weight_format == "packed" and self.binarize == "none":
            raise ValueError(
                "a packed checkpoint cannot be made float with binarize='none': load it, and hf_bnn.unpack_ it"
            )

    @property
    def skip(self) -> list[str] | None:
        """An older name of `exclude`."""
        return self.exclude

    @skip.setter
    def skip(self, patterns: list[str] | None) -> None:
        self.exclude = patterns

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config == {}:  # transformers would go on with the default sizes
            raise CorruptCheckpointError(f"{pretrained_model_name_or_path} has no {CONFIG_NAME}: {AGAIN}")
        found = config.get("model_type", cls.float_model_type)
        floats = (cls.float_model_type, *cls.also_reads)
        if found not in (*floats, cls.model_type):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {found!r} model: {cls.__name__} reads "
                f"{', '.join(map(repr, floats))} (float) and {cls.model_type!r} (binary) checkpoints"
            )
        return {**config, "model_type": cls.model_type}, kwargs

    @classmethod
    def own_fields(cls) -> set[str]:
        """The names of the fields that this package adds to a float model's config."""
        package = __name__.partition(".")[0]
        own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == package]
        return {name for base in own for name in vars(base).get("__annotations__", ()) if hasattr(base, name)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As in transformers. Raises CorruptCheckpointError if the config differs from its saved digest."""
        saved = CONFIG_DIGEST in config_dict and not kwargs.keys() & config_dict.keys()
        folder = kwargs.get("name_or_path")  # set by the Auto classes
        name = Path(folder) / CONFIG_NAME if folder else CONFIG_NAME
        verify_structure(config_dict, name)
        check_sizes(config_dict, name)
        # Trap: transformers sets a caller's fields on the finished config, which bypasses its checks.
        asked = {field: kwargs.pop(field) for field in cls.own_fields() & kwargs.keys()}
        config_dict = {**{key: value for key, value in config_dict.items() if key != CONFIG_DIGEST}, **asked}
        try:
            return super().from_dict(config_dict, **kwargs)
        except BUILDING_ERRORS as error:
            if saved:
                raise CorruptCheckpointError(f"{name} holds no {cls.__name__}: {one_line(error)}; {AGAIN}") from error
            raise
