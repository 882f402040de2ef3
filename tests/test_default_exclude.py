"""The layers of a stock model that stay float by default: the first one of an image model, and the head."""

import pytest
from transformers import ResNetConfig, ResNetForImageClassification

from hf_bnn.selection import default_exclude

STEM, HEAD = "resnet.embedder.embedder.convolution", "classifier.1"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_layer_that_reads_the_image_and_the_head_stay_float(channels: int):
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_channels=channels, **sizes))
    excluded = default_exclude(model)
    inner = [name for name in excluded if name not in (STEM, HEAD)]
    assert {STEM, HEAD} <= set(excluded)
    # of four channels, like an image here: nobody can tell these from a stem
    four = [name for name, module in model.named_modules() if getattr(module, "in_channels", 0) == 4 and name != STEM]
    assert sorted(inner) == (sorted(four) if channels == 4 else [])
