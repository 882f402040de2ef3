"""Sums of methods: who fills which slot, what is refused, and how a sum is written and read."""

import json

import pytest
import torch
from tiny import make_net, optimizer_of, train_steps
from torch import Tensor

from hf_bnn import install_method
from hf_bnn.functional import weight_scale
from hf_bnn.methods import (
    STE,
    XNOR,
    ApproxSign,
    Combined,
    DoReFa,
    Fsg,
    IRNet,
    Method,
    ReSTE,
    Site,
    Stompp,
    Surge,
    make_method,
    method_from_dict,
)
from hf_bnn.methods.approx_sign import ApproximateSign
from hf_bnn.methods.base import ClippedSign, Direct, IdentitySign
from hf_bnn.methods.scaled_weight import SignWithScaledWeightGradient
from hf_bnn.methods.surge import AuxiliaryBranch
from hf_bnn.nn.layers import BinaryLinear
from hf_bnn.nn.levels import SignedLevels

SITE = Site(0, 1, (8, 12))
THREE = make_method("dorefa+approx_sign+surge", "clip=2,surge.eta=0.3")


# Who fills which slot


def test_each_slot_is_filled_by_the_method_that_claims_it():
    layer = BinaryLinear(12, 8)
    assert type(THREE.weight_binarizer(SITE)) is SignWithScaledWeightGradient
    assert type(THREE.input_binarizer(SITE, (12,))) is ApproximateSign
    around = THREE.around(SITE, layer)
    assert type(around) is AuxiliaryBranch
    assert around.eta == 0.3
    assert THREE.claims() == {"weight_binarizer", "input_binarizer", "around"}


def test_what_nobody_claims_comes_from_the_first():
    part = (DoReFa(clip=0.5) + Surge(clip=0.5)).input_binarizer(SITE, (12,))
    assert (type(part), part.clip) == (ClippedSign, 0.5)
    assert type((ApproxSign() + Surge()).weight_binarizer(SITE)) is IdentitySign
    assert type((ApproxSign() + DoReFa()).around(SITE, BinaryLinear(12, 8))) is Direct


def test_the_plain_estimator_claims_nothing_and_may_stand_anywhere():
    assert STE().claims() == frozenset()
    part = (STE(clip=3.0) + Surge(clip=3.0)).input_binarizer(SITE, (12,))
    assert part.clip == 3.0
    assert (Surge() + STE()).claims() == Surge().claims()


@pytest.mark.parametrize("aux", ["own", "shared", "lowrank"])
def test_surge_claims_what_runs_around_the_operator(aux: str):
    assert Surge(aux=aux).claims() == {"around"}


def test_surge_with_leaky_signs_claims_the_inputs_instead():
    leaky = Surge(aux="leaky")
    assert leaky.claims() == {"input_binarizer"}
    assert (leaky + DoReFa()).claims() == {"weight_binarizer", "input_binarizer"}
    with pytest.raises(ValueError, match="'approx_sign' and 'surge' cannot be combined: both define the input_binariz"):
        ApproxSign() + leaky


class Hooked(Method):
    name = "hooked"

    def optimizer_hook(self, optimizer, layers) -> None:
        optimizer.seen = layers


def test_the_optimizer_is_hooked_by_the_method_that_claims_it():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    (Surge() + Hooked()).optimizer_hook(optimizer, [])
    assert optimizer.seen == []
    net = make_net("linear", Surge() + IRNet())
    losses = train_steps(net, optimizer_of(net), range(20))
    assert losses[-1] < 0.5 * losses[0]


def test_sums_of_sums_are_sums():
    nested = (DoReFa() + ApproxSign()) + Surge()
    assert nested == DoReFa() + (ApproxSign() + Surge())
    assert nested == Combined(methods=(DoReFa(), ApproxSign(), Surge()))
    assert nested.methods == (DoReFa(), ApproxSign(), Surge())
    assert nested.name == "dorefa+approx_sign+surge"


# What is refused


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            (ApproxSign(), ReSTE()),
            "methods 'approx_sign' and 'reste' cannot be combined: both define the input_binarizer. Leave one of them "
            r"out, or set it \(method_args\) to work elsewhere",
        ),
        ((XNOR(), Surge(), DoReFa()), "methods 'xnor' and 'dorefa' cannot be combined: both define the weight_binar"),
        ((IRNet(libra=False), DoReFa()), "methods 'ir_net' and 'dorefa' cannot be combined: both define the weight_bi"),
        ((Surge(), ApproxSign(), Surge(eta=1.0)), r"method 'surge' is named twice in 'surge\+approx_sign\+surge'"),
        ((STE(), STE()), r"method 'ste' is named twice in 'ste\+ste'"),
        (
            (ApproxSign(clip=3.0), Surge(clip=2.0)),
            r"the methods of 'approx_sign\+surge' must agree on the clip bound of the inputs, but have "
            r"approx_sign.clip=3.0, surge.clip=2.0: give all the same \(method_args: clip=..., without a method's name",
        ),
        (
            (ReSTE(), Surge(clip=2.0)),
            r"surge.clip=2.0 would be ignored in 'reste\+surge': 'reste' estimates the gradient of the inputs, and",
        ),
        ((Surge(),), "a sum needs at least two methods, got 1"),
        ((), "a sum needs at least two methods, got 0"),
    ],
)
def test_a_sum_that_makes_no_sense_is_an_error_that_says_why(methods: tuple[Method, ...], message: str):
    with pytest.raises(ValueError, match=message):
        Combined(methods=methods)


# Writing and reading


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("approx_sign+surge", None, ApproxSign() + Surge()),
        ("approx_sign+surge", "surge.eta=0.3", ApproxSign() + Surge(eta=0.3)),
        ("approx_sign+surge", "eta=0.3,aux=shared", ApproxSign() + Surge(eta=0.3, aux="shared")),
        ("surge + approx_sign", " surge.clip = 2 , approx_sign.clip = 2 ", Surge(clip=2.0) + ApproxSign(clip=2.0)),
        ("stompp+surge", "clip=2,order=reverse", Stompp(clip=2.0, order="reverse") + Surge(clip=2.0)),
        ("stompp+fsg", "on=activations,stompp.seed=1", Stompp(on="activations", seed=1) + Fsg()),
        ("dorefa+approx_sign+surge", "clip=2,surge.eta=0.3", THREE),
        ("surge", "surge.eta=0.3", Surge(eta=0.3)),
        ("surge+ir_net", "t_max=5,ir_net.libra=false", Surge() + IRNet(t_max=5.0, libra=False)),
    ],
)
def test_a_sum_is_read_from_the_command_line(name: str, arguments: str | None, expected: Method):
    assert make_method(name, arguments) == expected


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "stompp+fsg",
            "on=activations,seed=1",
            "method_args has 'seed', which several of the methods have: write stompp.seed or fsg.seed$",
        ),
        (
            "stompp+surge",
            "stompp.clip=4",
            "must agree on the clip bound of the inputs, but have stompp.clip=4.0, surge.c",
        ),
        (
            "approx_sign+surge",
            "clip=2,surge.clip=3",
            "argument 'clip' of method 'surge' is given twice: once is enough",
        ),
        (
            "reste+surge",
            "clip=2",
            "surge.clip=2.0 would be ignored .*: 'reste' estimates .*, and has no clip; leave",
        ),
        ("reste+ir_net", "clip=2", "unknown argument 'clip' of method 'reste'; known arguments: o_end, threshold"),
        (
            "approx_sign+surge",
            "dorefa.clip=2",
            "method_args has 'dorefa.clip': expected the name of one of approx_sign, surge before the dot",
        ),
        ("surge", "ste.clip=2", "method_args has 'ste.clip': expected the name of one of surge before the dot"),
        ("approx_sign+surge", "etta=1", "unknown argument 'etta' of method 'approx_sign'; known arguments: clip$"),
        ("approx_sign+surge", "surge.etta=1", "unknown argument 'etta' of method 'surge'; known arguments: clip, eta"),
        ("approx_sign+surge", "surge.eta=x", "argument eta='x' of method 'surge': expected float"),
        ("approx_sign+surge", "surge.aux=leaky", "both define the input_binarizer"),
        ("approx_sign+strage", None, "unknown method 'strage'; known methods: ste, "),
        ("approx_sign+", None, "unknown method ''; known methods: ste, "),
        ("surge+surge", None, "method 'surge' is named twice"),
    ],
)
def test_a_bad_sum_on_the_command_line_is_an_error_that_names_the_way_out(name: str, arguments, message: str):
    with pytest.raises(ValueError, match=message):
        make_method(name, arguments)


def test_a_sum_takes_keywords_too():
    assert make_method("stompp+surge", "eta=0.3", clip=2, order="reverse") == Stompp(clip=2.0, order="reverse") + Surge(
        clip=2.0, eta=0.3
    )


def test_the_clip_bound_of_a_sum_is_that_of_its_methods():
    assert (Stompp(clip=2.0) + Surge(clip=2.0)).clip == 2.0
    assert THREE.clip == 2.0


def test_inputs_that_no_method_claims_have_the_clip_bound_of_the_first_method_that_has_one():
    part = (Hooked() + Surge(clip=2.0)).input_binarizer(SITE, (12,))
    assert (type(part), part.clip) == (ClippedSign, 2.0)
    assert (ReSTE() + Hooked()).clip is None


def test_a_sum_is_written_as_the_list_of_its_methods():
    assert (ApproxSign() + Surge(eta=0.3)).to_dict() == {
        "name": "approx_sign+surge",
        "methods": [
            {"name": "approx_sign", "clip": 1.0},
            {"name": "surge", "clip": 1.0, "eta": 0.3, "aux": "own", "rank": 32},
        ],
    }


@pytest.mark.parametrize("method", [THREE, ApproxSign() + Surge(), IRNet(libra=False) + Surge(aux="lowrank", rank=4)])
def test_a_sum_round_trips_through_json(method: Method):
    assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_a_bad_dict_of_a_sum_is_an_error():
    with pytest.raises(ValueError, match="unknown method 'x'; known methods: ste, "):
        method_from_dict({"name": "x+surge", "methods": [{"name": "x"}, {"name": "surge"}]})
    with pytest.raises(ValueError, match="a sum needs at least two methods, got 1"):
        method_from_dict({"name": "surge", "methods": [{"name": "surge"}]})


# What it does


def triangle(x: Tensor) -> Tensor:
    """Bi-Real Net's derivative: 2 - 2 |x| inside, 0 outside."""
    return torch.where(x.abs() <= 1, 2 - 2 * x.abs(), 0.0)


def box(x: Tensor) -> Tensor:
    return (x.abs() <= 1).double()


def gradients(method: Method) -> tuple[Tensor, Tensor, Tensor, BinaryLinear, Tensor, Tensor]:
    """dL/dx, dL/dW and dL/dW_a of a layer under `method`; then the layer, x and G = dL/dy, where y has no scale."""
    torch.manual_seed(0)
    layer = install_method(BinaryLinear(12, 8, bias=False, levels=SignedLevels()).double(), method)
    (aux,) = layer.around.aux
    with torch.no_grad():
        aux.add_(torch.randn_like(aux))  # away from the latent weights, whose copy it starts as
    x, G = torch.randn(5, 12, dtype=torch.float64, requires_grad=True), torch.randn(5, 8, dtype=torch.float64)
    layer(x).backward(G)
    return x.grad, layer.weight.grad, aux.grad, layer, x.detach(), G


def closed_form(layer: BinaryLinear, x: Tensor, G: Tensor, eta: float, derivative) -> tuple[Tensor, Tensor, Tensor]:
    """g_b + lambda g_a with lambda = eta ||g_b|| / ||g_a||; the latent weights' gradient; lambda G^T x.

    SURGE's branch stands beside the binary operator with its scale s, and G is what arrives at its output.
    """
    scale = weight_scale(layer.weight).double().unsqueeze(1)
    signs_w, signs_x = (torch.where(v < 0, -1.0, 1.0).double() for v in (layer.weight.detach(), x))
    main = (G @ (scale * signs_w)) * derivative(x)
    extra = G @ layer.around.aux[0].detach()
    size = eta * main.norm() / extra.norm()
    return main + size * extra, scale * (G.t() @ signs_x), size * (G.t() @ x)


def test_approx_sign_with_surge_has_the_gradient_of_the_closed_form():
    *found, layer, x, G = gradients(make_method("approx_sign+surge", "surge.eta=0.3"))
    for value, expected in zip(found, closed_form(layer, x, G, 0.3, triangle), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_the_closed_form_can_fail():
    *found, layer, x, G = gradients(make_method("approx_sign+surge", "surge.eta=0.3"))
    assert not torch.allclose(found[0], closed_form(layer, x, G, 0.3, box)[0], rtol=1e-2)
    assert not torch.allclose(found[0], closed_form(layer, x, G, 0.2, triangle)[0], rtol=1e-2)
    assert not torch.allclose(found[2], closed_form(layer, x, G, 0.3, box)[2], rtol=1e-2)


def test_a_sum_trains_every_kind_of_net():
    for kind in ("linear", "conv2d", "matmul", "bert"):
        net = make_net(kind, THREE)
        losses = train_steps(net, optimizer_of(net), range(20))
        assert losses[-1] < 0.5 * losses[0], kind


def test_a_sum_goes_by_the_order_of_execution_if_one_of_its_methods_does():
    assert (Stompp() + Surge()).in_order
    assert not (ApproxSign() + Surge()).in_order
