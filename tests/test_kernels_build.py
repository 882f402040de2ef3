"""The extension as installed without a compiler and editable; and its C code under memory checkers."""

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "hf_bnn" / "kernels" / "csrc"
COMPILER = shutil.which("gcc") or shutil.which("clang")

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

REPORT = """
import sys, warnings
# An editable install of the tests' own environment must not be what is found.
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "") or sys.argv[2:]]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from hf_bnn import kernels
    assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__
    import torch
    weight = kernels.LinearWeight.from_bits(torch.tensor([[1], [2]], dtype=torch.uint8), 3)
    y = kernels.linear(torch.tensor([[-1.0, 2.0, 3.0]]), weight, torch.ones(2))
    assert y.tolist() == [[3.0, -1.0]], y
    print(kernels.backend(), kernels.available()[0])
print([str(w.message) for w in caught if "kernels" in str(w.message)])
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what is needed to build, with nothing built in it."""
    to = tmp_path / "source"
    shutil.copytree(ROOT / "hf_bnn", to / "hf_bnn", ignore=shutil.ignore_patterns("__pycache__", "_library*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    return to


def install(source: Path, *arguments: str, compiler: str | None = None) -> None:
    """pip, with what is here already: no network."""
    pytest.importorskip("setuptools", minversion="77")
    command = [
        sys.executable,
        "-m",
        "pip",
        *arguments[:-1],
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    environment.pop("PYTHONPATH", None)
    if compiler:
        environment["CC"] = compiler
    done = subprocess.run(
        [*command, *arguments[-1].split(), str(source)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout


def report(python: str, where: Path, *arguments: str, path: str = "") -> tuple[str, str]:
    """The backends, and the warnings, of a new process that finds hf_bnn in `where`."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_BNN_KERNEL"}
    command = [python, "-c", REPORT, str(where), *arguments]
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": path}, cwd=where, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    backends, warnings = done.stdout.splitlines()
    return backends, warnings


def test_an_installation_without_a_compiler_works_and_says_what_it_lacks(source: Path, tmp_path: Path):
    install(source, f"--target {tmp_path / 'site'}", compiler="no-such-compiler")
    backends, warnings = report(sys.executable, tmp_path / "site", path=str(tmp_path / "site"))
    assert backends == "torch torch"
    assert warnings.count("hf_bnn has no compiled kernels") == 1
    assert "built without them, for want of a working C compiler on the machine that built it" in warnings
    assert "Install a C compiler such as gcc and build hf_bnn from its sources on this machine" in warnings


@needs_compiler
def test_an_editable_installation_has_the_kernels(source: Path, tmp_path: Path):
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    # What is installed for the tests serves here, too, but not their hf_bnn: a line in a .pth file runs no other one.
    packages = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    Path(packages, "others.pth").write_text("\n".join(site.getsitepackages()))
    install(source, f"--python={python}", "--editable", compiler=COMPILER)
    backends, warnings = report(str(python), source, "editable")
    assert "torch" not in backends
    assert warnings == "[]"


@needs_compiler
def test_the_kernels_touch_no_memory_but_their_own(tmp_path: Path):
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off", "-Wno-psabi"]
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    program = str(tmp_path / "check")
    if subprocess.run([COMPILER, *flags, empty, "-o", program], capture_output=True, check=False).returncode:
        pytest.skip("this compiler has no sanitizers")
    sources = [ROOT / "tests" / "kernels_check.c", *sorted(CSRC.glob("*.c"))]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [COMPILER, "-g", "-O1", *flags, *warnings, f"-I{CSRC}", *sources, "-lm", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "checking portable\n" in done.stdout
    assert done.stdout.endswith("0 failures\n")


def test_every_source_file_is_part_of_the_extension():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    missing = [path.name for path in CSRC.iterdir() if f"hf_bnn/kernels/csrc/{path.name}" not in text]
    assert missing == []
