"""The slow net's block against transformers' Mamba, and what the nets around it must be sensitive to."""

import pytest
import torch
from torch import nn
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from hf_bnn.methods.fsg.nets import BLOCKS, FastNet, Recurrence, SelectiveScan, SlowNet

# d_model, d_state, d_conv, expand, time
SIZES = [(8, 4, 4, 2, 6), (20, 3, 2, 1, 9), (8, 1, 4, 2, 2), (8, 4, 4, 2, 1)]


def mixer_like(block: SelectiveScan, d_model: int, d_state: int, d_conv: int, expand: int) -> MambaMixer:
    """transformers' block with the parameters of ours."""
    config = MambaConfig(hidden_size=d_model, state_size=d_state, conv_kernel=d_conv, expand=expand, use_bias=False)
    mixer = MambaMixer(config, layer_idx=0)
    mixer.load_state_dict(block.state_dict())
    return mixer


@pytest.mark.parametrize(("d_model", "d_state", "d_conv", "expand", "time"), SIZES)
def test_the_block_equals_mamba_in_values_and_gradients(d_model, d_state, d_conv, expand, time):
    block = SelectiveScan(d_model, d_state, d_conv, expand)
    mixer = mixer_like(block, d_model, d_state, d_conv, expand)
    u = torch.randn(7, time, d_model, requires_grad=True)
    v = u.detach().clone().requires_grad_()
    weight = torch.randn(7, time, d_model)
    expected, found = mixer(v), block(u)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    torch.testing.assert_close(u.grad, v.grad, rtol=1e-4, atol=1e-5)
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, mixer.get_parameter(name).grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("d_model", "d_state", "d_conv", "expand", "time"), SIZES)
def test_the_last_output_alone_equals_mamba_in_values_and_gradients(d_model, d_state, d_conv, expand, time):
    block = SelectiveScan(d_model, d_state, d_conv, expand)
    mixer = mixer_like(block, d_model, d_state, d_conv, expand)
    u = torch.randn(7, time, d_model, requires_grad=True)
    v = u.detach().clone().requires_grad_()
    weight = torch.randn(7, d_model)
    expected, found = mixer(v)[:, -1], block(u, last_only=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    torch.testing.assert_close(u.grad, v.grad, rtol=1e-4, atol=1e-5)
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, mixer.get_parameter(name).grad, rtol=1e-4, atol=1e-5, msg=name)


def test_what_comes_out_depends_on_no_later_token():
    block = SelectiveScan(8)
    u = torch.randn(3, 6, 8)
    changed = u.clone()
    changed[:, 4:] = torch.randn(3, 2, 8)
    before, after = block(u), block(changed)
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=1e-6)
    assert (after[:, 4:] - before[:, 4:]).abs().amax((0, 2)).min() > 1e-3


def test_steps_of_time_start_within_their_bounds():
    block = SelectiveScan(64, dt_min=0.2, dt_max=0.5)
    dt = nn.functional.softplus(block.dt_proj.bias)
    assert 0.2 - 1e-6 < dt.min() < 0.25
    assert 0.45 < dt.max() < 0.5 + 1e-6


def test_the_recurrence_is_an_lstm():
    block = Recurrence(8, 4, 4, 2)
    lstm = nn.LSTM(8, 8, batch_first=True)
    lstm.load_state_dict(block.state_dict())
    u = torch.randn(5, 6, 8)
    assert torch.equal(block(u, last_only=True), lstm(u)[0][:, -1])


# The slow net


def slow_net(block: str, chunk: int = 16) -> SlowNet:
    return SlowNet(BLOCKS[block](8, 4, 4, 2), layers=3, chunk=chunk, d_model=8)


def relative_change(net: SlowNet, after: torch.Tensor, before: torch.Tensor) -> float:
    """As a share of what the slow net puts out beside its constant bias."""
    return ((after - before).norm() / (before.view(-1, net.chunk) - net.out.bias).norm()).item()


@pytest.mark.parametrize("block", BLOCKS)
def test_every_older_gradient_and_the_embedding_change_the_slow_gradient(block: str):
    net = slow_net(block)
    gradients = torch.randn(5, 160)
    before = net(gradients, 1)
    for step in range(5):
        changed = gradients.clone()
        changed[step] = torch.randn(160)
        assert relative_change(net, net(changed, 1), before) > 0.01, step
    assert relative_change(net, net(gradients, 2), before) > 0.01


@pytest.mark.parametrize("block", BLOCKS)
def test_a_chunk_is_judged_by_itself(block: str):
    net = slow_net(block)
    gradients = torch.randn(5, 160)
    before = net(gradients, 0)
    gradients[:, 32:48] += 1
    changed = (net(gradients, 0) - before).abs() > 1e-5
    assert changed.view(10, 16).any(1).tolist() == [i == 2 for i in range(10)]


@pytest.mark.parametrize("block", BLOCKS)
def test_weights_that_do_not_fill_a_chunk_are_padded_with_zeros(block: str):
    net = slow_net(block)
    gradients = torch.randn(5, 37)
    whole = net(nn.functional.pad(gradients, (0, 11)), 0)
    assert net(gradients, 0).shape == (37,)
    torch.testing.assert_close(net(gradients, 0), whole[:37])


def test_the_fast_net_sees_each_weight_by_itself():
    net = FastNet(32)
    value = torch.randn(50)
    expected = torch.stack([net(value[i : i + 1])[0] for i in range(50)])
    torch.testing.assert_close(net(value), expected)
    assert net(value).std() > 1e-3
