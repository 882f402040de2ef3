"""Imports point to lower floors only: each part of the package can be read, and used, without those above it."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import tiny_batch, tiny_model

from hf_bnn import pack_

PACKAGE = Path(__file__).parents[1] / "hf_bnn"
FLOORS = [
    {"machine", "observers", "integrity", "method_table", "moved"},
    {"functional"},
    {"kernels"},
    {"estimators"},
    {"methods"},
    {"nn"},
    {"fused", "install", "selection"},
    {"adapters", "convert", "execution", "summary"},
    {"diagnostics", "model_card"},
    {"models"},
    {"training"},
    {"__init__"},
    {"tasks"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MAY_IMPORT_TRANSFORMERS = {"models", "training", "tasks", "cli"}


class Import(NamedTuple):
    """An import statement: `importer` and, if it is of this package, `imported` are parts of the package by name."""

    importer: str
    imported: str
    outside: bool  # of another package
    at_start: bool  # runs when the module is imported, not in a function and not for type checkers only


def imports(package: Path) -> Iterator[Import]:
    """Every import statement in the package."""
    for path in sorted(package.rglob("*.py")):
        depth = len(path.relative_to(package).parts) - 1
        importer = path.relative_to(package).parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        later = {child for node in ast.walk(tree) if _runs_later(node) for child in ast.walk(node)}
        for node in ast.walk(tree):
            at_start = node not in later
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(importer, alias.name.partition(".")[0], True, at_start)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield Import(importer, node.module.partition(".")[0], True, at_start)
            elif isinstance(node, ast.ImportFrom) and node.level == depth + 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                for name in names:
                    yield Import(importer, name.partition(".")[0], False, at_start)


def _runs_later(node: ast.AST) -> bool:
    for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return for_types or isinstance(node, ast.FunctionDef)


def upward(package: Path) -> list[str]:
    """The imports that do not point to a lower floor."""
    return [
        f"{found.importer} imports {found.imported}"
        for found in imports(package)
        if not found.outside and found.importer != found.imported
        if FLOOR[found.imported] >= FLOOR[found.importer]
    ]


def importers_of(package: Path, name: str, outside: bool, at_start: bool = False) -> set[str]:
    """The parts of the package that import `name`."""
    return {
        found.importer
        for found in imports(package)
        if (found.imported, found.outside) == (name, outside) and (found.at_start or not at_start)
    }


def test_every_module_has_a_floor():
    inside = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    modules = {path.stem for path in inside}
    assert modules <= FLOOR.keys()


def test_imports_point_to_lower_floors_only():
    assert upward(PACKAGE) == []


def test_the_check_of_floors_can_fail(tmp_path: Path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "summary.py").write_text("from .convert import pack_\n")
    (tmp_path / "functional.py").write_text("from . import nn\n")
    (tmp_path / "methods" / "surge.py").write_text("from ..nn.layers import BinaryLinear\nfrom .base import Part\n")
    (tmp_path / "convert.py").write_text("from .nn.layers import BinaryLinear\n")
    assert upward(tmp_path) == ["functional imports nn", "methods imports nn", "summary imports convert"]


def test_only_the_upper_floors_import_transformers():
    assert importers_of(PACKAGE, "transformers", outside=True) <= MAY_IMPORT_TRANSFORMERS


def test_no_module_imports_its_own_package_by_its_full_name():
    assert importers_of(PACKAGE, "hf_bnn", outside=True) == set()


def test_methods_are_imported_by_nothing_that_inference_needs():
    assert importers_of(PACKAGE, "methods", outside=False, at_start=True) <= {"training", "tasks"}


def test_the_check_of_what_runs_at_import_can_fail(tmp_path: Path):
    text = "if TYPE_CHECKING:\n    from .methods import A\ndef f():\n    from .methods import B\n"
    (tmp_path / "convert.py").write_text(text)
    (tmp_path / "install.py").write_text("from .methods import A\n")
    assert importers_of(tmp_path, "methods", outside=False, at_start=True) == {"install"}
    assert importers_of(tmp_path, "methods", outside=False) == {"convert", "install"}


CORE_ONLY = """
import sys
import ddp_worker
ddp_worker.import_core()
import hf_bnn.convert, hf_bnn.methods, hf_bnn.summary, hf_bnn.training
loaded = [name for name in ("transformers", "datasets", "accelerate", "sklearn") if name in sys.modules]
assert not loaded, loaded
"""

PACKED_ONLY = """
import sys, torch
# An editable install finds the modules that this copy lacks.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import hf_bnn
assert hf_bnn.__file__.startswith(sys.argv[1]), hf_bnn.__file__
model = hf_bnn.BinaryBertForSequenceClassification.from_pretrained(sys.argv[2])
batch, expected = torch.load(sys.argv[3])
with torch.no_grad():
    assert torch.equal(model(**batch).logits, expected)
assert hf_bnn.summary(model).binary_weights
assert not [name for name in sys.modules if name.startswith("hf_bnn.methods")]
try:
    hf_bnn.Surge
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("hf_bnn.methods was found")
"""


def run_python(code: str, *arguments: Path, path: Path) -> None:
    """Run `code` in another process that finds `path` before anything else."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.multiprocess
def test_the_core_needs_no_transformers():
    run_python(CORE_ONLY, path=Path(__file__).parent)


@pytest.mark.multiprocess
def test_inference_works_without_the_methods(tmp_path: Path):
    model = pack_(tiny_model(attention="binary"))
    batch = {key: value for key, value in tiny_batch().items() if key != "labels"}
    with torch.no_grad():
        torch.save((batch, model(**batch).logits), tmp_path / "expected.pt")
    model.save_pretrained(tmp_path / "model")
    site = tmp_path / "site"
    shutil.copytree(PACKAGE, site / "hf_bnn", ignore=shutil.ignore_patterns("methods", "__pycache__"))
    run_python(PACKED_ONLY, site, tmp_path / "model", tmp_path / "expected.pt", path=site)
