"""`hf-bnn compare`: trains with several methods and seeds on the user's data, and compares the results.

Each run has its own process, whose peak memory is recorded, and its own folder below --output_dir. The same command
continues a stopped comparison: it reuses finished runs, and resumes the interrupted one from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from ..integrity import write_atomically
from ..tasks.errors import UsageError, shown
from .common import Parser, dump, extras, print_table
from .train import KINDS

RECORD, RESULTS = "compare_run.json", "all_results.json"
RESERVED = ("--seed", "--method", "--method_args", "--resume_from_checkpoint", "--do_predict")
METRICS = ("combined_score", "accuracy", "matthews_correlation", "pearson", "mse")  # in order of preference
LOWER_IS_BETTER = ("loss", "mse")
FLOAT = "float"  # stands for the float model in --methods
LEVEL = 0.95


class Run(NamedTuple):
    """A training run: its folder and its results."""

    method: str
    seed: int
    folder: Path
    metrics: dict[str, float]
    seconds: float | None  # of training; None if the run was interrupted
    peak_bytes: int | None  # of the process; None if the system does not report it


def compare(words: list[str]) -> int:
    """Train once per method and seed, and print means, differences and one sentence of advice.

    Args:
        words: "text" or "images", the options of the comparison, and the arguments of the task.

    Returns:
        0, or the exit code of a run that failed.

    Raises:
        UsageError: an argument is wrong, or a folder holds a run with other arguments.
    """
    parser = Parser(
        "compare",
        "Train with each method and each seed on the same data, and compare the results with those of the first "
        "method.\nAll further arguments are those of `hf-bnn train text` or `hf-bnn train images`.\n"
        "The same command continues a stopped comparison, and reuses finished runs.",
        "hf-bnn compare text --methods ste surge:eta=0.1,aux=leaky --seeds 0 1 2 3 4 --output_dir comparison "
        "--model_name_or_path google-bert/bert-base-uncased --train_file train.csv --validation_file test.csv",
    )
    parser.add_argument("kind", choices=KINDS, help="what the classifier reads")
    parser.add_argument(
        "--methods",
        nargs="+",
        required=True,
        metavar="METHOD",
        help=f'names in hf_bnn.METHODS, each with its arguments after a colon; "{FLOAT}" is the float model',
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output_dir", required=True, help="folder for all runs")
    parser.add_argument("--metric", help="metric to compare, such as accuracy or macro_f1 (default: the task's own)")
    parser.add_json()
    arguments, passed = parser.parse_known_args(words)
    check(arguments.methods, arguments.seeds, passed)
    from tqdm import tqdm

    with extras():
        import scipy  # noqa: F401 (fails before hours of training, not after them)
    output, found = Path(arguments.output_dir), []
    pairs = [(method, seed) for seed in arguments.seeds for method in arguments.methods]
    for method, seed in tqdm(pairs, unit=" run", disable=None, file=sys.stderr):
        run = finished_run(arguments.kind, method, seed, output, passed)
        if isinstance(run, int):
            code = 130 if run in (130, -2) else run if run > 0 else 1
            print(f"hf-bnn compare: the run of {method} with seed {seed} failed (exit code {run})", file=sys.stderr)
            return code
        found.append(run)
    report = compared(found, arguments.methods, arguments.seeds, arguments.metric)
    write_atomically(output / "comparison.json", json.dumps(report, indent=2) + "\n")
    if arguments.json:
        dump(report)
    else:
        print_report(report)
    return 0


def check(methods: list[str], seeds: list[int], passed: list[str]) -> None:
    """Raise UsageError for unknown methods, repeated values, and arguments that the comparison itself sets."""
    from ..methods import make_method, split_arguments

    for values, option in ((methods, "--methods"), (seeds, "--seeds")):
        if twice := [value for value in values if values.count(value) > 1]:
            raise UsageError(f"{option} names {twice[0]!r} twice: once is enough")
    for method in methods:
        name, settings = split_arguments(method)
        try:
            if name != FLOAT:
                make_method(name, settings)
        except ValueError as error:
            raise UsageError(f"--methods {method}: {error}") from error
    if len({folder_name(method) for method in methods}) < len(methods):
        raise UsageError(f"--methods {' '.join(methods)}: two of them would share a folder; compare them separately")
    names = {word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in passed if word[:2] == "--"}
    reserved = set(RESERVED) | ({"--binarize"} if FLOAT in methods else set())
    if taken := sorted(names & reserved):
        raise UsageError(f"{taken[0]} is not for comparisons, which set it for each run: leave it out")


def folder_name(method: str) -> str:
    """The name of a method's folder, without special characters."""
    return re.sub(r"[^\w.+=-]+", "-", method)


def arguments_of(method: str, seed: int, passed: list[str]) -> list[str]:
    """The task's arguments for one run, without its folder."""
    from ..methods import split_arguments

    name, settings = split_arguments(method)
    chosen = ["--binarize", "none"] if name == FLOAT else ["--method", name]
    chosen += ["--method_args", settings] if settings and name != FLOAT else []
    doing = [option for option in ("--do_train", "--do_eval") if option not in passed]
    return [*passed, *doing, *chosen, "--seed", str(seed)]


def finished_run(kind: str, method: str, seed: int, output: Path, passed: list[str]) -> Run | int:
    """The run, trained now unless a finished one exists; or the exit code with which it failed."""
    folder = output / folder_name(method) / f"seed-{seed}"
    words = arguments_of(method, seed, passed)
    record = read(folder / RECORD)
    if record is None and (folder / RESULTS).exists():
        raise UsageError(f"{folder} holds a run that no comparison has made: choose another --output_dir")
    if record is not None and record.get("arguments") != [kind, *words]:
        raise UsageError(
            f"{folder} holds a run with other arguments ({shown(record.get('arguments') or [])}): give the same ones "
            "to go on, or choose another --output_dir"
        )
    if record is None or "peak_bytes" not in record:
        begun = record is not None
        folder.mkdir(parents=True, exist_ok=True)
        record = {"arguments": [kind, *words], "begun": begun}
        write_atomically(folder / RECORD, json.dumps(record) + "\n")
        code, peak = launch(kind, [*words, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"])
        if code:
            forget(folder)
            return code
        record["peak_bytes"] = peak
        write_atomically(folder / RECORD, json.dumps(record) + "\n")
    metrics = read(folder / RESULTS)
    if metrics is None:
        raise UsageError(f"{folder} has no {RESULTS} though its run has ended: delete the folder to run it again")
    seconds = None if record["begun"] else metrics.get("train_runtime")
    return Run(method, seed, folder, metrics, seconds, record["peak_bytes"])


def forget(folder: Path) -> None:
    """Remove the folder of a run that has written nothing, so that it can run again with corrected arguments."""
    if [path.name for path in folder.iterdir()] == [RECORD]:
        (folder / RECORD).unlink()
        folder.rmdir()


def read(path: Path) -> dict[str, Any] | None:
    """The dictionary in a JSON file; None if there is no file. Raises UsageError if it cannot be read."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} cannot be read ({error}): delete its folder to run it again") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no table: delete its folder to run it again")
    return found


def launch(kind: str, words: list[str]) -> tuple[int, int | None]:
    """Run the task in a separate process with its output on stderr. Returns exit code and peak memory in bytes."""
    command = [sys.executable, "-m", __name__.partition(".")[0], "train", kind, *words]
    process = subprocess.Popen(command, stdout=2)
    try:
        if not hasattr(os, "wait4"):
            return process.wait(), None
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return process.returncode, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def metric_of(runs: list[Run], asked: str | None) -> str:
    """The key of the metric to compare. Raises UsageError if a run lacks it."""
    shared = [key for key in runs[0].metrics if key.startswith("eval_") and all(key in run.metrics for run in runs)]
    wanted = [asked] if asked else METRICS
    for name in wanted:
        key = name if name.startswith("eval_") else f"eval_{name}"
        if key in shared:
            return key
    raise UsageError(
        f"the runs have no metric {asked or shown(list(METRICS))!r}: give --metric; known: {shown(shared)}"
    )


def compared(runs: list[Run], methods: list[str], seeds: list[int], asked: str | None = None) -> dict[str, Any]:
    """The means of the methods, and their differences from the first one, paired by seed, with intervals."""
    metric = metric_of(runs, asked)
    values = {(run.method, run.seed): run.metrics[metric] for run in runs}
    rows = []
    for method in methods:
        own = [run for run in runs if run.method == method]
        differences = [values[method, seed] - values[methods[0], seed] for seed in seeds]
        seconds = [run.seconds for run in own if run.seconds is not None]
        peaks = [run.peak_bytes for run in own if run.peak_bytes is not None]
        first = method == methods[0]
        rows.append(
            {
                "method": method,
                "values": [values[method, seed] for seed in seeds],
                "mean": fmean(values[method, seed] for seed in seeds),
                "difference": None if first else fmean(differences),
                "interval": None if first else interval(differences),
                "seconds": fmean(seconds) if seconds else None,
                "peak_bytes": max(peaks, default=None),
            }
        )
    report = {"metric": metric, "seeds": seeds, "level": LEVEL, "methods": rows}
    return {**report, "advice": advice(rows, metric, len(seeds))}


def interval(differences: list[float]) -> list[float] | None:
    """The t interval of a mean difference; None for one seed, or if all differences are equal.

    >>> [round(bound, 3) for bound in interval([0.01, 0.02, 0.03])]
    [-0.005, 0.045]
    """
    count = len(differences)
    if count < 2 or max(differences) == min(differences):
        return None
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * stdev(differences) / count**0.5
    return [fmean(differences) - half, fmean(differences) + half]


def advice(rows: list[dict[str, Any]], metric: str, seeds: int) -> str:
    """One sentence of advice, which claims no more than the intervals show."""
    first, others = rows[0]["method"], rows[1:]
    if not others:
        return "One method alone is compared with nothing: name a second one in --methods."
    if seeds == 1:
        return "One seed shows nothing about which method is better: give five or more with --seeds."
    clear = [row for row in others if row["interval"] and (row["interval"][0] > 0 or row["interval"][1] < 0)]
    if not clear:
        return (
            f"These {seeds} seeds do not show that any method differs from {first} in {metric}, nor that they are "
            "equal: more seeds make the intervals narrower."
        )
    lower = metric.removeprefix("eval_").removesuffix("_mm") in LOWER_IS_BETTER
    said = []
    for row in clear:
        low, high = sorted(map(abs, row["interval"]))
        better = (row["interval"][0] > 0) != lower
        said.append(f"{row['method']} is {'better' if better else 'worse'} than {first} by {low:.4g} to {high:.4g}")
    alone = ", each interval taken by itself" if len(others) > 1 else ""
    return f"In {metric}, on this data, {'; '.join(said)} (95 % interval over {seeds} seeds{alone})."


def print_report(report: dict[str, Any]) -> None:
    """Print a comparison as a table, with the advice."""
    table = [["method", report["metric"], "difference", "95 % interval", "seconds", "peak memory, MB"]]
    for row in report["methods"]:
        difference, bounds = row["difference"], row["interval"]
        table.append(
            [
                row["method"],
                f"{row['mean']:.4f}",
                "-" if difference is None else f"{difference:+.4f}",
                "-" if bounds is None else f"{bounds[0]:+.4f} to {bounds[1]:+.4f}",
                "-" if row["seconds"] is None else f"{row['seconds']:.1f}",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            ]
        )
    print_table(table)
    print(report["advice"])
