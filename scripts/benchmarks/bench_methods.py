"""Compares training methods on small networks. Every arm has the same seeds, data order and number of steps.

    python scripts/benchmarks/bench_methods.py stompp-order --data fashion_mnist --output stompp_order.json
    python scripts/benchmarks/bench_methods.py fsg --data fashion_mnist --output fsg.json

`stompp-order`: StoMPP's orders against the straight-through estimator, by depth. `fsg`: FSG against STE at the same
step norm, from the same trained float network, and the cost of a step. Every arm is evaluated fully binary, after the
last step. Rows that the output file already has are kept, so that a long comparison can run in parts.
"""

import argparse
import json
from pathlib import Path

import torch
from fsg_comparison import fsg_against_ste, fsg_cost, fsg_summary
from small_nets import digits, fashion_mnist
from stompp_order import NETS, ORDERS, order_table, stompp_order

from hf_bnn.machine import environment


def parser() -> argparse.ArgumentParser:
    """The parser of both comparisons."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--data", choices=["digits", "fashion_mnist"], default="digits")
    shared.add_argument("--data_dir", type=Path, help="folder of Fashion-MNIST's idx files (default: the Hub)")
    shared.add_argument("--batch", type=int, default=128)
    shared.add_argument("--threads", type=int, help="torch's number of threads (default: torch's own choice)")
    shared.add_argument("--output", type=Path, help="JSON file to write; an existing one is continued")
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
    fsg.add_argument("--steps", type=int, default=500, help="steps of the float network, and of each arm")
    fsg.add_argument("--lr", type=float, default=1e-3)
    fsg.add_argument("--margin", type=float, default=1.0, help="margin of non-inferiority, in points of accuracy")
    fsg.add_argument("--rounds", type=int, default=20, help="rounds of the timing; 0: no timing")
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
