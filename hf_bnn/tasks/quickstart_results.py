"""The results of the quick start as text, for its screen, the README and the model cards."""

from ..methods import make_method

HUB_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
HELD_OUT = 1000
MAX_LENGTH = 64


def method_name(method: str, method_args: str | None) -> str:
    """The training method in words. SURGE without a branch is merely a leaky straight-through estimator."""
    if method == "surge" and getattr(make_method(method, method_args), "aux", None) == "leaky":
        return f"leaky STE (surge, {method_args})"
    return method + (f" ({method_args})" if method_args else "")


def table(results: dict) -> str:
    """The results as a table of text."""

    def row(name: str, left: str, right: str, ratio: str) -> str:
        return f"{name:<34}{left:>12}{right:>12}{ratio:>12}"

    lines = [row("", "float", "binary", "ratio")]
    if results["smoke"]:
        lines.append(f"accuracy: not reported, this was a smoke run of {results['arguments']['max_steps']} steps")
    else:
        left, right = results["accuracy_float"], results["accuracy_binary"]
        name = f"accuracy ({HELD_OUT} held-out sentences)"
        lines.append(row(name, f"{left:.1%}", f"{right:.1%}", f"{results['retention']:.3f}"))
    size = [results["bytes_float"], results["bytes_packed"]]
    lines.append(row("weight file, MB", *(f"{b / 1e6:.2f}" for b in size), f"{size[0] / size[1]:.2f}x"))
    if results["matrix_compression"]:
        lines.append(row("binary matrices, with scales", "", "", f"{results['matrix_compression']:.2f}x"))
    lines.append(row("share of binary weights", "", f"{results['binary_share']:.1%}", ""))
    for suffix, batch in (("", 1), ("_batch32", 32)):
        left, right = results[f"latency_float_ms{suffix}"], results[f"latency_packed_ms{suffix}"]
        name = f"latency, {batch} x {MAX_LENGTH} tokens, ms"
        lines.append(row(name, f"{left:.1f}", f"{right:.1f}", f"{left / right:.2f}x"))
    lines.append(f"packed logits equal the trained model's: {'yes' if results['packed_equals_latent'] else 'NO'}")
    return "\n".join(lines)
