"""Times packed layers and whole models against torch's float32, bfloat16 and dynamic int8 ones of the same shape.

    python scripts/benchmarks/bench_inference.py --threads 1 --output bench_inference.json

Ratios are to torch in the same process. Rounds are interleaved: each round times every contestant of a row once, so
that a noisy neighbour slows all alike; a ratio is the median over rounds of the ratio within a round. A row gets rounds
for `--seconds`, at least 5 and at most `--rounds`. Convolutions are compared with the faster of torch's two layouts.

The roofline is how many bits a second one thread of this processor compares in registers (xor, popcount, add),
measured in the same rounds: prefix parity needs fewer instructions than that, so that more than 100 percent is
possible. Of a whole model it says which part of its time the binary products would take at that speed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from inference_cases import FP32, LAST, PRECISIONS, Call, Case, Contest
from inference_layers import layer_cases
from inference_models import encoder_memory, model_cases

from hf_bnn import kernels
from hf_bnn.kernels import library
from hf_bnn.machine import environment

ROOFLINE = "roofline"
ROOFLINE_ROUNDS = 20_000
LEAST_MS = 20.0  # a timing repeats its call for about that long
WARM_UP_MS = 5.0  # and so do the calls before it, which are not counted: the others have filled the caches
LONG_MS = 200.0  # longer calls do not find what the call before has left in the caches
FEWEST_ROUNDS = 5
MEMORY = "memory"  # what --only calls the bytes of BERT-base's encoder


def count_bits() -> int:
    """Bits compared in registers; 0 if the processor has no instruction to measure."""
    functions = library.library().functions
    return functions.hf_bnn_count_bits(ROOFLINE_ROUNDS) if functions else 0


def milliseconds(run: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) * 1e3 / repeats


def repeats(wanted: float, once: float) -> int:
    """The number of calls, of `once` milliseconds each, that fill the wanted time; at least one."""
    return max(1, round(wanted / once))


def interleaved(runs: dict[str, Call], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds per call, by run and round. Short calls are preceded by uncounted ones."""
    once = {}
    for name, run in runs.items():
        run()
        once[name] = milliseconds(run, 1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name, run in runs.items():
            if once[name] < LONG_MS:
                milliseconds(run, repeats(WARM_UP_MS, once[name]))
            times[name].append(milliseconds(run, repeats(LEAST_MS, once[name])))
    return times


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def fastest(times: dict[str, list[float]], precision: str) -> str | None:
    """The baseline of a precision: the layout whose median is lower. None if torch has none."""
    layouts = [name for name in times if name.removesuffix(LAST) == precision]
    return min(layouts, key=lambda name: statistics.median(times[name]), default=None)


def measure(contest: Contest, rounds: int, seconds: float) -> list[dict]:
    """The rows of a contest, one for each of ours. A figure without anything to compare with is None."""
    bits = count_bits()
    runs = {name: ours.call for name, ours in contest.ours.items()} | contest.baselines
    if bits and any(ours.macs for ours in contest.ours.values()):
        runs[ROOFLINE] = count_bits
    with torch.inference_mode():
        times = interleaved(runs, rounds, seconds)
    return [row_of(name, ours.macs, times, bits) for name, ours in contest.ours.items()]


def row_of(name: str, macs: int, times: dict[str, list[float]], bits: int) -> dict:
    """A row of the JSON from the times of all contestants. `bits`: the bits that the roofline's run compared."""
    taken = times[name]
    first, median, third = quartiles(taken)
    row = {"name": name, "rounds": len(taken), "ms_median": median, "ms_q1": first, "ms_q3": third}
    baselines = {precision: fastest(times, precision) for precision in PRECISIONS}
    for precision, baseline in baselines.items():
        known = baseline is not None
        row[f"ms_{precision}"] = statistics.median(times[baseline]) if known else None
        row[f"speedup_{precision}"] = statistics.median(ratios(times[baseline], taken)) if known else None
    over_fp32 = ratios(times[baselines[FP32]], taken)
    row["speedup_fp32_q1"], _, row["speedup_fp32_q3"] = quartiles(over_fp32)
    row["fp32_channels_last"] = baselines[FP32].endswith(LAST)
    row["roofline_percent"] = None
    if ROOFLINE in times and macs:
        row["roofline_percent"] = 100 * statistics.median(ratios(times[ROOFLINE], taken)) * macs / bits
    row["gmacs"] = macs / median / 1e6 if macs else None
    return row


HEADER = f"{'row':<36} {'ms':>9} {'fp32':>7} {'bf16':>7} {'int8':>7} {'fp32 q1..q3':>13} {'roofline':>9} {'rounds':>7}"


def line(row: dict) -> str:
    """A row of the printed table."""
    speedups = [row[f"speedup_{name}"] for name in PRECISIONS]
    cells = " ".join(f"{'-' if value is None else f'{value:.1f}x':>7}" for value in speedups)
    percent = "-" if row["roofline_percent"] is None else f"{row['roofline_percent']:.0f}%"
    spread = f"{row['speedup_fp32_q1']:.1f}..{row['speedup_fp32_q3']:.1f}"
    return f"{row['name']:<36} {row['ms_median']:>9.4f} {cells} {spread:>13} {percent:>9} {row['rounds']:>7}"


def slower_than_fp32(rows: list[dict]) -> list[str]:
    """The names of the rows that lose to torch's float32."""
    return [row["name"] for row in rows if row["speedup_fp32"] < 1]


def chosen(cases: Iterator[Case], only: list[str]) -> list[tuple[Case, tuple[str, ...]]]:
    """(case, its rows whose names contain one of the words), for the cases that have such rows."""
    found = [(case, tuple(name for name in case.rows if matches(name, only))) for case in cases]
    return [(case, names) for case, names in found if names]


def matches(name: str, only: list[str]) -> bool:
    return not only or any(word in name for word in only)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="torch's number of threads; torch's own choice unless given")
    parser.add_argument("--rounds", type=int, default=15, help="at most so many of each row; at least 2")
    parser.add_argument("--seconds", type=float, default=15.0, help="for the rounds of a row, once it has had 5")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose names contain one of these")
    parser.add_argument("--layers", action="store_true", help="no whole models")
    parser.add_argument("--models", action="store_true", help="no layers")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: expected at least 2, a spread needs them")
    if args.threads:
        torch.set_num_threads(args.threads)
    both = args.layers == args.models
    cases = [*(layer_cases() if both or args.layers else ()), *(model_cases() if both or args.models else ())]
    with_memory = (both or args.models) and matches(MEMORY, args.only)
    names = [*(name for case in cases for name in case.rows), *([MEMORY] if with_memory else ())]
    for word in args.only:
        if not any(word in name for name in names):
            parser.error(f"--only {word}: no row has that in its name")
    torch.manual_seed(0)
    found = {"environment": environment(backend=kernels.backend()), "rows": []}
    print(HEADER)
    for case, wanted in chosen(cases, args.only):
        with torch.no_grad():
            contest = case.make(wanted)
        for row in measure(contest, args.rounds, args.seconds):
            found["rows"].append(row)
            print(line(row), flush=True)
    found["slower_than_fp32"] = slower_than_fp32(found["rows"])
    print(f"slower than float32: {', '.join(found['slower_than_fp32']) or 'none'}")
    if with_memory:
        with torch.no_grad():
            found[MEMORY] = encoder_memory()
        print(", ".join(f"{name} {value:,.1f}" for name, value in found[MEMORY].items()))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
