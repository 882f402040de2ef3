"""Digests of files, by which truncated or altered checkpoints are detected."""

import errno
import hashlib
import json
import os
from fnmatch import fnmatchcase
from pathlib import Path

MANIFEST = "hf_bnn_manifest.json"
# Patterns of file names: the weights of Trainer, FSDP and DeepSpeed, and all files that a resumed run loads.
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.distcp", "*_model_states.pt")
LOADED = (
    *WEIGHTS,
    "*.bin",
    "*.pt",
    "*.pth",
    "*.index.json",
    "trainer_state.json",
    "config.json",
    "adapter_config.json",
)


class CorruptCheckpointError(RuntimeError):
    """A file is missing, truncated or altered since it was saved."""


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def verify_files(folder: str | os.PathLike, digests: dict[str, str]) -> None:
    """Raise CorruptCheckpointError unless every file named in `digests` is in `folder` and has its digest."""
    for name, expected in digests.items():
        path = Path(folder) / name
        if not path.is_file():
            raise CorruptCheckpointError(f"{path} is missing from the checkpoint: fetch or save it again")
        if file_digest(path) != expected:
            raise CorruptCheckpointError(
                f"{path} ({path.stat().st_size} bytes) is truncated or was altered after it was saved "
                f"(its SHA-256 is not {expected[:12]}...): fetch or save it again"
            )


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Write a text file so that readers see the old or the new text, never a part, even after a power cut."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(Path(path).parent)


def sync(path: str | os.PathLike) -> None:
    """Wait until a file's contents, or a folder's list of names, is on the disk."""
    if os.name == "nt" and Path(path).is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_manifest(folder: str | os.PathLike) -> None:
    """Write the digests of all files in `folder` and below. Written last, the manifest marks the folder as complete."""
    digests = {}
    for name in _files_in(folder):
        digests[name] = file_digest(Path(folder) / name)
        sync(Path(folder) / name)
    write_atomically(Path(folder) / MANIFEST, json.dumps(digests, indent=2) + "\n")


def drop_manifest(folder: str | os.PathLike) -> None:
    """Mark `folder` as incomplete by deleting its manifest. Call it before rewriting any of its files."""
    path = Path(folder) / MANIFEST
    if path.is_file():
        path.unlink()
        sync(folder)


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether the folder has a manifest, so that its writer finished."""
    return (Path(folder) / MANIFEST).is_file()


def verify_manifest(folder: str | os.PathLike, needed: tuple[str, ...] = ()) -> None:
    """Raise CorruptCheckpointError unless the folder is complete and its files are unaltered.

    The manifest must name the weights, the files `needed`, and every other file here that a program would load.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CorruptCheckpointError(
            f"{folder} has no {MANIFEST}: its writing was cut off, or it was not written by BinaryTrainer; "
            "resume from an earlier checkpoint-N"
        )
    digests = _read_manifest(path)
    missing = [name for name in needed if name not in digests]
    if not any(_is_one_of(name, WEIGHTS) for name in digests):
        missing.append("the weights")
    unlisted = [name for name in _files_in(folder) if name not in digests and _is_one_of(name, LOADED)]
    if missing or unlisted:
        raise CorruptCheckpointError(
            f"{path} does not name {(missing or unlisted)[0]}, which it would have to protect: it was altered, or the "
            "file was added after the checkpoint was written; resume from an earlier checkpoint-N"
        )
    verify_files(folder, digests)


def _read_manifest(path: Path) -> dict[str, str]:
    """{name: digest}. Raises CorruptCheckpointError for other content and for names outside the folder."""
    try:
        digests = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # including JSONDecodeError and UnicodeDecodeError
        raise CorruptCheckpointError(f"{path} cannot be read ({error}): resume from an earlier checkpoint-N") from error
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise CorruptCheckpointError(
            f"{path} is no table of files and their SHA-256: resume from an earlier checkpoint-N"
        )
    for name in digests:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CorruptCheckpointError(f"{path} names {name!r}, which is outside the checkpoint: do not trust it")
    return digests


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in patterns)


def _files_in(folder: str | os.PathLike) -> list[str]:
    """The names of the files in the folder and below, without manifests."""
    found = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(path.relative_to(folder).as_posix() for path in found)
