"""`hf-bnn doctor`: shows what is installed, and what will be slow and why."""

from __future__ import annotations

import os
import shutil
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .common import Parser, dump

REQUIRED = ("hf-bnn", "torch", "transformers", "accelerate", "safetensors", "numpy")
OPTIONAL = {
    "datasets": "scripts",
    "evaluate": "scripts",
    "pandas": "scripts",
    "scikit-learn": "scripts",
    "scipy": "scripts",
    "pillow": "images",
}
COMPILERS = ("cc", "gcc", "clang")
FASTEST = ("avx512", "avx512bw", "avx2", "neon")


def doctor(words: list[str]) -> int:
    """Print the versions, the processor, the kernels and the optional packages.

    Args:
        words: the options.

    Returns:
        1 if inference will be slow because there are no compiled kernels; else 0.
    """
    parser = Parser(
        "doctor",
        "Show what is installed, which kernels run on this processor, and what will be slow and why.\n"
        "Exit code 1 if there are no compiled kernels.",
        "hf-bnn doctor",
    )
    parser.add_json()
    arguments = parser.parse_args(words)
    found = examined()
    if arguments.json:
        dump(found)
    else:
        print_report(found)
    return int(found["backend"] == "torch")


def examined() -> dict[str, Any]:
    """Everything that `hf-bnn doctor` shows, by JSON key."""
    import torch

    from .. import kernels
    from ..kernels.library import library
    from ..machine import environment

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it warns of missing kernels, which `slow` reports
        backend = kernels.backend()
    lacking = library()
    found = {
        "versions": {name: version_of(name) for name in REQUIRED},
        "optional": {name: version_of(name) for name in OPTIONAL},
        **environment(backend=backend, available=list(kernels.available())),
        "compiler": next(filter(None, map(shutil.which, COMPILERS)), None),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernels_problem": lacking.problem or None,
        "kernels_remedy": lacking.remedy or None,
    }
    return {**found, "slow": slow(found), "missing": missing(found)}


def version_of(name: str) -> str | None:
    """The installed version of a package; None if it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def slow(found: dict[str, Any]) -> list[str]:
    """A sentence for each thing that will be slow, with the reason and the remedy."""
    said = []
    chosen = os.environ.get("HF_BNN_KERNEL")
    best = found["available"][0]
    if found["kernels_problem"]:
        said.append(
            f"Packed models run in torch, without kernels for bits, since {found['kernels_problem']}. "
            f"{found['kernels_remedy']}."
        )
    elif chosen and found["backend"] != best:
        said.append(f"HF_BNN_KERNEL={chosen} asks for slower kernels than {best}: unset it.")
    elif found["backend"] not in FASTEST:
        said.append("Packed models run on portable kernels: there are no faster ones for this processor.")
    if found["threads"] > (found["cores"] or 1):
        said.append(
            f"torch uses {found['threads']} threads on {found['cores']} cores, which wait for each other: "
            f"set OMP_NUM_THREADS={found['cores']}."
        )
    if found["cuda"] is None:
        said.append("Training runs on the CPU, since torch finds no GPU, and takes much longer there.")
    return said


def missing(found: dict[str, Any]) -> list[str]:
    """A sentence for each extra with missing packages."""
    lacking: dict[str, list[str]] = {}
    for name, extra in OPTIONAL.items():
        if found["optional"][name] is None:
            lacking.setdefault(extra, []).append(name)
    use = {"scripts": "train, compare", "images": "train images, predict --images"}
    return [f'{", ".join(names)} (for {use[extra]}): pip install "hf-bnn[{extra}]"' for extra, names in lacking.items()]


def print_report(found: dict[str, Any]) -> None:
    """Print the result of `examined` as a table."""
    installed = {**found["versions"], **found["optional"]}
    rows = [
        ("processor", f"{found['cpu']}, {found['cores']} cores"),
        ("system", f"{found['platform']}, Python {found['python']}"),
        ("GPU", found["cuda"] or "none"),
        ("kernels", f"{found['backend']} (runs here: {', '.join(found['available'])})"),
        ("C compiler", found["compiler"] or "none"),
        ("threads", found["threads"]),
        ("packages", ", ".join(f"{name} {number}" for name, number in installed.items() if number)),
        *(("missing", text) for text in found["missing"]),
        *(("slow", text) for text in found["slow"]),
    ]
    for name, text in rows:
        print(f"{name:11} {text}")
    if not found["slow"]:
        print("Nothing here makes it slow.")
