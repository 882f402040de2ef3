"""Measurements: a description of the machine, and timings in interleaved rounds."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch


def processor() -> str:
    """Name of the processor, as the system reports it."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(**settings: object) -> dict:
    """Machine, versions and the given `settings`, for the JSON file of a benchmark."""
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
    """Median milliseconds per call, by name. The calls take turns in each round; the first rounds warm up.

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
