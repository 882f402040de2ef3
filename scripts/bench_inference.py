"""Times layers of packed models against torch's float32, bfloat16 and dynamic int8 layers of the same shape.

    python scripts/bench_inference.py --threads 1 --output bench_inference.json

Ratios are to torch in the same process. Rounds are interleaved: each round times every contestant of a row once, so
that a noisy neighbour slows all alike; a ratio is the median over rounds of the ratio within a round. The roofline is
how many bits a second this processor compares in registers (xor, popcount, add), measured in the same rounds: prefix
parity needs fewer instructions than that, so that more than 100 percent is possible.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from machine import environment
from torch import Tensor, nn

from hf_bnn import kernels
from hf_bnn.functional import pack_bits
from hf_bnn.kernels import library
from hf_bnn.packed import PackedConv2d

OURS, FP32, BF16, INT8, ROOFLINE = "kernel", "fp32", "bf16", "int8", "roofline"
LEAST_MS = 1.0  # a timing repeats its call for about that long
ROOFLINE_ROUNDS = 20_000


class Case(NamedTuple):
    """A row: its multiply-accumulates of bits (0 for other kinds of products) and what is timed."""

    name: str
    macs: int
    runs: dict[str, Callable[[], object]]


def linear_weight(out: int, size: int) -> kernels.LinearWeight:
    return kernels.LinearWeight.from_bits(pack_bits(torch.randn(out, size)), size)


def int8_layer(layer: nn.Module) -> nn.Module:
    """torch's dynamic quantization: int8 weights, inputs quantized in every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated in favour of torchao, which runs the same kernels
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, torch.qint8)


def float_runs(layer: nn.Module, x: Tensor, int8: bool = True) -> dict[str, Callable[[], object]]:
    """The float layer in torch's three precisions."""
    half, x_half = type(layer)(*geometry_of(layer)).to(torch.bfloat16), x.to(torch.bfloat16)
    runs = {FP32: lambda: layer(x), BF16: lambda: half(x_half)}
    if int8:
        quantized = int8_layer(layer)
        runs[INT8] = lambda: quantized(x)
    return runs


def geometry_of(layer: nn.Module) -> tuple:
    if isinstance(layer, FeedForward):
        return layer.sizes
    return layer.in_features, layer.out_features


class FeedForward(nn.Module):
    """Two linear layers and a GELU."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.sizes = size, hidden
        self.first, self.second = nn.Linear(size, hidden), nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


def linear_case(rows: int, size: int, out: int) -> Case:
    x, weight, scale, offset = torch.randn(rows, size), linear_weight(out, size), torch.rand(out), torch.randn(out)
    runs = float_runs(nn.Linear(size, out), x)
    return Case(
        f"linear_m{rows}_k{size}_n{out}",
        rows * size * out,
        {OURS: lambda: kernels.linear(x, weight, scale, offset), **runs},
    )


def weight_only_case(rows: int, size: int, out: int) -> Case:
    x, weight, scale, offset = torch.randn(rows, size), linear_weight(out, size), torch.rand(out), torch.randn(out)
    runs = float_runs(nn.Linear(size, out), x)
    ours = {OURS: lambda: kernels.linear_weight_only(x, weight, scale, offset)}
    return Case(f"w1a32_m{rows}_k{size}_n{out}", 0, {**ours, **runs})


def ffn_case(rows: int, size: int = 768, hidden: int = 3072) -> Case:
    x, first, second = torch.randn(rows, size), linear_weight(hidden, size), linear_weight(size, hidden)
    layers = (first, torch.rand(hidden), torch.randn(hidden), (-float("inf"), 0.5), second, torch.rand(size))
    ours = {OURS: lambda: kernels.ffn(x, *layers, torch.zeros(size))}
    runs = float_runs(FeedForward(size, hidden), x)
    return Case(f"ffn_m{rows}", 2 * rows * size * hidden, {**ours, **runs})


class Convolution(NamedTuple):
    """One of a network's shapes."""

    channels: int
    out: int
    kernel: int
    stride: int
    size: int  # of the input, which is square


def resnet18_body() -> list[Convolution]:
    """Every convolution of ResNet-18 at 224 x 224 but the first."""
    body, channels, size = [], 64, 56
    for out in (64, 128, 256, 512):
        stride = 1 if out == 64 else 2
        body += [Convolution(channels, out, 3, stride, size), Convolution(out, out, 3, 1, size // stride)]
        if stride == 2:
            body.append(Convolution(channels, out, 1, 2, size))
        body += [Convolution(out, out, 3, 1, size // stride)] * 2
        channels, size = out, size // stride
    return body


def conv_case(name: str, batch: int, shapes: list[Convolution]) -> Case:
    """Several convolutions, each on an input of its own, channels last in memory."""
    ours, fp32, bf16, macs = [], [], [], 0
    for shape in shapes:
        x = torch.randn(batch, shape.channels, shape.size, shape.size).contiguous(memory_format=torch.channels_last)
        w = torch.randn(shape.out, shape.channels, shape.kernel, shape.kernel)
        weight = kernels.Conv2dWeight.from_bits(PackedConv2d.pack(w), shape.channels)
        scale, bias, padding = torch.rand(shape.out), torch.randn(shape.out), shape.kernel // 2
        geometry = ((shape.stride,) * 2, (padding,) * 2)
        last = w.contiguous(memory_format=torch.channels_last)
        ours.append((x, weight, scale, bias, None, *geometry))
        fp32.append((x, last, bias, *geometry))
        bf16.append((x.bfloat16(), last.bfloat16(), bias.bfloat16(), *geometry))
        macs += batch * shape.out * (shape.size // shape.stride) ** 2 * shape.channels * shape.kernel**2

    def every(function: Callable, calls: list[tuple]) -> Callable[[], None]:
        def run() -> None:
            for arguments in calls:
                function(*arguments)

        return run

    return Case(
        name, macs, {OURS: every(kernels.conv2d, ours), FP32: every(F.conv2d, fp32), BF16: every(F.conv2d, bf16)}
    )


def cases() -> Iterator[Case]:
    """The table's rows, made when they are timed."""
    for rows in (1, 8, 128, 1024):
        for size, out in ((768, 768), (768, 3072), (3072, 768)):
            yield linear_case(rows, size, out)
    for rows in (8, 128, 1024):
        yield ffn_case(rows)
    for rows, size, out in (
        (1, 768, 768),
        (1, 768, 3072),
        (1, 3072, 768),
        (1, 4096, 4096),
        (8, 768, 768),
        (128, 768, 768),
    ):
        yield weight_only_case(rows, size, out)
    for shape in dict.fromkeys(resnet18_body()):
        name = f"conv_c{shape.channels}_n{shape.out}_k{shape.kernel}_s{shape.stride}_hw{shape.size}_b1"
        yield conv_case(name, 1, [shape])
    for batch in (1, 8):
        yield conv_case(f"resnet18_body_b{batch}", batch, resnet18_body())


def count_bits() -> int:
    """Bits compared in registers; 0 if the processor has no instruction to measure."""
    functions = library.library().functions
    return functions.hf_bnn_count_bits(ROOFLINE_ROUNDS) if functions else 0


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) * 1e3 / repeats


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a call of each run in each round, each time after one call that is not counted."""
    repeats = {}
    for name, run in runs.items():
        run()
        repeats[name] = max(1, round(LEAST_MS / milliseconds(run, 1)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()  # its weights are back in the caches that the others have filled
            times[name].append(milliseconds(run, repeats[name]))
    return times


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def measure(case: Case, rounds: int) -> dict:
    """A row of the JSON. A figure that there is nothing to compare with is None."""
    bits = count_bits()
    measured = {**case.runs, ROOFLINE: count_bits} if case.macs and bits else case.runs
    times = interleaved(measured, rounds)
    first, median, third = statistics.quantiles(times[OURS], n=4)
    row = {"name": case.name, "ms_median": median, "ms_q1": first, "ms_q3": third}
    for name in (FP32, BF16, INT8):
        row[f"speedup_{name}"] = median_ratio(times[name], times[OURS]) if name in times else None
    row["speedup_fp32_q1"], _, row["speedup_fp32_q3"] = statistics.quantiles(
        (a / b for a, b in zip(times[FP32], times[OURS], strict=True)), n=4
    )
    row["roofline_percent"] = None
    if ROOFLINE in times:
        row["roofline_percent"] = 100 * median_ratio(times[ROOFLINE], times[OURS]) * case.macs / bits
    row["gmacs"] = case.macs / median / 1e6 if case.macs else None
    return row


def line(row: dict) -> str:
    """A row of the printed table."""
    speedups = [row[f"speedup_{name}"] for name in (FP32, BF16, INT8)]
    cells = " ".join(f"{'-' if value is None else f'{value:.1f}x':>7}" for value in speedups)
    percent = "-" if row["roofline_percent"] is None else f"{row['roofline_percent']:.0f}%"
    spread = f"{row['speedup_fp32_q1']:.1f}..{row['speedup_fp32_q3']:.1f}"
    return f"{row['name']:<36} {row['ms_median']:>9.4f} {cells} {spread:>13} {percent:>9}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="torch's number of threads; torch's own choice unless given")
    parser.add_argument("--rounds", type=int, default=15, help="at least 2")
    parser.add_argument("--only", default="", help="rows whose names contain this")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: expected at least 2, a spread needs them")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    print(f"{'layer':<36} {'ms':>9} {'fp32':>7} {'bf16':>7} {'int8':>7} {'fp32 q1..q3':>13} {'roofline':>9}")
    with torch.inference_mode():
        for case in cases():
            if args.only in case.name:
                rows.append(measure(case, args.rounds))
                print(line(rows[-1]), flush=True)
    if not rows:
        parser.error(f"--only {args.only}: no row has that in its name")
    if args.output:
        found = {"environment": environment(rounds=args.rounds, backend=kernels.backend()), "rows": rows}
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
