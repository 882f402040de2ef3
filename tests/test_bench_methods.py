"""The comparisons of methods: the same seeds, data and budget for every arm, and figures that come from the runs."""

import gzip
import json
from pathlib import Path

import bench_methods as bench
import pytest
import stompp_order
import torch
from fsg_comparison import fsg_summary
from method_training import Training, interval
from small_nets import digits, fashion_mnist, float_ends, plain_mlp, resnet
from stompp_order import ORDERS, Arm, Net, order_table, run_arm

from hf_bnn import binarize_
from hf_bnn.methods import STE, Stompp
from hf_bnn.nn.layers import binary_layers

SHORT = Training(steps=12, batch=32, lr=0.05)


def test_stompp_order_prints_the_table_and_goes_on_from_its_json(tmp_path: Path, capsys):
    output = tmp_path / "order.json"
    command = ["stompp-order", "--steps", "3", "--batch", "32", "--nets", "plain, 6 layers", "--output", str(output)]
    bench.main([*command, "--seeds", "0"])
    first = json.loads(output.read_text(encoding="utf-8"))
    assert {row["arm"] for row in first["rows"]} == set(ORDERS)
    assert {"cpu", "torch", "threads", "command", "steps", "lr", "batch", "data"} <= set(first["environment"])
    bench.main([*command, "--seeds", "0", "1"])
    second = json.loads(output.read_text(encoding="utf-8"))
    assert second["rows"][: len(first["rows"])] == first["rows"]
    assert [row["seed"] for row in second["rows"]] == [0] * len(ORDERS) + [1] * len(ORDERS)
    printed = capsys.readouterr().out
    assert "| *forward* minus *reverse* |" in printed
    assert printed.count("seed 0") == len(ORDERS)  # not run a second time


def test_going_on_with_other_settings_is_refused(tmp_path: Path):
    output = tmp_path / "order.json"
    command = ["stompp-order", "--batch", "32", "--nets", "plain, 6 layers", "--seeds", "0", "--output", str(output)]
    bench.main([*command, "--steps", "2"])
    with pytest.raises(SystemExit, match=r"was made with .*'steps': 2.*, not with .*'steps': 3.*name another --output"):
        bench.main([*command, "--steps", "3"])


def test_fsg_prints_the_paired_interval_and_the_cost(tmp_path: Path, capsys):
    output = tmp_path / "fsg.json"
    bench.main(["fsg", "--steps", "4", "--batch", "32", "--seeds", "0", "1", "--rounds", "2", "--output", str(output)])
    result = json.loads(output.read_text(encoding="utf-8"))
    assert [set(row) for row in result["rows"]] == [{"seed", "float", "unrefined", "ste", "fsg"}] * 2
    assert result["cost"]["ratio_q1"] <= result["cost"]["ratio"] <= result["cost"]["ratio_q3"]
    assert result["summary"] in capsys.readouterr().out
    assert "over 2 paired seeds" in result["summary"]


def test_a_run_repeats_itself_and_the_seed_changes_it():
    data, net = digits(), Net(lambda pixels: plain_mlp(2, 16, pixels), "both", {})
    found = [run_arm(net, Arm(Stompp()), data, SHORT, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_all_arms_see_the_same_batches_and_start_from_the_same_weights(monkeypatch):
    seen = {}

    def note(model, method, data, training, seed):
        seen[method.name] = [p.detach().clone() for p in model.parameters()]

    monkeypatch.setattr(stompp_order, "train", note)
    net = Net(lambda pixels: plain_mlp(2, 16, pixels), "both", {})
    for method in (STE(), Stompp()):
        run_arm(net, Arm(method), digits(), SHORT, 0)
    assert all(torch.equal(a, b) for a, b in zip(seen["ste"], seen["stompp"], strict=True))


def test_the_interval_is_students():
    # By hand: mean 2, standard deviation 1, t(0.975, 2) = 4.3027: 4.3027 / sqrt(3) = 2.4841.
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, -0.4841, 4.4841), abs=1e-4)
    assert interval([1.0]) == (1.0, float("-inf"), float("inf"))


def test_a_mean_over_fewer_seeds_than_the_others_says_so():
    rows = [{"net": "plain, 6 layers", "arm": "ste", "seed": seed, "accuracy": 80.0 + seed} for seed in range(3)]
    rows += [{**row, "arm": "ste, scaled"} for row in rows[:2]]
    table = order_table(rows).splitlines()
    assert "| ste | 81.0 ± 1.0 |" in table
    assert "| ste, scaled | 80.5 ± 0.7 (2 of 3 seeds) |" in table


def test_only_the_chosen_arms_are_run(tmp_path: Path):
    output = tmp_path / "order.json"
    command = ["stompp-order", "--steps", "2", "--batch", "32", "--seeds", "0", "--output", str(output)]
    bench.main([*command, "--nets", "plain, 6 layers", "--arms", "ste", "forward + ste, scaled"])
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [row["arm"] for row in rows] == ["ste", "forward + ste, scaled"]
    assert all(row["cpu"] for row in rows)


def test_non_inferiority_needs_the_whole_interval_above_the_margin():
    rows = [{"fsg": 80.0 + d, "ste": 80.0} for d in (-0.2, 0.0, 0.2, 0.1)]
    assert "non-inferior at a margin of 1.0" in fsg_summary(rows, 1.0)
    assert "not shown to be non-inferior" in fsg_summary(rows, 0.1)


def test_the_first_last_and_downsampling_layers_stay_float():
    model = resnet(3, 16, relu=True)
    binarize_(model, STE(), float_ends(model), "weights")
    assert len(binary_layers(model)) == 18  # of the 20 layers of ResNet-20
    assert sum(layer.weight.numel() for layer in binary_layers(model)) == 267_264
    mlp = plain_mlp(6, 16, 64)
    assert len(binary_layers(binarize_(mlp, STE(), float_ends(mlp)))) == 6


def test_fashion_mnist_is_read_from_idx_files_gzipped_or_not(tmp_path: Path):
    images, labels = torch.arange(2 * 28 * 28).remainder(251).to(torch.uint8), torch.tensor([3, 7], dtype=torch.uint8)
    names = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    for name in names:
        header, values = (bytes([0, 0, 8, 3]), images) if "images" in name else (bytes([0, 0, 8, 1]), labels)
        sizes = b"".join(n.to_bytes(4, "big") for n in ((2, 28, 28) if "images" in name else (2,)))
        content = header + sizes + values.numpy().tobytes()
        if "train" in name:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / name).write_bytes(content)
    data = fashion_mnist(tmp_path)
    assert data.train_x.shape == (2, 1, 14, 14)
    assert torch.equal(data.train_x, data.test_x)
    assert data.train_y.tolist() == data.test_y.tolist() == [3, 7]
    assert abs(data.train_x.mean()) < 1e-5
    corner = images.view(2, 28, 28)[0, :2, :2].float().mean()
    other = images.view(2, 28, 28)[1, :2, :2].float().mean()
    std = torch.nn.functional.avg_pool2d(images.view(2, 1, 28, 28).float(), 2).std()
    torch.testing.assert_close(data.train_x[1, 0, 0, 0] - data.train_x[0, 0, 0, 0], (other - corner) / std)


def test_a_missing_idx_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no train-images-idx3-ubyte or train-images-idx3-ubyte\.gz"):
        fashion_mnist(tmp_path)
