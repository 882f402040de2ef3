"""`hf-bnn pack`: replaces latent float weights by bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..tasks.errors import UsageError
from .common import Parser, check_folder, dump, hub_options, load, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROCESSORS = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def pack(words: list[str]) -> int:
    """Save a latent model as a packed one, with the files of its tokenizer or image processor.

    Args:
        words: LATENT, OUTPUT and the options.

    Raises:
        UsageError: the model is packed already, its method has not finished, or OUTPUT holds a model.
        CorruptCheckpointError: the latent files are damaged.
    """
    parser = Parser(
        "pack",
        "Load a latent model (a checkpoint-N folder of a training run, say), replace its weights by their bits, and "
        "save it.\nThe files of the tokenizer or image processor are copied too.",
        "hf-bnn pack my-model/checkpoint-500 my-model-packed",
    )
    parser.add_argument("latent", metavar="LATENT", help="folder of the latent model, or its name on the Hub")
    parser.add_argument("output", metavar="OUTPUT", help="folder for the packed model")
    parser.add_revision()
    parser.add_argument("--overwrite", action="store_true", help="replace the model in OUTPUT")
    parser.add_argument(
        "--allow_unfinished", action="store_true", help="pack it even if its method has not finished making it binary"
    )
    parser.add_json()
    arguments = parser.parse_args(words)
    output = Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file: name a folder")
    if (output / "config.json").exists() and not arguments.overwrite:
        raise UsageError(f"{output} holds a model already: name another folder, or give --overwrite")
    if output.resolve() == Path(arguments.latent).resolve():
        raise UsageError(f"{output} is the latent model itself, which packing would lose: name another folder")
    check_folder(arguments.latent)
    model = packed(load(arguments.latent, arguments.revision), arguments.latent, arguments.allow_unfinished)
    with one_line(arguments.output):
        model.save_pretrained(output)
        files = copy_processor(arguments.latent, output, arguments.revision)
    counted = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    if arguments.json:
        dump({"output": str(output), "bytes": counted, "processor_files": files})
    else:
        print(f"{output}: {counted:,} bytes of weights; copied: {', '.join(files) or 'no tokenizer or processor'}")
    return 0


def packed(model: PreTrainedModel, name: str, allow_unfinished: bool = False) -> PreTrainedModel:
    """The latent model, packed in place.

    Args:
        model: the result of `load`.
        name: its folder. A trainer_state.json in it records how far a StoMPP run has come.
        allow_unfinished: pack it even if its method has not finished.

    Raises:
        UsageError: `pack_` refuses it.
    """
    from ..convert import pack_

    with one_line(name):
        return pack_(restore_progress(model, Path(name)), allow_unfinished)


def restore_progress(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Restore the StoMPP masks of the model's last step, in place. Other methods have no masks."""
    from ..install import install_method
    from ..methods import Step, method_from_dict
    from ..training import begin_step

    path = folder / "trainer_state.json"
    record = getattr(model.config, "method", None) or {}
    if "stompp" not in str(record.get("name")) or not path.is_file():
        return model
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        done, total = int(state["global_step"]), int(state["max_steps"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read ({error!r}): take another checkpoint") from error
    install_method(model, method_from_dict(record))
    begin_step(model, Step(done - 1, max(total, 1), 0.0, False))
    return model


def copy_processor(source: str, output: Path, revision: str | None) -> list[str]:
    """Copy the files of the tokenizer or the image processor, byte for byte. Returns their names."""
    import shutil

    folder = Path(source)
    if not folder.is_dir():
        return save_processor(source, output, revision)
    found = [name for name in PROCESSORS if (folder / name).is_file()]
    for name in found:
        shutil.copyfile(folder / name, output / name)
    return found


def save_processor(source: str, output: Path, revision: str | None) -> list[str]:
    """Save the tokenizer or the image processor of a model on the Hub. Returns the names of the files."""
    from transformers import AutoProcessor

    before = set(output.iterdir())
    try:
        AutoProcessor.from_pretrained(source, trust_remote_code=False, **hub_options(revision)).save_pretrained(output)
    except (OSError, ValueError) as error:
        print(f"{source} has no tokenizer or image processor ({' '.join(str(error).split())[:200]})", file=sys.stderr)
    return sorted(path.name for path in set(output.iterdir()) - before)
