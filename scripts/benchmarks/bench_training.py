"""Times a training step of one layer: nn.Linear, then BinaryLinear with every method, as ratios to named baselines.

    python scripts/benchmarks/bench_training.py --threads 1 --tokens 256 512 1024 --output bench_training.json

A step is what a trainer does: the method's two moments, forward, backward and the optimizer's step (SGD), for a
method's hook is part of its cost. Rounds are interleaved: each round times every row once, so that a noisy neighbour
slows all rows alike. Inputs ask for a gradient, as in every layer of a network but the first.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_bnn import binarize_
from hf_bnn.machine import environment
from hf_bnn.methods import METHODS, STE, Method, Site, Step, Stompp, Surge
from hf_bnn.methods.surge import AUX
from hf_bnn.nn.levels import ElasticLevels, SignedLevels
from hf_bnn.training import begin_step, end_backward, hook_optimizer

LINEAR, INLINED, BASE = "nn.Linear", "inlined", STE.name
TOTAL = 1_000_000  # steps of the run that the timed steps are taken from


class Contestant(NamedTuple):
    """A binary layer's method, the levels of its inputs, and the step of the run at which the timing starts."""

    method: Method
    levels: type[SignedLevels] = SignedLevels
    start: int = 0


def contestants() -> dict[str, Contestant | None]:
    """The rows of the table by name; None for the two layers without a method."""
    others = {name: Contestant(cls()) for name, cls in METHODS.items() if cls not in (Surge, Stompp)}
    return {
        LINEAR: None,
        INLINED: None,
        **others,
        **{f"{Surge.name}-{aux}": Contestant(Surge(aux=aux)) for aux in AUX},
        f"{Stompp.name}-clipped": Contestant(Stompp()),
        f"{Stompp.name}-mixed": Contestant(Stompp(), start=int(0.7 * TOTAL)),
        f"{Stompp.name}-signs": Contestant(Stompp(), start=int(0.95 * TOTAL)),
        "elastic": Contestant(STE(), ElasticLevels),
    }


class _Inlined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        signs, weight_signs = (t.clone().lt_(0).mul_(-2).add_(1) for t in (x, weight))
        scale = weight.abs().mean(1)
        ctx.save_for_backward(x, signs, weight_signs, scale)
        return (signs @ weight_signs.t()).mul_(scale).add_(bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, signs, weight_signs, scale = ctx.saved_tensors
        scaled = grad * scale
        return x.abs().le_(1).mul_(scaled @ weight_signs), scaled.t() @ signs, grad.sum(0)


class InlinedSTE(nn.Linear):
    """The straight-through estimator's layer as one hand-written function: the baseline for the mechanism's cost."""

    def forward(self, x: Tensor) -> Tensor:
        return _Inlined.apply(x, self.weight, self.bias)


def make_run(name: str, contestant: Contestant | None, tokens: int, inputs: int, outputs: int) -> Callable[[], None]:
    """A function that makes one training step."""
    model = nn.Sequential(InlinedSTE(inputs, outputs) if name == INLINED else nn.Linear(inputs, outputs))
    method, start = STE(), 0
    if contestant is not None:
        method, start = contestant.method, contestant.start
        binarize_(model, method, levels=lambda _: contestant.levels())
        model[0].set_site(Site(1, 2, (outputs, inputs)))  # the second of two layers: StoMPP leaves it clipped at first
    model.train()
    x = torch.randn(tokens, inputs, requires_grad=True)
    grad = torch.randn(tokens, outputs)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    if contestant is not None:
        hook_optimizer(model, optimizer, method)
    steps = iter(range(start, TOTAL))

    def run() -> None:
        step = Step(next(steps), TOTAL, 1e-6)
        begin_step(model, step)
        model(x).backward(grad)
        end_backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return run


def interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds by run and round, after two uncounted rounds."""
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
    runs = {name: make_run(name, contestant, tokens, inputs, outputs) for name, contestant in contestants().items()}
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
                "over_inlined": median_ratio(row, times[INLINED]),
            }
        )
    return rows


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
        settings = {name: getattr(arguments, name) for name in ("rounds", "inputs", "outputs")}
        text = json.dumps({"environment": environment(**settings), "rows": rows}, indent=2)
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
