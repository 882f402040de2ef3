"""The distribution: what the sdist and the wheel hold, which Pythons take them, and what is said where kernels lack."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from hf_bnn.kernels import absence, library

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("gcc") or shutil.which("clang")
OTHER_PYTHONS = ("3.10", "3.12", "3.13")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
builds = [pytest.mark.multiprocess, pytest.mark.slow]

# Without hf_bnn/__init__.py, which needs torch: the file that Python's own machinery takes for the extension, loaded.
LOAD = """
import ctypes, compileall, sys
from importlib.machinery import PathFinder
folder = sys.argv[1]
spec = PathFinder.find_spec("_library", [folder + "/hf_bnn/kernels"])
functions = ctypes.CDLL(spec.origin)
functions.hf_bnn_name.restype = ctypes.c_char_p
names = []
while functions.hf_bnn_name(len(names)):
    names.append(functions.hf_bnn_name(len(names)).decode())
assert compileall.compile_dir(folder + "/hf_bnn", quiet=1)
print(functions.hf_bnn_interface(), *names)
"""
PRODUCT = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from hf_bnn import binarize_, kernels, pack_
    assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__
    layer = binarize_(torch.nn.Sequential(torch.nn.Linear(70, 9))).eval()
    x = torch.randn(4, 70)
    with torch.no_grad():
        latent = layer(x)
        assert torch.equal(pack_(layer)(x), latent)
    print(kernels.backend())
print(*(str(w.message) for w in caught if "kernels" in str(w.message)))
"""


def run(*words: object, folder: Path, **environment: str) -> str:
    """The output of a program that must succeed."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_BNN_KERNEL")}
    kept |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", "PIP_NO_INDEX": "1"}
    words, environment = tuple(map(str, words)), {**kept, **environment}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout


def files_of_the_project() -> set[str]:
    """The files that the tests and the README need, relative to the root, without caches and build products."""
    documents = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md"}
    found = {*documents, "constraints.txt", "MANIFEST.in", "pyproject.toml"}
    for folder in ("docs", "hf_bnn", "tests", "scripts", "model_cards"):
        paths = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
        found |= {path.as_posix() for path in paths if path.suffix not in (".pyc", ".so")}
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the sdist, made from a copy of the project, was unpacked."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    for name in sorted(files_of_the_project()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})", folder=source)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist, with a compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    words = ["wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, sdist]
    run(sys.executable, "-m", "pip", *words, folder=folder, CC=COMPILER)
    (found,) = folder.glob("*.whl")
    return found


def pythons(version: str) -> str | None:
    """A Python of this version that starts, if there is one: on the path or of pyenv."""
    name = f"python{version}"
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions").glob(f"{version}.*/bin/{name}")
    for candidate in [shutil.which(name), *sorted(map(str, installed))]:
        words = [candidate, "-m", "pip", "--version"]
        if candidate and subprocess.run(words, capture_output=True, check=False).returncode == 0:
            return candidate
    return None


class TestDistribution:
    pytestmark = builds

    def test_the_sdist_holds_every_file_of_the_project(self, sdist: Path):
        found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
        assert files_of_the_project() - found == set()
        made = {path for path in found if path.startswith("hf_bnn.egg-info/")} | {"PKG-INFO", "setup.cfg"}
        assert found - files_of_the_project() == made

    @needs_compiler
    def test_the_wheel_is_one_for_every_python_from_3_10_on(self, wheel: Path):
        assert wheel.name.startswith("hf_bnn-")
        assert wheel.name.split("-")[2:4] == ["cp310", "abi3"]
        with zipfile.ZipFile(wheel) as files:
            names = files.namelist()
            (entries,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
            assert files.read(entries).decode().split() == ["[console_scripts]", "hf-bnn", "=", "hf_bnn.cli:main"]
        assert [name for name in names if "/_library." in name] == ["hf_bnn/kernels/_library.abi3.so"]
        assert "hf_bnn/py.typed" in names
        assert not [name for name in names if name.startswith(("tests", "scripts")) or "csrc" in name]

    @needs_compiler
    @pytest.mark.parametrize("version", OTHER_PYTHONS)
    def test_another_python_installs_the_wheel_and_loads_its_library(self, wheel: Path, tmp_path: Path, version: str):
        python = pythons(version)
        if python is None:
            pytest.skip(f"no Python {version} here")
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel, folder=tmp_path)
        interface, *names = run(python, "-c", LOAD, tmp_path / "site", folder=tmp_path).split()
        assert int(interface) == library.INTERFACE
        assert {"scalar", "portable"} <= set(names)

    @needs_compiler
    def test_the_installed_wheel_computes_and_says_why_if_its_library_goes(self, wheel: Path, tmp_path: Path):
        site = tmp_path / "site"
        run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, folder=tmp_path)
        backend, said = run(sys.executable, "-c", PRODUCT, site, folder=tmp_path, PYTHONPATH=str(site)).split("\n")[:2]
        assert (backend != "torch", said) == (True, "")
        (site / "hf_bnn" / "kernels" / "_library.abi3.so").unlink()
        backend, said = run(sys.executable, "-c", PRODUCT, site, folder=tmp_path, PYTHONPATH=str(site)).split("\n")[:2]
        assert backend == "torch"
        assert "_library.abi3.so was installed and has been deleted since. Reinstall hf_bnn: pip install" in said

    def test_the_tests_of_the_sdist_can_be_collected(self, sdist: Path):
        words = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
        told = run(sys.executable, *words, folder=sdist, PYTHONPATH=str(sdist), HF_BNN_KERNEL="torch")
        assert "error" not in told.splitlines()[-1]


# Why there are no kernels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the package's kernels would lie."""
    made = tmp_path / "project" / "hf_bnn" / "kernels"
    made.mkdir(parents=True)
    return made


def test_the_library_of_another_platform_is_named(folder: Path):
    (folder / "_library.cp311-win_amd64.pyd").write_bytes(b"")
    problem, remedy = absence.absence(folder)
    assert f"_library.cp311-win_amd64.pyd in {folder} was built for another platform or Python" in problem
    assert all(f"_library{suffix}" in problem for suffix in EXTENSION_SUFFIXES)
    assert "build hf_bnn from its sources on this machine: pip install --force-reinstall" in remedy


def test_a_library_that_was_deleted_is_told_from_one_that_was_never_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    record = [folder / "__init__.py", folder / "_library.abi3.so"]
    monkeypatch.setattr(absence, "installed_files", lambda folder: record)
    problem, remedy = absence.absence(folder)
    assert problem == f"{folder / '_library.abi3.so'} was installed and has been deleted since"
    assert remedy == "Reinstall hf_bnn: pip install --force-reinstall --no-deps hf-bnn"
    record.pop()
    problem, remedy = absence.absence(folder)
    assert "was built without them, for want of a working C compiler on the machine that built it" in problem
    assert "--no-cache-dir" in remedy  # pip keeps the wheel that it built without a compiler


def test_a_source_tree_that_was_never_built_says_how(folder: Path):
    (folder / "csrc").mkdir()
    root = folder.parents[1]
    problem, remedy = absence.absence(folder)
    assert f"they have not been built in the source tree {root}" in problem
    assert remedy.endswith(f"run: pip install --no-deps -e {root}")


def test_what_pip_installed_elsewhere_says_nothing_about_this_folder(folder: Path):
    assert absence.installed_files(folder) == []


def test_pips_record_of_this_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch):
    information = folder.parents[1] / "hf_bnn-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-bnn\nVersion: 0.1.0\n")
    (information / "RECORD").write_text("hf_bnn/__init__.py,,\nhf_bnn/kernels/_library.abi3.so,,\n")
    monkeypatch.syspath_prepend(folder.parents[1])
    assert absence.installed_files(folder) == [folder / "_library.abi3.so"]
    assert "has been deleted since" in absence.absence(folder).problem


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "hf_bnn" / "py.typed").is_file()
