"""Digests of files, so that a truncated or altered checkpoint is told from a good one."""

import hashlib
import json
import os
from pathlib import Path

MANIFEST = "hf_bnn_manifest.json"


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
    """Raise CorruptCheckpointError unless every named file in `folder` has the digest that was noted for it."""
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
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_manifest(folder: str | os.PathLike) -> None:
    """Note the digest of every file in `folder`. Written last, it is the sign that the folder is complete."""
    digests = {p.name: file_digest(p) for p in sorted(Path(folder).iterdir()) if p.is_file() and p.name != MANIFEST}
    write_atomically(Path(folder) / MANIFEST, json.dumps(digests, indent=2) + "\n")


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether the folder has a manifest: its writer came to the end."""
    return (Path(folder) / MANIFEST).is_file()


def verify_manifest(folder: str | os.PathLike) -> None:
    """Raise CorruptCheckpointError unless the folder is complete and every file in it is as it was written."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CorruptCheckpointError(
            f"{folder} has no {MANIFEST}: its writing was cut off, or it was not written by BinaryTrainer; "
            "resume from an earlier checkpoint-N"
        )
    verify_files(folder, json.loads(path.read_text(encoding="utf-8")))
