"""The command-line arguments that text and image runs share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass
class SharedModelArguments:
    """Where the model comes from, and which parts of it become binary."""

    STRUCTURE: ClassVar[tuple[str, ...]] = ()  # the arguments that are fields of the binary config

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A float, latent or packed model: Hub name or folder. Default: train from scratch."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloaded files."})
    model_revision: str = field(default="main", metadata={"help": "A branch, tag or commit of the model."})
    token: str | None = field(default=None, metadata={"help": "Hub token. Default: that of `hf auth login`."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Train a new head if the checkpoint's head has a different number of labels."},
    )
    binarize: Literal["both", "weights", "activations", "none"] | None = field(
        default=None, metadata={"help": "What becomes binary. none: train the float model. Default: both."}
    )
    attention: Literal["float", "binary", "boolean"] | None = field(
        default=None, metadata={"help": "The two products of self-attention (text models and ViT). Default: float."}
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A trained classifier to distil from, with the same labels and the same tokenizer or image "
            "processor."
        },
    )

    @property
    def hub(self) -> dict[str, Any]:
        """The arguments of every `from_pretrained`."""
        return {"cache_dir": self.cache_dir, "token": self.token, "trust_remote_code": self.trust_remote_code}

    @property
    def structure(self) -> dict[str, Any]:
        """The fields of the binary config that were given."""
        return {name: getattr(self, name) for name in self.STRUCTURE if getattr(self, name) is not None}


@dataclass
class SharedDataArguments:
    """The dataset, and how much of it is used."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset of the Hub, e.g. stanfordnlp/sst2, or a folder with one."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The dataset's configuration."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on at most N examples: the first N texts, or N images drawn by seed."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate at most N examples, chosen in the same way."}
    )
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first N examples only."})


@dataclass
class OutputArguments:
    """Whether an output_dir that holds the results of another run may be used."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train into an output_dir that holds the results of an earlier run."}
    )
