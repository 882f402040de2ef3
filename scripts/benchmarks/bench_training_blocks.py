"""Times training steps of layers and blocks, binary over float: the same modules with and without binary layers.

    python scripts/benchmarks/bench_training_blocks.py --threads 1 --output bench_training_blocks.json

A step is forward, backward and the optimizer's (AdamW), with the method's two calls. Inputs ask for a gradient. Each
round times every arm of a case once. With `--autocast`, forward passes run under bfloat16 autocast, float ones too.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from bench_training import interleaved, median_ratio
from torch import Tensor, nn

from hf_bnn import BinaryBertConfig, BinaryBertModel, BinaryResNetConfig, BinaryResNetModel, binarize_, install_method
from hf_bnn.machine import environment
from hf_bnn.methods import STE, Method, Step, Stompp, Surge
from hf_bnn.nn.layers import binary_layers
from hf_bnn.nn.levels import SignedLevels
from hf_bnn.training import begin_step, end_backward, hook_optimizer
from hf_bnn.training.allocator import keep_freed_memory

FLOAT = "float"
TOTAL = 1_000_000  # steps of the run that the timed steps are taken from


class Arm(NamedTuple):
    """How the binary layers of a case are trained."""

    method: Method
    on_bits: bool = True
    start: int = 0  # the step of the run at which the timing starts


ARMS = {
    "ste": Arm(STE()),
    "ste, on floats": Arm(STE(), on_bits=False),
    "surge own": Arm(Surge()),
    "surge leaky": Arm(Surge(aux="leaky")),
    "stompp signs": Arm(Stompp(), start=int(0.95 * TOTAL)),
}


class Case(NamedTuple):
    """Modules to compare: `make(binary)` builds them, with the binary layers of `binary` or float ones."""

    make: Callable[[bool], nn.Module]
    x: Tensor


def linear(tokens: int, inputs: int, outputs: int) -> Case:
    def make(binary: bool) -> nn.Module:
        model = nn.Sequential(nn.Linear(inputs, outputs))
        return binarize_(model, levels=lambda _: SignedLevels()) if binary else model

    return Case(make, torch.randn(tokens, inputs))


def bert_layer(batch: int, tokens: int, hidden: int, heads: int) -> Case:
    def make(binary: bool) -> nn.Module:
        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": heads}
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        kind = "both" if binary else "none"
        config = BinaryBertConfig(num_hidden_layers=1, vocab_size=8, binarize=kind, **sizes, **rates)
        return BinaryBertModel(config, add_pooling_layer=False).encoder.layer[0]

    return Case(make, torch.randn(batch, tokens, hidden))


def resnet_block(batch: int, channels: int, size: int) -> Case:
    def make(binary: bool) -> nn.Module:
        kind = "both" if binary else "none"
        sizes = {"embedding_size": channels, "hidden_sizes": [channels], "depths": [1], "layer_type": "basic"}
        config = BinaryResNetConfig(stem="cifar", binarize=kind, **sizes)
        return BinaryResNetModel(config).encoder.stages[0].layers[0]

    return Case(make, torch.randn(batch, channels, size, size))


CASES: dict[str, Callable[[], Case]] = {
    "linear 768->768, 512 tokens": lambda: linear(512, 768, 768),
    "linear 768->3072, 512 tokens": lambda: linear(512, 768, 3072),
    "linear 3072->768, 512 tokens": lambda: linear(512, 3072, 768),
    "linear 768->768, 2048 tokens": lambda: linear(2048, 768, 768),
    "linear 768->3072, 2048 tokens": lambda: linear(2048, 768, 3072),
    "linear 3072->768, 2048 tokens": lambda: linear(2048, 3072, 768),
    "BERT-base layer, 4 x 128": lambda: bert_layer(4, 128, 768, 12),
    "MiniLM layer, 32 x 64": lambda: bert_layer(32, 64, 384, 12),
    "ResNet-18 block, 16 x 64 x 56 x 56": lambda: resnet_block(16, 64, 56),
    "ResNet-18 block, 16 x 128 x 28 x 28": lambda: resnet_block(16, 128, 28),
    "ResNet-18 block, 16 x 256 x 14 x 14": lambda: resnet_block(16, 256, 14),
    "ResNet-18 block, 16 x 512 x 7 x 7": lambda: resnet_block(16, 512, 7),
}


def make_step(module: nn.Module, case: Case, arm: Arm | None, autocast: bool) -> Callable[[], None]:
    """A function that makes one training step; `arm` is None for float modules."""
    module.train()
    x = case.x.clone().requires_grad_()
    optimizer = torch.optim.AdamW(module.parameters(), 1e-6)
    if arm is not None:
        install_method(module, arm.method)
        for layer in binary_layers(module):
            layer.runs_on_bits = arm.on_bits
        optimizer = torch.optim.AdamW(module.parameters(), 1e-6)  # with the method's own parameters
        hook_optimizer(module, optimizer, arm.method)
    steps = iter(range(0 if arm is None else arm.start, TOTAL))

    def step() -> None:
        if arm is not None:
            moment = Step(next(steps), TOTAL, 1e-6)
            begin_step(module, moment)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))
        if arm is not None:
            end_backward(module, moment)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def measure(name: str, arms: dict[str, Arm], rounds: int, autocast: bool) -> list[dict]:
    """One row per arm of a case, as in the JSON: milliseconds, and the median ratio to the float modules."""
    torch.manual_seed(0)
    case = CASES[name]()
    binary = case.make(True)
    steps = {FLOAT: make_step(case.make(False), case, None, autocast)}
    steps |= {arm: make_step(copy.deepcopy(binary), case, how, autocast) for arm, how in arms.items()}
    times = interleaved(steps, rounds)
    return [
        {
            "case": name,
            "arm": arm,
            "autocast": autocast,
            "ms_median": statistics.median(found),
            "over_float": median_ratio(found, times[FLOAT]),
        }
        for arm, found in times.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", metavar="TEXT", help="only the cases whose name has one of these texts")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast in the forward pass")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: expected at least 1")
    chosen = [name for name in CASES if not arguments.cases or any(text in name for text in arguments.cases)]
    if not chosen:
        parser.error(f"--cases {' '.join(arguments.cases)}: no case has such a name; there are {', '.join(CASES)}")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    arms = {name: ARMS[name] for name in arguments.arms}
    print(f"{'case':<38}{'arm':<16}{'ms':>9}{'/ float':>9}")
    rows = []
    for name in chosen:
        for row in measure(name, arms, arguments.rounds, arguments.autocast):
            print(f"{row['case']:<38}{row['arm']:<16}{row['ms_median']:>9.2f}{row['over_float']:>9.2f}", flush=True)
            rows.append(row)
    if arguments.output:
        found = {"environment": environment(rounds=arguments.rounds), "rows": rows}
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
