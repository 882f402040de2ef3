"""The comparison `fsg` of bench_methods.py: FSG against STE from the same float network, and the cost of a step."""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from method_training import Training, accuracy, interval, train
from small_nets import Data, float_ends, resnet
from torch import Tensor, nn

from hf_bnn import binarize_
from hf_bnn.methods import STE, Fsg, Method, Step
from hf_bnn.training import begin_step, end_backward, hook_optimizer


def float_start(data: Data, seed: int, training: Training) -> nn.Module:
    """A trained ResNet with float weights, from which both FSG and STE start."""
    torch.manual_seed(seed)
    model = resnet(1, 8, 1, relu=True)
    train(model, STE(), data, training, seed)
    return model


def fsg_against_ste(arguments: argparse.Namespace, data: Data, rows: list[dict], save: Callable[[], None]) -> None:
    """Add for every missing seed the accuracies of the float network, and of STE and FSG that start from it."""
    warm_up = Training(arguments.steps, arguments.batch, 1e-3, "adam")
    fine_tuning = warm_up._replace(lr=arguments.lr)
    done = {row["seed"] for row in rows}
    for seed in arguments.seeds:
        if seed in done:
            continue
        start = float_start(data, seed, warm_up)
        row = {"seed": seed, "float": accuracy(start, data)}
        for method in (STE(), Fsg()):
            model = binarize_(copy.deepcopy(start), method, float_ends(start), "weights")
            row.setdefault("unrefined", accuracy(model, data))
            train(model, method, data, fine_tuning, seed)
            row[method.name] = accuracy(model, data)
        rows.append(row)
        print({key: round(value, 2) for key, value in row.items()}, flush=True)
        save()


def fsg_summary(rows: list[dict], margin: float) -> str:
    """The paired difference with its confidence interval, and whether it clears the margin of non-inferiority."""
    mean, low, high = interval([row["fsg"] - row["ste"] for row in rows])
    verdict = "non-inferior" if low > -margin else "not shown to be non-inferior"
    return (
        f"FSG minus STE over {len(rows)} paired seeds: {mean:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}: "
        f"{verdict} at a margin of {margin} points"
    )


def fsg_cost(rounds: int) -> dict:
    """A training step of CIFAR's ResNet-20 (weights only, Adam, batch 128) with FSG over one with STE, interleaved."""
    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    runs = {method.name: _step_of_resnet20(method, x, y) for method in (STE(), Fsg())}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):  # FSG's first step does not learn yet
        for name, run in runs.items():
            start = time.perf_counter()
            run(index)
            if index >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    ratios = [a / b for a, b in zip(times["fsg"], times["ste"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    medians = {f"ms_{name}": statistics.median(row) for name, row in times.items()}
    return {**medians, "ratio": quartiles[1], "ratio_q1": quartiles[0], "ratio_q3": quartiles[2], "rounds": rounds}


def _step_of_resnet20(method: Method, x: Tensor, y: Tensor) -> Callable[[int], None]:
    torch.manual_seed(0)
    model = resnet(3, 16, relu=True)
    model = binarize_(model, method, float_ends(model), "weights")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    hook_optimizer(model, optimizer, method)
    model.train()

    def run(index: int) -> None:
        step = Step(index, 10_000, 1e-3)
        begin_step(model, step)
        F.cross_entropy(model(x), y).backward()
        end_backward(model, step)
        optimizer.step()
        optimizer.zero_grad()

    return run
