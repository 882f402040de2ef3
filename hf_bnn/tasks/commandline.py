"""Parsing, error handling, logging and resuming, shared by the training scripts."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import datasets
import transformers
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, PreTrainedConfig, set_seed

from ..integrity import CorruptCheckpointError
from ..training.allocator import keep_freed_memory
from ..training.arguments import BinaryTrainingArguments
from ..training.checkpoints import chosen_checkpoint
from .errors import UsageError, exit_code


@contextmanager
def user_errors(name: str | None = None) -> Iterator[None]:
    """Turn the libraries' errors about the user's arguments and files into a UsageError of one line.

    `name`: the model or dataset that is being opened. It precedes the message of an OSError.
    """
    try:
        yield
    except UsageError:
        raise
    except (ValueError, OSError, DatasetsError, StrictDataclassError, CorruptCheckpointError) as error:
        cause = f" ({error.__cause__})" if isinstance(error, DatasetsError) and error.__cause__ else ""
        before = f"{name}: " if name and isinstance(error, OSError) else ""
        raise UsageError(before + " ".join(f"{error}{cause}".split())) from error


class Parser(HfArgumentParser):
    """A parser that raises UsageError for every mistake. The command line may begin with a json file of arguments."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.dest == "output_dir":
                action.required = True  # with Trainer's default, one run would overwrite another

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse(self, command_line: list[str] | None) -> tuple[Any, ...]:
        """The dataclasses, filled from the command line (None: this process's).

        The first argument may be a json file of arguments. Arguments after it override it.
        """
        command_line = sys.argv[1:] if command_line is None else command_line
        with user_errors():
            if command_line and command_line[0].endswith(".json"):
                self.take_defaults(command_line[0])
                command_line = command_line[1:]
            return self.parse_args_into_dataclasses(command_line, look_for_args_file=False)

    def take_defaults(self, path: str) -> None:
        """Use the values in a json file as defaults. Raises UsageError if it is not a dictionary of arguments."""
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UsageError(f"{path} is no json file ({error})") from error
        if not isinstance(given, dict):
            kind = type(given).__name__
            raise UsageError(f'{path} holds a {kind}: expected a dictionary, {{"argument": value, ...}}')
        unknown = sorted(given.keys() - {action.dest for action in self._actions})
        if unknown:
            raise UsageError(f"{path}: some keys are not used by the HfArgumentParser: {unknown}")
        for action in self._actions:
            if action.dest in given:
                value, choices = given[action.dest], action.choices
                if choices and value is not None and value not in choices:
                    expected = ", ".join(map(repr, choices))
                    raise UsageError(f"{path}: {action.dest}={value!r}: invalid choice (choose from {expected})")
                action.required = False
        self.set_defaults(**given)


def set_up_logging(training: BinaryTrainingArguments, logger: logging.Logger) -> None:
    """Use one format and level for the script, datasets and transformers."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    level = training.get_process_log_level()
    passive = training.log_level == "passive" and training.should_log
    logger.setLevel(logging.INFO if passive else level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()
    logger.warning(
        f"process {training.process_index} of {training.world_size}, device: {training.device}, "
        f"16-bit training: {training.fp16 or training.bf16}"
    )
    logger.debug(f"Training/evaluation parameters {training}")


def set_up_process(training: BinaryTrainingArguments, logger: logging.Logger) -> None:
    """Set up logging, the C allocator (on a CPU) and the seed, for the whole process."""
    set_up_logging(training, logger)
    if training.device.type == "cpu":
        keep_freed_memory()
    set_seed(training.seed)


def checkpoint_to_resume(training: BinaryTrainingArguments) -> str | None:
    """The checkpoint folder from which training resumes, or None to start from the beginning."""
    with user_errors():
        return chosen_checkpoint(training.resume_from_checkpoint, training.output_dir)


def check_packed_structure(name: str, structure: dict[str, Any], stored: PreTrainedConfig) -> None:
    """Raise UsageError if the arguments would change a packed checkpoint. Latent checkpoints can be changed."""
    record = getattr(stored, "quantization_config", None) or stored
    found = record if isinstance(record, dict) else record.to_dict()
    if found.get("weight_format") != "packed":
        return
    for field, value in structure.items():
        if value != found.get(field, getattr(stored, field, None)):
            raise UsageError(
                f"{name} is packed with {field}={found.get(field)!r}: it cannot become {value!r}; leave out --{field}, "
                "or start from a latent or float checkpoint"
            )


def exit_after(main: Callable[[], object]) -> None:
    """Call a script's `main`.

    An error that the user can correct exits with code 2, a damaged file with 1, a run that a signal has ended early
    with 75, a second Ctrl-C with 130.
    """
    try:
        main()
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        code = exit_code(error, os.path.basename(sys.argv[0]))
        if code is None:
            raise
        sys.exit(code)
