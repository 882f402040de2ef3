"""Layers that bench_inference.py times: a module of ours against torch's module of the same shape."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from inference_cases import Call, Case, Contest, Ours, float_forms, given_to, images_last, optimized, scatter_
from torch import Tensor, nn

from hf_bnn import binarize_, kernels
from hf_bnn.functional import pack_bits
from hf_bnn.nn.levels import ElasticLevels


def layer_cases() -> Iterator[Case]:
    """Shapes of BERT and ResNet-18, and small ones, where a call costs more than its product."""
    for rows in (1, 8, 128, 1024):
        for size, out in ((768, 768), (768, 3072), (3072, 768)):
            yield linear_case(rows, size, out)
    for rows in (8, 128, 1024):
        yield ffn_case(rows)
    yield linear_case(1, 4096, 4096, binarize="weights")
    for rows in (1, 8, 32, 128, 512):
        for size, out in ((768, 768), (768, 3072), (3072, 768)):
            yield linear_case(rows, size, out, binarize="weights")
    for rows in (1, 8, 128):
        for size in (64, 256):
            for out in (64, 256):
                yield linear_case(rows, size, out)
                yield linear_case(rows, size, out, binarize="weights")
    for shape in dict.fromkeys(resnet18_body()):
        yield conv_case(shape.name(1), 1, [shape])
    for channels, kernel, size in ((16, 3, 32), (16, 1, 32), (32, 3, 16), (64, 3, 8), (64, 1, 8)):
        shape = Convolution(channels, channels, kernel, 1, size)
        yield conv_case(shape.name(1), 1, [shape])
    for batch in (1, 8):
        yield conv_case(f"resnet18_body_b{batch}", batch, resnet18_body())


def elastic(name: str) -> ElasticLevels:
    """Transformers' default."""
    return ElasticLevels()


def calls_of(forms: dict[str, nn.Module], x: Tensor) -> dict[str, Call]:
    """A call of each form, on an input of its dtype and layout."""

    def call_of(form: nn.Module, given: Tensor) -> Call:
        return lambda: form(given)

    return {name: call_of(form, given_to(name, x)) for name, form in forms.items()}


def one_row(name: str, make: Callable[[], tuple[Call, int, dict[str, Call]]]) -> Case:
    """A case of one row: `make` gives our call, its multiply-accumulates of bits, and the baselines."""

    def contest(names: tuple[str, ...]) -> Contest:
        call, macs, baselines = make()
        return Contest({name: Ours(call, macs)}, baselines)

    return Case((name,), contest)


def linear_case(rows: int, size: int, out: int, binarize: str = "both") -> Case:
    def make() -> tuple[Call, int, dict[str, Call]]:
        x, model = torch.randn(rows, size), nn.Sequential(nn.Linear(size, out))
        layer = optimized(scatter_(binarize_(model, binarize=binarize, levels=elastic)))[0]
        macs = rows * size * out if binarize == "both" else 0
        return lambda: layer(x), macs, calls_of(float_forms(nn.Linear(size, out)), x)

    kind = "linear" if binarize == "both" else "w1a32"
    return one_row(f"{kind}_m{rows}_k{size}_n{out}", make)


class FeedForward(nn.Module):
    """Two linear layers and a GELU."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.first, self.second = nn.Linear(size, hidden), nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


def linear_weight(out: int, size: int) -> kernels.LinearWeight:
    return kernels.LinearWeight.from_bits(pack_bits(torch.randn(out, size)), size)


def ffn_case(rows: int, size: int = 768, hidden: int = 3072) -> Case:
    def make() -> tuple[Call, int, dict[str, Call]]:
        x, first, second = torch.randn(rows, size), linear_weight(hidden, size), linear_weight(size, hidden)
        layers = (first, torch.rand(hidden), torch.randn(hidden), (-float("inf"), 0.5), second, torch.rand(size))
        offset = torch.randn(size)
        baselines = calls_of(float_forms(FeedForward(size, hidden)), x)
        return lambda: kernels.ffn(x, *layers, offset), 2 * rows * size * hidden, baselines

    return one_row(f"ffn_m{rows}", make)


class Convolution(NamedTuple):
    """One of a network's shapes."""

    channels: int
    out: int
    kernel: int
    stride: int
    size: int  # of the input, which is square

    def name(self, batch: int) -> str:
        return f"conv_c{self.channels}_n{self.out}_k{self.kernel}_s{self.stride}_hw{self.size}_b{batch}"

    def layer(self) -> nn.Conv2d:
        return nn.Conv2d(self.channels, self.out, self.kernel, self.stride, self.kernel // 2, bias=False)

    def macs(self) -> int:
        """Of one image."""
        return self.out * (self.size // self.stride) ** 2 * self.channels * self.kernel**2


def resnet18_body() -> list[Convolution]:
    """Every convolution of ResNet-18 at 224 x 224 but the first."""
    body, channels, size = [], 64, 56
    for out in (64, 128, 256, 512):
        stride = 1 if out == 64 else 2
        body += [Convolution(channels, out, 3, stride, size), Convolution(out, out, 3, 1, size // stride)]
        if stride == 2:
            body.append(Convolution(channels, out, 1, 2, size))
        body += [Convolution(out, out, 3, 1, size // stride)] * 2
        channels, size = out, size // stride
    return body


def conv_case(name: str, batch: int, shapes: list[Convolution]) -> Case:
    """Several convolutions, each on an input of its own, ours on channels that are last in memory."""

    def every(calls: list[Call]) -> Call:
        def run() -> None:
            for call in calls:
                call()

        return run

    def make() -> tuple[Call, int, dict[str, Call]]:
        ours, baselines = [], {}
        for shape in shapes:
            x = torch.randn(batch, shape.channels, shape.size, shape.size)
            layer = optimized(scatter_(binarize_(nn.Sequential(shape.layer()))))[0]
            ours += calls_of({name: layer}, images_last(x)).values()
            for form, call in calls_of(float_forms(shape.layer(), int8=False, layouts=True), x).items():
                baselines.setdefault(form, []).append(call)
        macs = batch * sum(shape.macs() for shape in shapes)
        return every(ours), macs, {form: every(calls) for form, calls in baselines.items()}

    return one_row(name, make)
