"""Compares training methods on networks that a CPU trains in a minute: same seeds, data order and budget for every arm.

    python scripts/benchmarks/bench_methods.py stompp-order --data fashion_mnist --output stompp_order.json
    python scripts/benchmarks/bench_methods.py fsg --data fashion_mnist --output fsg.json

`stompp-order`: StoMPP's orders against the straight-through estimator, by depth. `fsg`: FSG against STE at the same
step norm, from the same trained float network, and what a step costs. Every arm is evaluated fully binary, after the
last step. Rows that the output file already has are kept, so that a long comparison can be run in pieces.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from small_nets import Data, digits, fashion_mnist, float_ends, plain_mlp, resnet
from torch import Tensor, nn

from hf_bnn import binarize_
from hf_bnn.install import number_by_execution_
from hf_bnn.machine import environment
from hf_bnn.methods import STE, Fsg, Method, Step, Stompp
from hf_bnn.training import begin_step, end_backward, hook_optimizer


class Arm(NamedTuple):
    """A method, and the scale of the weights' signs."""

    method: Method
    scaling: str = "none"  # the papers of StoMPP: bare signs, followed by BatchNorm


ORDERS = {
    "ste": Arm(STE()),
    "ste, scaled": Arm(STE(), "channel"),
    **{order: Arm(Stompp(order=order, ste=False)) for order in ("forward", "reverse", "global")},
    **{f"{order} + ste": Arm(Stompp(order=order)) for order in ("forward", "reverse", "global")},
    "forward + ste, scaled": Arm(Stompp(), "channel"),
}
DIFFERENCES = (
    ("forward", "reverse"),
    ("forward + ste", "reverse + ste"),
    ("forward + ste", "ste"),
    ("forward + ste, scaled", "ste, scaled"),
)
WEIGHTS_ONLY = {name: ORDERS[name] for name in ("ste", "forward", "reverse", "global")}


class Net(NamedTuple):
    """How a network is made, what of it is binary, and the arms that are compared on it."""

    make: Callable[[int], nn.Module]  # from the number of pixels
    binarize: str
    arms: dict[str, Arm]


WIDTH = 128
NETS = {
    **{
        f"plain, {depth} layers": Net(lambda n, d=depth: plain_mlp(d, WIDTH, n), "both", ORDERS)
        for depth in (6, 12, 24)
    },
    "plain, 12 layers, weights only": Net(lambda n: plain_mlp(12, WIDTH, n), "weights", WEIGHTS_ONLY),
    "ResNet, 12 convolutions": Net(lambda n: resnet(2, 8, 1), "both", ORDERS),
}


class Training(NamedTuple):
    """What every arm shares."""

    steps: int
    batch: int
    lr: float
    optimizer: str = "sgd"  # sgd: momentum 0.9, at a constant rate: the recipe of StoMPP's papers; adam: linear decay


def train(model: nn.Module, method: Method, data: Data, training: Training, seed: int) -> None:
    """The order of the data depends on `seed` only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, training.lr, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(parameters, training.lr)
    hook_optimizer(model, optimizer, method)
    model.train()
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for index in range(training.steps):
        if len(order) < training.batch:
            order = torch.randperm(len(data.train_y), generator=generator)
        rows, order = order[: training.batch], order[training.batch :]
        lr = training.lr * (1 - index / training.steps) if training.optimizer == "adam" else training.lr
        for group in optimizer.param_groups:
            group["lr"] = lr
        step = Step(index, training.steps, lr)
        begin_step(model, step)
        F.cross_entropy(model(data.train_x[rows]), data.train_y[rows]).backward()
        end_backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Of the fully binary network, in percent."""
    model.eval()
    found = [model(x).argmax(1) for x in data.test_x.split(500)]
    return 100 * (torch.cat(found) == data.test_y).float().mean().item()


def run_arm(net: Net, arm: Arm, data: Data, training: Training, seed: int) -> float:
    """One training from scratch; the initial weights depend on `seed` only."""
    torch.manual_seed(seed)
    model = net.make(data.train_x[0].numel())
    binarize_(model, arm.method, float_ends(model), net.binarize, weight_scaling=arm.scaling)
    number_by_execution_(model, lambda: model(data.train_x[:8]))
    train(model, arm.method, data, training, seed)
    return accuracy(model, data)


def interval(differences: list[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired differences, and the bounds of its confidence interval (Student's t)."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    half = student.ppf(0.5 + level / 2, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return mean, mean - half, mean + half


# stompp-order


def stompp_order(arguments: argparse.Namespace, data: Data, rows: list[dict], save: Callable[[], None]) -> None:
    """Add a row (net, arm, seed, accuracy) for each that is missing."""
    training = Training(arguments.steps, arguments.batch, arguments.lr)
    done = {(row["net"], row["arm"], row["seed"]) for row in rows}
    cpu = environment()["cpu"]  # rows of several machines may come together in one file
    for name in arguments.nets:
        for seed in arguments.seeds:
            for arm_name, arm in NETS[name].arms.items():
                if arm_name in arguments.arms and (name, arm_name, seed) not in done:
                    start = time.perf_counter()
                    reached = run_arm(NETS[name], arm, data, training, seed)
                    seconds = time.perf_counter() - start
                    print(f"{name:<32}{arm_name:<24}seed {seed}{reached:>8.2f} %{seconds:>8.1f} s", flush=True)
                    rows.append({"net": name, "arm": arm_name, "seed": seed, "accuracy": reached, "cpu": cpu})
                    save()


def accuracies(rows: list[dict], net: str, arm: str) -> dict[int, float]:
    """By seed."""
    return {row["seed"]: row["accuracy"] for row in rows if (row["net"], row["arm"]) == (net, arm)}


def paired(rows: list[dict], net: str, one: str, other: str) -> list[float]:
    """Accuracy of `one` minus that of `other` with the same seed."""
    left, right = accuracies(rows, net, one), accuracies(rows, net, other)
    return [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]


def order_table(rows: list[dict]) -> str:
    """Markdown: a row per arm, a column per network, mean and standard deviation over the seeds; then differences."""
    nets = [name for name in NETS if any(row["net"] == name for row in rows)]
    lines = ["| | " + " | ".join(nets) + " |", "|---" * (len(nets) + 1) + "|"]
    seeds = len({row["seed"] for row in rows})
    for arm in ORDERS:
        cells = [list(accuracies(rows, net, arm).values()) for net in nets]
        if any(cells):
            lines.append(f"| {arm} | " + " | ".join(_spread(cell, seeds) for cell in cells) + " |")
    for one, other in DIFFERENCES:
        cells = [paired(rows, net, one, other) for net in nets]
        if any(cells):
            texts = [_interval_text(cell) if cell else "" for cell in cells]
            lines.append(f"| *{one}* minus *{other}* | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _spread(values: list[float], seeds: int) -> str:
    if not values:
        return ""
    fewer = f" ({len(values)} of {seeds} seeds)" if len(values) < seeds else ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}{fewer}"


def _interval_text(differences: list[float]) -> str:
    mean, low, high = interval(differences)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


# fsg


def float_start(data: Data, seed: int, training: Training) -> nn.Module:
    """A ResNet with float weights, trained as usual: what FSG and STE both start from."""
    torch.manual_seed(seed)
    model = resnet(1, 8, 1, relu=True)
    train(model, STE(), data, training, seed)
    return model


def fsg_against_ste(arguments: argparse.Namespace, data: Data, rows: list[dict], save: Callable[[], None]) -> None:
    """Add, for each missing seed, the accuracies of the float network and of STE and FSG that started from it."""
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


# The command line


def parser() -> argparse.ArgumentParser:
    """Of both comparisons."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--data", choices=["digits", "fashion_mnist"], default="digits")
    shared.add_argument("--data_dir", type=Path, help="folder of Fashion-MNIST's idx files; the Hub unless given")
    shared.add_argument("--batch", type=int, default=128)
    shared.add_argument("--threads", type=int, help="torch's number of threads; torch's own choice unless given")
    shared.add_argument("--output", type=Path, help="JSON to write, and to go on from")
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = result.add_subparsers(dest="command", required=True)
    order = commands.add_parser("stompp-order", parents=[shared])
    order.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    order.add_argument("--arms", nargs="+", choices=list(ORDERS), default=list(ORDERS))
    order.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    order.add_argument("--steps", type=int, default=1500)
    order.add_argument("--lr", type=float, default=0.1)
    fsg = commands.add_parser("fsg", parents=[shared])
    fsg.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    fsg.add_argument("--steps", type=int, default=500, help="of the float network, and again of each arm")
    fsg.add_argument("--lr", type=float, default=1e-3)
    fsg.add_argument("--margin", type=float, default=1.0, help="of non-inferiority, in points of accuracy")
    fsg.add_argument("--rounds", type=int, default=20, help="of the timing; 0: none")
    return result


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = {key: getattr(arguments, key) for key in ("command", "data", "steps", "batch", "lr")}
    result = {"environment": environment(**settings), "rows": []}
    if arguments.output and arguments.output.exists():
        earlier = json.loads(arguments.output.read_text(encoding="utf-8"))
        other = {key: earlier["environment"].get(key) for key in settings}
        if other != settings:
            raise SystemExit(f"{arguments.output} was made with {other}, not with {settings}: name another --output")
        result = earlier
    data = digits() if arguments.data == "digits" else fashion_mnist(arguments.data_dir)

    def save() -> None:
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    if arguments.command == "stompp-order":
        stompp_order(arguments, data, result["rows"], save)
        print(order_table(result["rows"]))
    else:
        fsg_against_ste(arguments, data, result["rows"], save)
        result["summary"] = fsg_summary(result["rows"], arguments.margin)
        print(result["summary"])
        if arguments.rounds:
            result["cost"] = fsg_cost(arguments.rounds)
            print(result["cost"])
    save()


if __name__ == "__main__":
    main()
