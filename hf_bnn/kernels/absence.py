"""Finds out, from the files of an installation, why it has no compiled library, and says what to do."""

from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
BUILD_HERE = "Install a C compiler such as gcc and build hf_bnn from its sources on this machine"
FROM_SOURCES = "pip install --force-reinstall --no-deps --no-cache-dir --no-binary hf-bnn hf-bnn"


class Absence(NamedTuple):
    """`problem` completes a sentence after "since"; `remedy` is a sentence that says what to do."""

    problem: str
    remedy: str


def installed_files(folder: Path) -> list[Path]:
    """Files in `folder` that pip recorded. Empty if the imported package is not the one that pip installed."""
    try:
        recorded = distribution("hf-bnn")
    except PackageNotFoundError:
        return []
    paths = (Path(recorded.locate_file(file)) for file in recorded.files or ())
    return [path for path in paths if path.parent == folder]


def absence(folder: Path = FOLDER) -> Absence:
    """Why this interpreter finds no `_library` in `folder`."""
    recorded = [path for path in installed_files(folder) if path.name.startswith("_library.")]
    present = sorted(path.name for path in folder.glob("_library.*"))
    if present:
        return Absence(
            f"{', '.join(present)} in {folder} was built for another platform or Python (this one loads "
            f"_library{', _library'.join(EXTENSION_SUFFIXES)})",
            f"{BUILD_HERE}: {FROM_SOURCES}",
        )
    if recorded:
        return Absence(
            f"{recorded[0]} was installed and has been deleted since",
            "Reinstall hf_bnn: pip install --force-reinstall --no-deps hf-bnn",
        )
    if (folder / "csrc").is_dir():
        root = folder.parents[1]
        return Absence(
            f"they have not been built in the source tree {root} (pip was not run there, or found no "
            "working C compiler)",
            f"Install a C compiler such as gcc and run: pip install --no-deps -e {root}",
        )
    return Absence(
        "this installation was built without them, for want of a working C compiler on the machine that built it",
        f"{BUILD_HERE}: {FROM_SOURCES}",
    )
