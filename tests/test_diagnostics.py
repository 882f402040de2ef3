"""check_inputs finds inputs with constant signs, reports no problem for healthy ones, and changes nothing."""

import copy

import pytest
import torch
from tiny import TinyConvNet, make_net, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_bnn import BinaryConfig, binarize_, calibrate_, check_inputs, pack_
from hf_bnn.diagnostics import InputReport
from hf_bnn.methods import STE
from hf_bnn.nn.layers import binary_layers
from hf_bnn.nn.levels import ElasticLevels, UnsignedLevels


def only(model: nn.Module, batch: Tensor) -> InputReport:
    [report] = check_inputs(model, batch)
    return report


def linear(**kwargs) -> nn.Sequential:
    return binarize_(nn.Sequential(nn.Linear(8, 4)), **kwargs)


def resnet() -> ResNetForImageClassification:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes))


@pytest.mark.parametrize("levels", ["signed", "elastic"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_resnet_that_was_only_converted_has_a_constant_sign_at_every_convolution(levels: str, packed: bool):
    model = BinaryConfig(levels=levels).apply_(resnet())
    names = {name for name, module in model.named_modules() if module in binary_layers(model)}
    reports = check_inputs(pack_(model) if packed else model, {"pixel_values": torch.randn(4, 3, 32, 32)})
    assert {report.module for report in reports} == names
    assert {(report.high, report.constant_features) for report in reports} == {(1.0, 1.0)}
    assert all("is it the output of a ReLU" in report.problem for report in reports)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "bert"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_healthy_model_has_no_problem(kind: str, packed: bool):
    net = make_net(kind, STE())
    if packed:
        calibrate_(net.model, net.output)
        pack_(net.model)
    reports = check_inputs(net.model, net.batch if kind == "bert" else net.batch["x"])
    assert [str(report) for report in reports if report.problem] == []
    assert all(0 < report.high < 1 for report in reports)


def test_the_even_attention_of_an_untrained_network_is_told_apart():
    net = make_net("matmul", STE())
    [report] = [report for report in check_inputs(net.model, net.batch["x"]) if report.problem]
    assert (report.module, report.operand, report.high) == ("attention.context", "left", 1.0)


def test_both_operands_of_a_product_are_reported_in_the_order_of_execution():
    reports = check_inputs(tiny_model(attention="binary", num_hidden_layers=1), tiny_batch())
    names = [(report.module.removeprefix("bert.encoder.layer.0."), report.operand) for report in reports]
    assert names == [
        ("attention.self.query", "input"),
        ("attention.self.key", "input"),
        ("attention.self.value", "input"),
        ("attention.self.binary_attention.scores", "left"),
        ("attention.self.binary_attention.scores", "right"),
        ("attention.self.binary_attention.context", "left"),
        ("attention.self.binary_attention.context", "right"),
        ("attention.output.dense", "input"),
        ("intermediate.dense", "input"),
        ("output.dense", "input"),
    ]


class Late(nn.Module):
    """Runs its layers in another order than that of their definition, one of them twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.second, self.first = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.second(self.first(x)))


def test_layers_come_in_the_order_of_execution_and_those_that_do_not_run_last():
    reports = check_inputs(binarize_(Late()), torch.randn(32, 8))
    assert [report.module for report in reports] == ["first", "second", "unused"]
    assert reports[-1].problem == "this batch does not reach it"


def test_the_shares_are_those_of_the_formula():
    x = torch.randn(64, 8) + torch.linspace(-4, 4, 8)
    x[:, 7] = x[:, 7].abs()
    report = only(linear(), x)
    assert report.high == (x >= 0).float().mean()
    assert report.beyond == (x.abs() > 1).float().mean()
    signs = (x >= 0).float().mean(0)
    assert report.constant_features == ((signs == 0) | (signs == 1)).float().mean()
    assert 0 < report.constant_features < 1


def test_features_of_a_convolution_are_its_channels():
    model = binarize_(nn.Sequential(nn.Conv2d(2, 3, 3)))
    x = torch.randn(4, 2, 5, 5)
    x[:, 1].abs_()
    assert only(model, x).constant_features == 0.5


def test_counts_add_up_over_several_calls():
    model, x, calls = binarize_(Late()), torch.randn(16, 8), []
    second = check_inputs(model, x)[1]
    model.eval().second.register_forward_pre_hook(lambda layer, inputs: calls.append(inputs[0]))
    with torch.no_grad():
        model(x)
    assert len(calls) == 2
    seen = torch.cat(calls)
    assert second.high == (seen >= 0).float().mean()
    assert second.high != (calls[0] >= 0).float().mean()
    signs = (seen >= 0).float().mean(0)
    assert second.constant_features == ((signs == 0) | (signs == 1)).float().mean()


def problem(x: Tensor, model: nn.Module | None = None) -> str:
    return only(linear() if model is None else model, x).problem


def test_each_problem_is_told_in_words():
    good = torch.randn(64, 8)
    assert problem(good) is None
    assert "never below the threshold (is it the output of a ReLU?)" in problem(good.relu())
    assert "never above the threshold: every value is on the low level" in problem(-good.abs() - 1)
    assert "the sign of 100% of its features never changes" in problem(torch.sign(torch.randn(8)).expand(64, 8))
    assert "100% of its input lies beyond the levels" in problem(good.sign() * 100)
    assert "8 of 512 values of its input are NaN or infinite" in problem(good.index_fill(0, torch.tensor(0), torch.nan))
    dead = linear()
    nn.init.zeros_(dead[0].weight)
    assert problem(good, dead) == "100% of its outputs have weights that are all 0: load trained weights, or exclude it"
    assert "100% of its outputs" in problem(good, pack_(dead))


def test_a_few_values_of_a_feature_are_too_few_to_call_it_constant():
    assert problem(torch.sign(torch.randn(8)).expand(4, 8) * 0.5) is None


def test_unsigned_levels_make_use_of_inputs_that_are_never_negative():
    model = linear(levels=lambda name: UnsignedLevels())
    assert problem(torch.rand(64, 8), model) is None
    assert "calibrate its levels (hf_bnn.calibrate_)" in problem(1 + torch.rand(64, 8), model)


def test_levels_that_were_never_fitted_are_reported_as_calibration_would_make_them():
    x = torch.randn(64, 8) * 100
    fresh = linear(levels=lambda name: ElasticLevels(signed=False))
    report = only(fresh, x)
    assert report.calibrated
    assert (fresh[0].input_levels.width.item(), fresh[0].input_levels.fresh) == (1.0, True)
    calibrate_(fresh, lambda: fresh(x))
    assert only(fresh, x) == report._replace(calibrated=False)
    uncalibrated = linear(levels=lambda name: ElasticLevels(signed=False))
    assert only(pack_(uncalibrated), x).high != report.high  # nobody would fit those of a packed model


class Noisy(TinyConvNet):
    """Has batch statistics, and draws random numbers even in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self[1] = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


def test_the_model_is_left_as_it_was():
    model = binarize_(Noisy(), skip=("0", "9"), levels=lambda name: ElasticLevels()).train()
    model[1].eval()  # a frozen normalization stays frozen
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    check_inputs(model, torch.randn(4, 3, 6, 6, generator=torch.Generator()))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(layer._forward_pre_hooks for layer in binary_layers(model))
    assert all(p.grad is None for p in model.parameters())


def test_a_run_that_fails_leaves_the_model_as_it_was_too():
    model = linear(levels=lambda name: ElasticLevels()).train()
    with pytest.raises(RuntimeError):
        check_inputs(model, torch.randn(2, 7))
    assert model[0].training
    assert model[0].input_levels.fresh
    assert not model[0]._forward_pre_hooks


def test_a_model_without_binary_inputs_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no layer with binary inputs: call hf_bnn\.binarize_ first"):
        check_inputs(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="Sequential has no layer with binary inputs"):
        check_inputs(linear(binarize="weights"), torch.ones(1, 8))


def test_a_report_reads_as_one_line():
    text = str(only(linear(), torch.ones(4, 8)))
    assert text.startswith("0.input: 100.0% high 100.0% constant   0.0% beyond  its input is never below the threshold")
    assert "\n" not in text
