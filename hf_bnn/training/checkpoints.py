"""The checkpoint-N folders of a training run: which one to resume from, and why a folder is not a checkpoint."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

from ..integrity import CorruptCheckpointError, drop_manifest, is_complete, verify_manifest, write_atomically

logger = logging.getLogger(__name__)

RUN_RECORD = "hf_bnn_run.json"
TRAINER_STATE = "trainer_state.json"
AUTO = ("true", "auto", "last")  # words that stand for the newest checkpoint


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The checkpoint-N folders in `folder`, complete or not: newest run first, and within a run highest N first.

    The folder may also hold checkpoints of an earlier run with higher numbers.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(found, key=lambda path: (_start_of_run(path), int(path.name[11:])), reverse=True)


def _start_of_run(checkpoint: Path) -> str:
    """When the checkpoint's run began. An unreadable record sorts as the newest, so that it is reported."""
    if not (checkpoint / RUN_RECORD).exists():
        return ""
    try:
        return str(read_record(checkpoint)["started"])
    except (CorruptCheckpointError, KeyError):
        return "9"


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint-N in `folder` with undamaged files, or None.

    The newest one has the highest N of the run that began last. Damaged checkpoints are skipped with a warning. All
    files are read.
    """
    for path in checkpoints(folder):
        try:
            verify_checkpoint(path)
        except CorruptCheckpointError as error:
            logger.warning(f"{path} is skipped, and its steps will be repeated: {error}")
        else:
            return str(path)
    return None


def chosen_checkpoint(asked: str | bool | None, output_dir: str | os.PathLike) -> str | None:
    """The complete checkpoint that `resume_from_checkpoint=asked` means; None: start from the beginning.

    True, "last" and "auto" mean the newest complete checkpoint. If there is no checkpoint, "auto" gives None. Raises
    CorruptCheckpointError or ValueError if there is nothing to resume from.
    """
    words = str(asked).lower()
    if asked is None or words == "false":
        return None
    if words not in AUTO:
        verify_checkpoint(asked)
        return str(asked)
    if words == "auto" and not checkpoints(output_dir):
        return None
    folder = last_complete_checkpoint(output_dir)
    if folder is None:
        raise ValueError(
            f"resume_from_checkpoint={asked}: no complete checkpoint in {output_dir}; leave it out to train anew"
        )
    return folder


def verify_checkpoint(folder: str | os.PathLike) -> None:
    """Raise CorruptCheckpointError for an incomplete checkpoint, and ValueError for a folder of another kind."""
    if not Path(folder).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r}: there is no such folder; True takes the newest checkpoint of "
            "output_dir"
        )
    if not is_complete(folder) and (found := _other_kind(Path(folder))):
        raise ValueError(f"resume_from_checkpoint={str(folder)!r}: {found}")
    verify_manifest(folder, (TRAINER_STATE,))


def _other_kind(folder: Path) -> str | None:
    """Says what `folder` holds if it is not a checkpoint, and what to do instead. None: it is meant to be one."""
    if re.fullmatch(r"checkpoint-\d+", folder.name) or (folder / "optimizer.pt").exists():
        return None
    inside = ", ".join(path.name for path in checkpoints(folder)[:3])
    instead = f"name one of its checkpoints ({inside}), or True for the newest" if inside else None
    config = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        anew = "load the adapter with peft, and train it without resume_from_checkpoint, which begins a new run"
        return f"it is a saved adapter without an optimizer's state: {instead or anew}"
    if not config.is_file():
        return f"it holds checkpoints, but is none: {instead}" if instead else None
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return None
    quantization = settings.get("quantization_config") or {}
    packed = "packed" in (settings.get("weight_format"), quantization.get("weight_format"))
    kind = "a finished model, packed to bits," if packed else "a saved model"
    load = "load the model, call hf_bnn.unpack_(model)" if packed else "load the model"
    anew = f"{load} and train it without resume_from_checkpoint, which begins a new run"
    return f"it is {kind} without an optimizer's state, and no checkpoint to resume from: {instead or anew}"


def clear_checkpoint(folder: str | os.PathLike) -> None:
    """Delete a checkpoint-N, the manifest first, before it is written again: old and new files would mix."""
    drop_manifest(folder)
    if Path(folder).is_dir():
        shutil.rmtree(folder)


def write_record(folder: str | os.PathLike, record: dict) -> None:
    """Write the record of its run into a checkpoint."""
    write_atomically(Path(folder) / RUN_RECORD, json.dumps(record, indent=2, default=str) + "\n")


def read_record(folder: str | os.PathLike) -> dict | None:
    """The record that `write_record` wrote; None if an older version of this package wrote none."""
    path = Path(folder) / RUN_RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} cannot be read ({error}): resume from an earlier checkpoint-N") from error
    if not isinstance(record, dict):
        raise CorruptCheckpointError(f"{path} is no record of a run: resume from an earlier checkpoint-N")
    return record


def results_in(folder: str | os.PathLike) -> list[str]:
    """The names of the checkpoints, models and results that an earlier run left in `folder`."""
    kinds = ("*.safetensors", "*_results.json", "trainer_state.json")
    return [path.name for path in checkpoints(folder)] + sorted(
        path.name for kind in kinds for path in Path(folder).glob(kind)
    )
