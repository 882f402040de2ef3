"""The cases of bench_inference.py: contestants of ours and of torch that compute with the same shapes."""

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_bnn import optimize_, pack_
from hf_bnn.nn.activations import RPReLU
from hf_bnn.nn.levels import ElasticLevels, LearnedLevels

FP32, BF16, INT8 = PRECISIONS = ("fp32", "bf16", "int8")
LAST = "/channels_last"  # behind a precision: the same in the other layout of images

Call = Callable[[], object]


class Ours(NamedTuple):
    """One of our contestants. `macs`: multiply-accumulates of bits, 0 where its products are of another kind."""

    call: Call
    macs: int


class Contest(NamedTuple):
    """Contestants that are timed together: ours by the name of their row, torch's by precision and layout."""

    ours: dict[str, Ours]
    baselines: dict[str, Call]


class Case(NamedTuple):
    """Rows that share their baselines. `make` is given the names of those that are wanted."""

    rows: tuple[str, ...]
    make: Callable[[tuple[str, ...]], Contest]


@torch.no_grad()
def scatter_(model: nn.Module) -> nn.Module:
    """Give parameters that start equal in every layer different values, in place, as training does.

    Learned levels of query, key and value that are equal, biases of 0 and norms of 1 would let a model run faster than
    a trained one.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() < 2 or isinstance(module, LearnedLevels | RPReLU):
                factor, shift = torch.empty_like(parameter).uniform_(0.8, 1.2), 0.05 * torch.randn_like(parameter)
                if isinstance(module, ElasticLevels):  # those of probabilities are small, and remain above 0
                    shift *= module.width.abs()
                parameter.mul_(factor).add_(shift)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def optimized(model: nn.Module) -> nn.Module:
    """A binary model as users run it: packed and optimized, in place."""
    return optimize_(pack_(model))


def int8_form(model: nn.Module) -> nn.Module:
    """torch's dynamic quantization of the linear layers: int8 weights, inputs quantized in every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated in favour of torchao, which runs the same kernels
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(model), {nn.Linear}, torch.qint8)[0]


def images_last(x: Tensor) -> Tensor:
    """`(N, C, H, W)` with the channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def float_forms(model: nn.Module, int8: bool = True, layouts: bool = False) -> dict[str, nn.Module]:
    """A float model in torch's precisions, by the names of baselines.

    `layouts`: each with its channels last too, since torch's convolutions are faster now in the one, now in the other.
    """
    forms = {FP32: model, BF16: copy.deepcopy(model).to(torch.bfloat16)}
    if layouts:
        forms |= {
            f"{name}{LAST}": copy.deepcopy(form).to(memory_format=torch.channels_last) for name, form in forms.items()
        }
    if int8:
        forms[INT8] = int8_form(model)
    return forms


def given_to(form: str, x: Tensor) -> Tensor:
    """The input in the dtype and layout that the form of this name takes."""
    x = x.to(torch.bfloat16) if form.startswith(BF16) and x.is_floating_point() else x
    return images_last(x) if form.endswith(LAST) else x
