"""What the figures of a benchmark depend on."""

import os
import platform
from pathlib import Path

import torch


def environment(**settings: object) -> dict:
    """The machine and the versions, for a benchmark's JSON, and the benchmark's own `settings`."""
    model_names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": model_names[0] if model_names else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        **settings,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
