"""Trains one of the small networks with a method, and compares paired accuracies. Shared by the comparisons."""

import math
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from small_nets import Data
from torch import nn

from hf_bnn.methods import Method, Step
from hf_bnn.training import begin_step, end_backward, hook_optimizer


class Training(NamedTuple):
    """The settings that every arm shares."""

    steps: int
    batch: int
    lr: float
    optimizer: str = "sgd"  # sgd: momentum 0.9, at a constant rate: the recipe of StoMPP's papers; adam: linear decay


def train(model: nn.Module, method: Method, data: Data, training: Training, seed: int) -> None:
    """Train the model, in place. The order of the data depends on `seed` only."""
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
    """The accuracy of the fully binary network, in percent."""
    model.eval()
    found = [model(x).argmax(1) for x in data.test_x.split(500)]
    return 100 * (torch.cat(found) == data.test_y).float().mean().item()


def interval(differences: list[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired differences, and the bounds of its confidence interval (Student's t)."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    half = student.ppf(0.5 + level / 2, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return mean, mean - half, mean + half
