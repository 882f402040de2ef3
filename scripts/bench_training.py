"""Times one layer forward and backward: nn.Linear, then BinaryLinear with every method, as ratios to named baselines.

    python scripts/bench_training.py --threads 1 --tokens 256 512 1024 --output bench_training.json

Rounds are interleaved: each round times every row once, so that a noisy neighbour slows all rows alike. Inputs ask for
a gradient, as in every layer of a network but the first.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from hf_bnn import binarize_
from hf_bnn.methods import METHODS, Method, Surge
from hf_bnn.methods.surge import AUX

LINEAR, BASE = "nn.Linear", Method.name


def contestants() -> dict[str, Method | None]:
    """The rows of the table: name to method, None for the float layer."""
    variants = {f"{Surge.name}-{aux}": Surge(aux=aux) for aux in AUX}
    others = {name: cls() for name, cls in METHODS.items() if cls is not Surge}
    return {LINEAR: None, **others, **variants}


def make_run(method: Method | None, tokens: int, inputs: int, outputs: int) -> Callable[[], None]:
    """A function that runs a layer forward and backward once; the gradients are dropped, as zero_grad does."""
    model = nn.Sequential(nn.Linear(inputs, outputs))
    if method is not None:
        binarize_(model, method)
    model.train()
    x = torch.randn(tokens, inputs, requires_grad=True)
    grad = torch.randn(tokens, outputs)

    def run() -> None:
        model(x).backward(grad)
        model.zero_grad(set_to_none=True)
        x.grad = None

    return run


def interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run in each round, after two rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if index >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def median_ratio(times: list[float], baseline: list[float]) -> float:
    """The median over rounds of one row's time over the baseline's in the same round."""
    return statistics.median(a / b for a, b in zip(times, baseline, strict=True))


def measure(tokens: int, inputs: int, outputs: int, rounds: int) -> list[dict]:
    """One row per contestant, as in the JSON."""
    runs = {name: make_run(method, tokens, inputs, outputs) for name, method in contestants().items()}
    times = interleaved(runs, rounds)
    rows = []
    for name, row in times.items():
        first, median, third = statistics.quantiles(row, n=4)
        rows.append(
            {
                "name": name,
                "tokens": tokens,
                "ms_median": median,
                "ms_q1": first,
                "ms_q3": third,
                "over_linear": median_ratio(row, times[LINEAR]),
                "over_ste": median_ratio(row, times[BASE]),
            }
        )
    return rows


def environment(arguments: argparse.Namespace) -> dict:
    """What the figures depend on."""
    model_names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": model_names[0] if model_names else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "inputs": arguments.inputs,
        "outputs": arguments.outputs,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="torch's number of threads; torch's own choice unless given")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024], help="rows of the layer's input")
    parser.add_argument("--inputs", type=int, default=768)
    parser.add_argument("--outputs", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=40, help="at least 2")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: expected at least 2, a spread needs them")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{'layer':<16}{'tokens':>7}{'median':>9}{'quartiles':>17}{'/ ' + LINEAR:>13}{'/ ' + BASE:>8}")
    rows = []
    for tokens in arguments.tokens:
        for row in measure(tokens, arguments.inputs, arguments.outputs, arguments.rounds):
            spread = f"{row['ms_q1']:.2f} to {row['ms_q3']:.2f}"
            print(
                f"{row['name']:<16}{tokens:>7}{row['ms_median']:>9.2f}{spread:>17}"
                f"{row['over_linear']:>13.2f}{row['over_ste']:>8.2f}"
            )
            rows.append(row)
    if arguments.output:
        text = json.dumps({"environment": environment(arguments), "rows": rows}, indent=2)
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
