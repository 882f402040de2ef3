"""Binary ResNet: blocks against their formulas, checkpoints of every kind, the CIFAR networks, and what signs see."""

import copy
import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import Net, optimizer_of, tiny_images, train_steps
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

from hf_bnn import (
    BinaryResNetBackbone,
    BinaryResNetConfig,
    BinaryResNetForImageClassification,
    BinaryResNetModel,
    BinaryTrainer,
    BinaryTrainingArguments,
    binarize_,
    pack_,
    summary,
)
from hf_bnn.models.resnet import BiRealBasicLayer, BiRealBottleNeckLayer, PadShortCut, resized
from hf_bnn.nn.activations import RPReLU
from hf_bnn.nn.layers import BinaryConv2d, binary_layers
from hf_bnn.nn.levels import ElasticLevels, SignedLevels, ThresholdLevels
from hf_bnn.training.checked_trainer import CheckedTrainer

SIZES = {
    "basic": {"layer_type": "basic", "hidden_sizes": [8, 16], "depths": [2, 1]},
    "bottleneck": {"layer_type": "bottleneck", "hidden_sizes": [32, 64], "depths": [2, 1]},
}
VARIANTS = [
    {},
    {"levels": "rsign", "block_activation": "rprelu"},
    {"levels": "elastic"},
    {"binarize": "weights"},
    {"binarize": "activations"},
    {"weight_scaling": "layer"},
    {"skip": ["*embedder.embedder*", "classifier*"]},
    {"downsample_in_bottleneck": True},
    {"downsample_in_first_stage": True},
]
every_type = pytest.mark.parametrize("layer_type", SIZES)


def sizes(layer_type: str, **kwargs) -> dict:
    return {**SIZES[layer_type], "embedding_size": 8, "num_labels": 3, **kwargs}


def binary(layer_type: str = "basic", **kwargs) -> BinaryResNetForImageClassification:
    return BinaryResNetForImageClassification(BinaryResNetConfig(**sizes(layer_type, **kwargs)))


def images(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(4, channels, size, size)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x).logits


def settle(model: nn.Module) -> nn.Module:
    """Give normalizations and classifier other values than they start with."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


@every_type
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_float_latent_and_packed_checkpoints_come_through_the_same_call(tmp_path, layer_type, variant):
    geometry = {key: value for key, value in variant.items() if key.startswith("downsample")}
    stored = settle(ResNetForImageClassification(ResNetConfig(**sizes(layer_type, **geometry))))
    stored.save_pretrained(tmp_path / "float")
    latent = BinaryResNetForImageClassification.from_pretrained(tmp_path / "float", **variant)
    found = latent.state_dict()
    assert all(torch.equal(found[key], value) for key, value in stored.state_dict().items())
    x = images()
    expected = logits(latent, x)
    latent.save_pretrained(tmp_path / "latent")
    assert torch.equal(logits(BinaryResNetForImageClassification.from_pretrained(tmp_path / "latent"), x), expected)
    if variant.get("binarize") == "activations":
        return
    pack_(latent)
    assert torch.equal(logits(latent, x), expected)
    latent.save_pretrained(tmp_path / "packed")
    for auto in (AutoModelForImageClassification, BinaryResNetForImageClassification):
        packed = auto.from_pretrained(tmp_path / "packed")
        assert torch.equal(logits(packed, x), expected)
        assert packed.state_dict().keys() == latent.state_dict().keys()


# The configs of the checkpoints that stand on the Hub: (depths, layer_type, downsample_in_bottleneck).
HUB = {
    "resnet-18": ([2, 2, 2, 2], "basic", False),
    "resnet-26": ([2, 2, 2, 2], "bottleneck", False),
    "resnet-34": ([3, 4, 6, 3], "basic", False),
    "resnet-50": ([3, 4, 6, 3], "bottleneck", False),
    "resnet-50 v1": ([3, 4, 6, 3], "bottleneck", True),
    "resnet-101": ([3, 4, 23, 3], "bottleneck", False),
    "resnet-152": ([3, 8, 36, 3], "bottleneck", False),
}


@pytest.mark.parametrize("name", HUB)
def test_every_hub_checkpoints_keys_and_shapes_are_the_binary_models(name):
    depths, layer_type, early = HUB[name]
    hidden = [64, 128, 256, 512] if layer_type == "basic" else [256, 512, 1024, 2048]
    config = {"depths": depths, "layer_type": layer_type, "hidden_sizes": hidden, "downsample_in_bottleneck": early}
    with torch.device("meta"):
        stored = ResNetForImageClassification(ResNetConfig(**config)).state_dict()
        model = BinaryResNetForImageClassification(BinaryResNetConfig(**config))
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in stored.items()}
    per_block = 2 if layer_type == "basic" else 3
    assert len(binary_layers(model)) == per_block * sum(depths)


def test_a_basic_block_has_a_shortcut_around_every_convolution():
    block = settle(binary()).eval().resnet.encoder.stages[1].layers[0]
    assert isinstance(block, BiRealBasicLayer)
    x = torch.randn(2, 8, 6, 6)

    def conv_bn(unit: nn.Module, x: Tensor, stride: int) -> Tensor:
        weight = unit.convolution.weight
        scale = weight.abs().mean((1, 2, 3), keepdim=True)
        signs = torch.where(x < 0, -1.0, 1.0)
        return unit.normalization(F.conv2d(signs, torch.where(weight < 0, -1.0, 1.0) * scale, None, stride, 1))

    with torch.no_grad():
        once = conv_bn(block.layer[0], x, 2) + block.shortcut(x)
        twice = conv_bn(block.layer[1], once, 1) + once
        torch.testing.assert_close(block(x), twice)


@pytest.mark.parametrize("early", [False, True])
def test_a_bottleneck_resizes_what_goes_around_its_first_two_convolutions(early):
    model = settle(binary("bottleneck", downsample_in_bottleneck=early, block_activation="rprelu")).eval()
    block = model.resnet.encoder.stages[1].layers[0]
    assert isinstance(block, BiRealBottleNeckLayer)
    x = torch.randn(2, 32, 6, 6)
    with torch.no_grad():
        units = [lambda x, u=unit: u.normalization(u.convolution(x)) for unit in block.layer]
        halved = F.avg_pool2d(x, 2) if early else x
        narrow = block.layer[0].activation(units[0](x) + halved.unflatten(1, (16, 2)).mean(2))
        halved = narrow if early else F.avg_pool2d(narrow, 2)
        narrow = block.layer[1].activation(units[1](narrow) + halved)
        expected = block.layer[2].activation(units[2](narrow) + block.shortcut(x))
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (8, 4), (4, 8)])
def test_what_goes_around_a_convolution_is_its_input_averaged_or_repeated(inputs, outputs):
    x, conv = torch.randn(2, inputs, 7, 5), nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
    around = resized(x, conv)
    assert around.shape == conv(x).shape
    pooled = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(around.mean(1), pooled.mean(1))


def test_channels_that_divide_unevenly_go_around_in_groups_that_overlap():
    x, conv = torch.arange(6.0).view(1, 6, 1, 1), nn.Conv2d(6, 4, 1)
    assert resized(x, conv).flatten().tolist() == [0.5, 1.5, 3.5, 4.5]


def test_rprelu_is_its_formula():
    module = RPReLU(2)
    with torch.no_grad():
        module.shift.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1))
        module.slope.copy_(torch.tensor([0.5, 2.0]))
        module.offset.copy_(torch.tensor([10.0, 20.0]).view(2, 1, 1))
    x = torch.tensor([0.0, 3.0]).view(1, 1, 1, 2).expand(1, 2, 1, 2)
    assert module(x).flatten().tolist() == [10 - 0.5, 12.0, 21.0, 24.0]


def test_rsign_decides_at_a_learned_threshold_per_channel():
    model = binary(levels="rsign")
    layer = model.resnet.encoder.stages[0].layers[0].layer[0].convolution
    assert isinstance(layer.input_levels, ThresholdLevels)
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        layer.input_levels.offset.copy_(torch.linspace(-1, 1, 8).view(8, 1, 1))
        shifted = layer.eval()(x)
        layer.input_levels.offset.zero_()
        assert torch.equal(layer(x - torch.linspace(-1, 1, 8).view(8, 1, 1)), shifted)
    model.train()(images(), labels=torch.zeros(4, dtype=torch.long)).loss.backward()
    assert layer.input_levels.offset.grad.abs().sum() > 0


def test_levels_and_activations_that_a_float_checkpoint_lacks_start_at_their_values(tmp_path):
    ResNetForImageClassification(ResNetConfig(**sizes("basic"))).save_pretrained(tmp_path)
    structure = {"levels": "rsign", "block_activation": "rprelu"}
    model, info = BinaryResNetForImageClassification.from_pretrained(tmp_path, output_loading_info=True, **structure)
    assert not info["missing_keys"]
    own = [m for m in model.modules() if isinstance(m, ThresholdLevels | RPReLU)]
    assert len(own) == 12
    for module in own:
        expected = type(module)(module.offset.shape[0]).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())


# What the binary convolutions see


def shares_of_high(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of every binary convolution, the share of its inputs that are at least 0."""
    shares = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: shares.update({name: inputs[0].ge(0).float().mean()})
        )
        for name, module in model.named_modules()
        if isinstance(module, BinaryConv2d)
    ]
    with torch.no_grad():
        model.train()(x)
    for hook in hooks:
        hook.remove()
    return shares


@every_type
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_no_binary_convolution_sees_a_constant_sign(layer_type, stem):
    shares = shares_of_high(binary(layer_type, stem=stem), images(64))
    assert len(shares) == (6 if layer_type == "basic" else 9)
    assert all(0.05 < share < 0.95 for share in shares.values()), shares


@every_type
def test_swapping_convolutions_alone_would_give_every_one_of_them_a_constant_sign(layer_type):
    model = ResNetForImageClassification(ResNetConfig(**sizes(layer_type)))
    binarize_(model, skip=("*embedder*", "*shortcut*", "classifier*"))
    assert all(share == 1 for share in shares_of_high(model, images(64)).values())


def test_residual_blocks_with_binary_inputs_are_refused():
    with pytest.raises(ValueError, match="block='residual' with binarize='both': every convolution would read a ReLU"):
        BinaryResNetConfig(block="residual")


def test_a_linear_network_is_refused():
    with pytest.raises(
        ValueError, match=r"block='bireal' with binarize='none' and block_activation='none': .* be linear"
    ):
        BinaryResNetConfig(block="bireal", binarize="none")


def test_images_of_other_channels_than_the_configs_are_refused():
    with pytest.raises(ValueError, match="pixel_values has 1 channels: the config's num_channels is 3"):
        binary()(images(32, channels=1))


# CIFAR networks


class PaperResNet(nn.Module):
    """ResNet-(6n + 2) for CIFAR as arXiv 1512.03385, section 4.2, has it, under the names that its many ports use."""

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
            self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
            self.stride, self.new = stride, after - before

        def forward(self, x: Tensor) -> Tensor:
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            zeros = self.new // 2
            return F.relu(out + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, zeros, zeros)))

    def __init__(self, n: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (before, after) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
            blocks = [
                self.Block(before, after, 1 if stage == 1 else 2),
                *(self.Block(after, after, 1) for _ in range(n - 1)),
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def our_names(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A CIFAR checkpoint's tensors under transformers' names."""
    kinds = {"conv": "convolution", "bn": "normalization"}
    for key, value in state.items():
        name = re.sub(r"^conv1\.|^bn1\.", lambda m: f"resnet.embedder.embedder.{kinds[m[0][:-2]]}.", key)
        name = re.sub(
            r"^layer(\d)\.(\d+)\.(conv|bn)(\d)",
            lambda m: f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.layer.{int(m[4]) - 1}.{kinds[m[3]]}",
            name,
        )
        yield name.replace("linear.", "classifier.1."), value


def cifar_config(depth: int, **kwargs) -> BinaryResNetConfig:
    n = (depth - 2) // 6
    shape = {"layer_type": "basic", "embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [n, n, n]}
    return BinaryResNetConfig(stem="cifar", shortcut="pad", num_labels=10, **shape, **kwargs)


@pytest.mark.parametrize(
    ("depth", "weights"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_the_cifar_networks_have_as_many_weights_as_in_the_paper(depth, weights):
    model = BinaryResNetForImageClassification(cifar_config(depth))
    assert sum(p.numel() for p in model.parameters()) == weights
    assert len(binary_layers(model)) == depth - 2


def test_a_float_cifar_checkpoint_converts_and_keeps_its_logits(tmp_path):
    paper = settle(PaperResNet(3)).eval()
    model = BinaryResNetForImageClassification(cifar_config(20, binarize="none"))
    model.load_state_dict(dict(our_names(paper.state_dict())))
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(logits(model, x), paper(x))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(tmp_path), x), logits(model, x))
    latent = BinaryResNetForImageClassification.from_pretrained(tmp_path, binarize="both")
    assert len(binary_layers(latent)) == 18
    assert torch.equal(
        latent.resnet.encoder.stages[0].layers[0].layer[0].convolution.weight, paper.layer1[0].conv1.weight
    )


def test_the_cifar_stem_keeps_every_pixel_of_any_number_of_channels():
    model = binary(stem="cifar", shortcut="pad", num_channels=1)
    assert model.resnet.embedder(images(28, channels=1)).shape == (4, 8, 28, 28)
    assert isinstance(model.resnet.encoder.stages[1].layers[0].shortcut, PadShortCut)
    assert logits(model, images(28, channels=1)).shape == (4, 3)


# The model family


def test_first_activations_then_weights_as_two_steps(tmp_path):
    first = settle(binary(binarize="activations"))
    first.save_pretrained(tmp_path)
    both = BinaryResNetForImageClassification.from_pretrained(tmp_path, binarize="both")
    assert both.config.binarize == "both"
    assert all(torch.equal(value, both.state_dict()[key]) for key, value in first.state_dict().items())
    assert {layer.binarize for layer in binary_layers(both)} == {"both"}


def test_weights_only_keeps_transformers_blocks():
    model = binary(binarize="weights")
    assert not [m for m in model.modules() if isinstance(m, BiRealBasicLayer)]
    assert isinstance(model.resnet.embedder.embedder.activation, nn.ReLU)


def test_the_recipe_leaves_stem_shortcuts_and_classifier_float(tmp_path):
    config = BinaryResNetConfig(**sizes("basic"))
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is BinaryResNetConfig
    assert again.skip == ["*embedder.embedder*", "*.shortcut.*", "classifier*"]
    model = binary()
    kept = [
        n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and not isinstance(m, BinaryConv2d)
    ]
    assert kept == [
        "resnet.embedder.embedder.convolution",
        "resnet.encoder.stages.1.layers.0.shortcut.convolution",
        "classifier.1",
    ]


def test_levels_are_those_of_the_config():
    kinds = {"signed": SignedLevels, "rsign": ThresholdLevels, "elastic": ElasticLevels}
    for name, kind in kinds.items():
        assert {type(layer.input_levels) for layer in binary_layers(binary(levels=name))} == {kind}


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("stem", "imagenet, cifar"),
        ("shortcut", "conv, pad"),
        ("block", "None, bireal, residual"),
        ("block_activation", "none, rprelu"),
        ("levels", "signed, rsign, elastic"),
        ("binarize", "both, weights, activations, none"),
    ],
)
def test_a_wrong_choice_is_refused_with_the_right_ones(field, choices):
    with pytest.raises(ValueError, match=f"{field}='int3': expected one of {choices}"):
        BinaryResNetConfig(**{field: "int3"})


def test_another_architecture_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a 'bert' model: BinaryResNetConfig reads 'resnet' \(float\) and"):
        BinaryResNetForImageClassification.from_pretrained(tmp_path)


def test_backbone_and_base_model_load_from_a_classifier_and_pack(tmp_path):
    stored = settle(ResNetForImageClassification(ResNetConfig(**sizes("basic"))))
    stored.save_pretrained(tmp_path / "float")
    x = images()
    for cls, auto in ((BinaryResNetModel, AutoModel), (BinaryResNetBackbone, AutoBackbone)):
        model = cls.from_pretrained(tmp_path / "float").eval()
        key = "encoder.stages.0.layers.0.layer.0.convolution.weight"
        assert torch.equal(model.state_dict()[key], stored.state_dict()[f"resnet.{key}"])
        with torch.no_grad():
            expected = model(x)[0]
            pack_(model).save_pretrained(tmp_path / cls.__name__)
            config = AutoConfig.from_pretrained(tmp_path / cls.__name__)
            assert type(auto.from_config(config)) is cls  # AutoBackbone.from_pretrained reads from the Hub alone
            found = cls.from_pretrained(tmp_path / cls.__name__)
            expected, found = expected, found(x)[0]
        maps = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
        assert all(torch.equal(left, right) for left, right in maps)


def test_the_backbone_gives_the_feature_maps_asked_for():
    config = BinaryResNetConfig(**sizes("basic"), out_features=["stage1", "stage2"])
    maps = BinaryResNetBackbone(config).eval()(images()).feature_maps
    assert [m.shape[1:] for m in maps] == [(8, 8, 8), (16, 4, 4)]
    stock = ResNetBackbone(ResNetConfig(**sizes("basic"), out_features=["stage1", "stage2"])).eval()(images())
    assert [m.shape for m in maps] == [m.shape for m in stock.feature_maps]


@every_type
def test_bits_are_a_32nd_of_the_float_bytes_and_with_scales_close_to_it(layer_type):
    hidden = [64, 128] if layer_type == "basic" else [256, 512]
    model = binary(layer_type, hidden_sizes=hidden, embedding_size=64)
    counted = summary(model)
    assert counted.matrix_bytes_float == 32 * counted.matrix_bytes_bits
    assert summary(pack_(model)) == counted


def test_resnet_18_is_30_times_smaller_in_its_binary_matrices():
    hidden = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
    counted = summary(BinaryResNetForImageClassification(BinaryResNetConfig(**hidden)))
    assert counted.matrix_compression > 30


# Training


def decayed(trainer: Trainer) -> set[str]:
    """The names of the parameters that take weight decay."""
    optimizer = trainer.create_optimizer()
    taken = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    return {name for name, p in trainer.model.named_parameters() if id(p) in taken}


def test_batch_norm_and_latents_take_no_weight_decay(tmp_path):
    arguments = {"output_dir": tmp_path, "weight_decay": 0.1, "use_cpu": True, "report_to": "none"}
    model = binary(levels="rsign", block_activation="rprelu")
    assert decayed(BinaryTrainer(model, BinaryTrainingArguments(**arguments))) == {
        "resnet.embedder.embedder.convolution.weight",
        "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight",
        "classifier.1.weight",
    }
    stock = ResNetForImageClassification(ResNetConfig(**sizes("basic")))
    spared = decayed(CheckedTrainer(stock, TrainingArguments(**arguments)))
    convolutions = {name for name, m in stock.named_modules() if isinstance(m, nn.Conv2d)}
    assert spared == {f"{name}.weight" for name in (*convolutions, "classifier.1")}
    trap = decayed(Trainer(stock, TrainingArguments(**arguments)))
    assert "resnet.embedder.embedder.normalization.weight" in trap - spared


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_stock_peft_trains_float_adapters_on_packed_convolutions_and_nothing_else(tmp_path):
    packed = pack_(binary(stem="cifar"))
    before = copy.deepcopy(packed.state_dict())
    lora = LoraConfig(r=4, target_modules=["layer.0.convolution", "layer.1.convolution"])
    model = get_peft_model(packed, lora).train()
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(learned) == 12
    assert all("lora_" in name for name in learned)
    net = Net(model, tiny_images(12))
    losses = train_steps(net, optimizer_of(net, 0.05), range(15))
    assert losses[-1] < 0.5 * losses[0]
    after = model.get_base_model().state_dict()
    adapted = [key for key in before if ".layer." in key and key.endswith("convolution.weight")]
    assert len(adapted) == 6
    assert all(torch.equal(after[key.replace(".weight", ".base_layer.weight")], before[key]) for key in adapted)
    model.save_pretrained(tmp_path)
    x = images()
    expected = logits(model, x)
    fresh = pack_(binary(stem="cifar"))
    fresh.load_state_dict({**before, **{key: value for key, value in after.items() if "normalization" in key}})
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path), x), expected)
