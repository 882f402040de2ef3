"""The comparison `stompp-order` of bench_methods.py: StoMPP's orders against STE, by depth of the network."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from method_training import Training, accuracy, interval, train
from small_nets import Data, float_ends, plain_mlp, resnet
from torch import nn

from hf_bnn import binarize_
from hf_bnn.install import number_by_execution_
from hf_bnn.machine import environment
from hf_bnn.methods import STE, Method, Stompp


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
    """A network: how it is made, what becomes binary, and the arms that are compared on it."""

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


def run_arm(net: Net, arm: Arm, data: Data, training: Training, seed: int) -> float:
    """The accuracy after training from scratch, in percent. The initial weights depend on `seed` only."""
    torch.manual_seed(seed)
    model = net.make(data.train_x[0].numel())
    binarize_(model, arm.method, float_ends(model), net.binarize, weight_scaling=arm.scaling)
    number_by_execution_(model, lambda: model(data.train_x[:8]))
    train(model, arm.method, data, training, seed)
    return accuracy(model, data)


def stompp_order(arguments: argparse.Namespace, data: Data, rows: list[dict], save: Callable[[], None]) -> None:
    """Add every missing row (net, arm, seed, accuracy)."""
    training = Training(arguments.steps, arguments.batch, arguments.lr)
    done = {(row["net"], row["arm"], row["seed"]) for row in rows}
    cpu = environment()["cpu"]  # one file may hold rows from several machines
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
    """The accuracies of an arm on a network, by seed."""
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
