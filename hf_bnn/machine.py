"""What measurements depend on, and how they are made: the machine, and rounds in which the timed calls take turns."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch


def processor() -> str:
    """The processor's name, as the system gives it."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(**settings: object) -> dict:
    """The machine and the versions, for a benchmark's JSON, and the benchmark's own `settings`."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        **settings,
    }


def median_ms(calls: dict[str, Callable[[], object]], rounds: int, warm_up: int = 3) -> dict[str, float]:
    """Median milliseconds of each call, by its name. The calls take turns; the first rounds only warm up.

    >>> sorted(median_ms({"one": lambda: 1, "two": lambda: 2}, rounds=3))
    ['one', 'two']
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
