"""Runs a function in a forked process with limits of memory and time, and reports how it ended."""

import contextlib
import os
import pickle
import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SECONDS, GIGABYTES = 20, 2  # the limits of one call


class Outcome(NamedTuple):
    """How a case ended."""

    kind: str  # refused | refused upstream | bypassed | same, or one of the faults
    detail: str = ""


def run_limited(load: Callable[[], Outcome]) -> Outcome:
    """`load()` in a forked process with its own limits of memory and time."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no other thread holds a lock here
        child = os.fork()
    if child == 0:
        _limit_and_answer(load, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        hung = os.WTERMSIG(status) == signal.SIGALRM
        return Outcome("hung" if hung else "crashed", signal.Signals(os.WTERMSIG(status)).name)
    if not answer:
        return Outcome("crashed", f"exit status {os.WEXITSTATUS(status)}")
    outcome, grown = pickle.loads(answer)
    return Outcome("too much memory", f"{grown / 2**30:.1f} GiB") if grown > GIGABYTES * 2**29 else outcome


def _memory() -> tuple[int, int]:
    """This process's address space and the part of it in memory, in bytes."""
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[0]) * resource.getpagesize(), int(pages[1]) * resource.getpagesize()


def _limit_and_answer(load: Callable[[], Outcome], writer: int) -> None:
    try:
        used, resident = _memory()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(GIGABYTES * 2**30),) * 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            outcome = load()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
        os.write(writer, pickle.dumps((outcome, grown)))
    finally:
        os._exit(0)
