"""`hf-bnn bench`: the time of a binary model and of its float form."""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import TYPE_CHECKING

from .common import Parser, dump, load, one_line, optimized, positive, print_table, random_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT_FIELDS = {"binarize": "none", "attention": "float", "embeddings": "float", "weight_format": "float"}


def bench(words: list[str]) -> int:
    """Print the median times of a forward pass: of the optimized model, and of a float model of the same config.

    Args:
        words: MODEL and the options.

    Raises:
        UsageError: there is no such binary model.
        CorruptCheckpointError: its files are damaged.
    """
    parser = Parser(
        "bench",
        "Time a forward pass of a binary model, packed and optimized, and of a float model of the same config with\n"
        "random weights. The two take turns; the medians are printed. Inputs are random.",
        "hf-bnn bench my-model --batch_size 1 32 --threads 1",
    )
    parser.add_model()
    parser.add_argument("--batch_size", type=positive, nargs="+", default=[1], help="rows of a batch (default: 1)")
    parser.add_argument("--tokens", type=positive, default=64, help="tokens of a text (default: 64)")
    parser.add_argument("--rounds", type=positive, default=30, help="timed rounds (default: 30)")
    parser.add_argument("--threads", type=positive, help="torch's threads (default: torch's own choice)")
    parser.add_json()
    arguments = parser.parse_args(words)
    import torch
    from tqdm import tqdm

    from .. import kernels
    from ..machine import environment, median_ms

    binary = load(arguments.model, arguments.revision)
    with one_line(arguments.model):
        models = {"float": float_form(binary).eval(), "binary": optimized(binary, arguments.model)}
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(arguments.threads or threads)
    try:
        with torch.no_grad():
            for size in tqdm(arguments.batch_size, unit=" batch size", disable=None, file=sys.stderr):
                batch = random_batch(binary, size, arguments.tokens)
                shape = list(next(iter(batch.values())).shape)
                found = median_ms({name: partial(model, **batch) for name, model in models.items()}, arguments.rounds)
                times = {"float_ms": found["float"], "binary_ms": found["binary"]}
                rows.append({"input": shape, **times, "speedup": found["float"] / found["binary"]})
        machine = environment(backend=kernels.backend(), rounds=arguments.rounds)
    finally:
        torch.set_num_threads(threads)
    if arguments.json:
        dump({"model": arguments.model, "machine": machine, "results": rows})
        return 0
    print(f"{machine['cpu']}, {machine['threads']} threads, kernels: {machine['backend']}, torch {machine['torch']}")
    table = [["input", "float, ms", "binary, ms", "times faster"]]
    for row in rows:
        shape = " x ".join(map(str, row["input"]))
        table.append([shape, f"{row['float_ms']:.2f}", f"{row['binary_ms']:.2f}", f"{row['speedup']:.2f}"])
    print_table(table)
    return 0


def float_form(model: PreTrainedModel) -> PreTrainedModel:
    """A float model of the same class and sizes, with random weights."""
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    for name, value in FLOAT_FIELDS.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return type(model)(config)
