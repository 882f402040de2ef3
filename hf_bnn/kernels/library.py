"""The compiled library: finds and loads it, chooses an instruction set, and lends it torch's threads."""

import ctypes
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .absence import BUILD_HERE, FROM_SOURCES, absence

VARIABLE = "HF_BNN_KERNEL"
KNOWN = ("avx512", "avx512bw", "avx2", "neon", "scalar", "portable", "torch")
INTERFACE = 7  # as in csrc/dispatch.c: raised when an exported function or structure changes
OK, OUT_OF_MEMORY, UNSURE, NOT_TAKEN = range(4)  # as in csrc/hf_bnn.h

# Approximate multiply-accumulates per microsecond and thread. They decide whether threads are worth waking.
SPEED = {"avx512": 1_600_000, "avx512bw": 900_000, "avx2": 400_000, "neon": 200_000, "scalar": 130_000}
SLOWEST = 100_000
WORTH_THREADS = 50  # microseconds of work; waking a second thread takes about ten


class LinearPlan(ctypes.Structure):
    """`struct linear_plan` of csrc/hf_bnn.h."""

    _fields_ = (
        *(("set", c_int64), ("pool", c_void_p), ("inputs", c_int64), ("outputs", c_int64)),
        *((name, c_void_p) for name in ("weights", "scale", "offset", "thresholds")),
        *(("parts", c_int64), ("per_input", c_int64)),
    )


# Results and arguments of the exported functions, as csrc/hf_bnn.h declares them. Each op adds its own (`declare`).
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "hf_bnn_interface": (c_int64, ()),
    "hf_bnn_name": (c_char_p, (c_int64,)),
    "hf_bnn_available": (c_int, (c_int64,)),
    "hf_bnn_count_bits": (c_int64, (c_int64,)),
}
CALL = (c_int64, c_void_p, c_int64)  # instruction set, thread pool or None, threads
THRESHOLD = (c_void_p, c_int)  # values, whether there is one per input
ROWS_OF_A_PLAN = (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)  # plan, x, row step, rows, threads, out


def declare(name: str, *arguments: Any, result: Any = c_int) -> None:
    """State the signature of an exported function. Call it on import: `library()` reads the table once."""
    SIGNATURES[name] = result, arguments


class Library(NamedTuple):
    """The compiled functions, or None with the reason (`problem`) and the way out (`remedy`)."""

    functions: ctypes.CDLL | None
    problem: str = ""
    remedy: str = ""


def load(path: Path | str | None) -> Library:
    """The library in the file `path`. `None` stands for a file that this interpreter does not find."""
    if path is None:
        return Library(None, *absence())
    try:
        functions = ctypes.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return Library(None, f"{path} cannot be loaded ({error})", f"{BUILD_HERE}: {FROM_SOURCES}")
    if functions.hf_bnn_interface() != INTERFACE:
        return Library(None, f"{path} was built from another version of the sources", f"{BUILD_HERE}: {FROM_SOURCES}")
    return Library(functions)


@cache
def library() -> Library:
    """The library that was built with this package."""
    spec = importlib.util.find_spec(f"{__package__}._library")
    return load(spec.origin if spec else None)


@cache
def _instruction_sets() -> dict[str, int]:
    """Numbers of the instruction sets that this processor has, by name, best first."""
    functions, found, number = library().functions, {}, 0
    while functions and (name := functions.hf_bnn_name(number)):
        if functions.hf_bnn_available(number):
            found[name.decode()] = number
        number += 1
    return found


def available() -> tuple[str, ...]:
    """The backends that run here, best first; the last one is "torch"."""
    return (*_instruction_sets(), "torch")


def checked(name: str, source: str) -> str:
    """`name`, if that backend runs here; else a ValueError that names its `source`."""
    if name not in KNOWN:
        raise ValueError(f"{source}={name!r}: expected one of {', '.join(KNOWN)}, or nothing for the best one")
    if name not in available():
        reason = library().problem or "this processor lacks its instructions"
        raise ValueError(f"{source}={name!r} does not run here: {reason}; what runs is {', '.join(available())}")
    return name


@cache
def _default() -> str:
    asked = os.environ.get(VARIABLE)
    if asked:
        return checked(asked, VARIABLE)
    if library().functions is None:
        warnings.warn(
            f"binary layers run in torch, several times slower than compiled: hf_bnn has no compiled kernels, since "
            f"{library().problem}. {library().remedy}; or set {VARIABLE}=torch to silence this",
            RuntimeWarning,
            stacklevel=2,
        )
    return available()[0]


_in_use: list[str] = []  # the arguments of nested `using` blocks, innermost last


def backend() -> str:
    """Name of what runs binary products: the best instruction set here, the choice of HF_BNN_KERNEL, or "torch".

    Warns once, with a RuntimeWarning, if there are no compiled kernels.
    """
    return _in_use[-1] if _in_use else _default()


@contextmanager
def using(name: str) -> Iterator[None]:
    """A context in which another backend runs, in all threads, for comparisons."""
    _in_use.append(checked(name, "backend"))
    try:
        yield
    finally:
        _in_use.pop()


def instruction_set() -> int | None:
    """Number of the backend in the library, None for torch."""
    return _instruction_sets().get(backend())


def best_instruction_set() -> int:
    """The number of the backend, or of the best one if the backend is torch.

    A backward pass may run under another backend than its forward pass.
    """
    found = instruction_set()
    return next(iter(_instruction_sets().values())) if found is None else found


@cache
def thread_pool() -> int | None:
    """Address of `torch_parallel_for`, part of torch's C interface since 2.10; None if this torch lacks it."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            function = getattr(ctypes.CDLL(str(path)), "torch_parallel_for", None)
            return ctypes.cast(function, c_void_p).value if function else None
    return None


def threads_for(work: int, chosen: int | None = None) -> tuple[int | None, int]:
    """The thread pool, and the number of its threads that `work` multiply-accumulates are worth; (None, 1) for one.

    `chosen`: the number of the instruction set that runs them, by default that of the backend.
    """
    threads = torch.get_num_threads()
    if threads == 1 or work < least_work_for_threads(chosen):
        return None, 1
    pool = thread_pool()
    return (pool, threads) if pool else (None, 1)


def least_work_for_threads(chosen: int | None = None) -> int:
    """Multiply-accumulates from which on several threads are faster than one."""
    return WORTH_THREADS * (SPEED.get(backend(), SLOWEST) if chosen is None else _speed(chosen))


@cache
def _speed(chosen: int) -> int:
    return SPEED.get(library().functions.hf_bnn_name(chosen).decode(), SLOWEST)


def rows_worth_threads(work: int) -> float:
    """Number of rows from which on threads are worth waking, at `work` multiply-accumulates per row."""
    return least_work_for_threads() / max(work, 1) if thread_pool() else math.inf


def call(name: str, *arguments: object) -> int:
    """Run a function of the library and return its status: OK, or UNSURE or NOT_TAKEN. Tensors go in as addresses."""
    status = getattr(library().functions, name)(*arguments)
    if status == OUT_OF_MEMORY:
        raise too_large(name)
    return status


def too_large(name: str) -> MemoryError:
    return MemoryError(f"{name} could not allocate its buffers: use a smaller batch")
