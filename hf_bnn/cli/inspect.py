"""`hf-bnn summary` and `hf-bnn check`: the composition of a model, and the inputs of its binary layers."""

from __future__ import annotations

import sys

from .common import Parser, dump, load, one_line, print_table, random_batch
from .inputs import add_inputs, batches, read_inputs


def summary(words: list[str]) -> int:
    """Print the result of `hf_bnn.summary`.

    Args:
        words: MODEL and the options.

    Raises:
        UsageError: there is no such binary model.
        CorruptCheckpointError: its files are damaged.
    """
    from ..summary import composition
    from ..summary import summary as count

    parser = Parser("summary", "Count the binary weights of a saved model, and their bytes.", "hf-bnn summary my-model")
    parser.add_model()
    parser.add_json()
    arguments = parser.parse_args(words)
    model = load(arguments.model, arguments.revision)
    found = count(model)
    compression = found.matrix_compression if found.binary_weights else None
    if arguments.json:
        shares = {"binary_share": found.binary_share, "matrix_compression": compression}
        dump({"class": type(model).__name__, **found._asdict(), **shares})
        return 0
    rows = [
        ["weights", f"{found.weights:,}"],
        ["binary weights", f"{found.binary_weights:,}"],
        ["binary share", f"{found.binary_share:.1%}"],
        ["binary matrices in float32, bytes", f"{found.matrix_bytes_float:,}"],
        ["the same as bits, bytes", f"{found.matrix_bytes_bits:,}"],
        ["the same with scales, bytes", f"{found.matrix_bytes_packed:,}"],
        ["times smaller", "-" if compression is None else f"{compression:.1f}"],
    ]
    print(type(model).__name__)
    print_table(rows)
    print(composition(model))
    return 0


def check(words: list[str]) -> int:
    """Print the result of `hf_bnn.check_inputs` on a batch.

    Args:
        words: MODEL, its inputs, and the options.

    Returns:
        1 if a layer has a problem, such as constant signs; else 0.

    Raises:
        UsageError: there is no such binary model, or its inputs cannot be read.
        CorruptCheckpointError: its files are damaged.
    """
    from ..diagnostics import check_inputs

    parser = Parser(
        "check",
        "Run one batch through a model and show, for each binary layer, how its inputs are spread over their levels.\n"
        "A layer whose inputs all have the same sign computes nothing. Exit code 1 if a layer has a problem.",
        "hf-bnn check my-model --file texts.csv",
    )
    parser.add_model()
    add_inputs(parser)
    parser.add_json()
    arguments = parser.parse_args(words)
    model = load(arguments.model, arguments.revision)
    inputs = read_inputs(arguments, model)
    if inputs is None:
        print("no inputs were given: random ones are used, which show less than your own (--file)", file=sys.stderr)
        batch = random_batch(model, 32)
    else:
        _, batch = next(batches(arguments, model, inputs))
    with one_line(arguments.model):
        reports = check_inputs(model, batch)
    problems = [report for report in reports if report.problem]
    if arguments.json:
        dump({"problems": len(problems), "layers": [report._asdict() for report in reports]})
    else:
        print(*reports, sep="\n")
        print(f"{len(problems)} of {len(reports)} layers' inputs have a problem")
    return int(bool(problems))
