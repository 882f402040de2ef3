"""The command-line arguments of quickstart.py and its presets."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_bnn import make_method


@dataclass(frozen=True)
class Preset:
    """The length of the training, and its learning rates."""

    teacher_epochs: float
    teacher_learning_rate: float
    epochs: float
    learning_rate: float
    surge_args: str  # if the user gives no --method_args; a step with aux=own takes 1.6 times as long
    altered_copies: int = 0  # of every training sentence, labelled by the teacher: see `altered`


PRESETS = {
    "quick": Preset(
        teacher_epochs=1, teacher_learning_rate=1e-4, epochs=3, learning_rate=2e-3, surge_args="eta=0.1,aux=leaky"
    ),
    "long": Preset(
        teacher_epochs=2,
        teacher_learning_rate=1e-4,
        epochs=2,
        learning_rate=2e-3,
        surge_args="eta=0.1,aux=leaky",
        altered_copies=3,
    ),
}


@dataclass
class QuickstartArguments:
    """The settings that a user may choose."""

    output_dir: str = field(
        default="quickstart", metadata={"help": "Folder for the models, results.json and the plot."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A float BERT encoder. Default: all-MiniLM-L6-v2."}
    )
    preset: str = field(
        default="quick",
        metadata={"help": "quick (minutes; how many depends on the processor) or long (about three times as long)."},
    )
    method: str = field(default="surge", metadata={"help": "A training method: one of hf_bnn.METHODS."})
    method_args: str | None = field(default=None, metadata={"help": 'Its arguments, such as "eta=0.1,aux=own".'})
    binarize: str = field(default="both", metadata={"help": "both, weights or activations."})
    attention: str = field(default="float", metadata={"help": "Attention products: float, binary or boolean."})
    embeddings: str = field(default="int8", metadata={"help": "float, int8 or binary word embeddings."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the binary model. Default: the preset's."}
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of the binary model. Default: the preset's."}
    )
    max_steps: int = field(
        default=-1, metadata={"help": "Stop after N steps, to try the script: no accuracy is reported."}
    )
    threads: int | None = field(
        default=None,
        metadata={"help": "Threads of torch. Default: half of the processor's, which are mostly hyper-threads."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the split, the order of the data and the new classifier."})

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r}: expected one of {', '.join(PRESETS)}")
        make_method(self.method, self.method_args)  # raises for an unknown name or argument

        if self.method == "surge" and self.method_args is None:
            self.method_args = PRESETS[self.preset].surge_args

    @property
    def smoke(self) -> bool:
        return self.max_steps > 0
