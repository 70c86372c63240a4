# SPDX-License-Identifier: Apache-2.0
"""The model registry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedfusion_flwr.models import LeNet, ModelError, build_model
from tests.models.training import IMAGE_MODELS
from tests.support import assert_identical


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize(
    ("input_shape", "num_classes"), [((1, 28, 28), 10), ((3, 32, 32), 7), ((2, 8, 11), 2)]
)
def test_logits(name: str, input_shape: tuple[int, int, int], num_classes: int) -> None:
    model = build_model(name, input_shape, num_classes, seed=0)
    logits = model(torch.randn(2, *input_shape))
    assert logits.shape == (2, num_classes)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_the_seed_alone_decides_the_weights(name: str) -> None:
    """And the global random state is neither used nor changed."""
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = build_model(name, (1, 28, 28), 10, 1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = (build_model(name, (1, 28, 28), 10, seed).state_dict() for seed in (1, 2))
    assert_identical(first, again)
    weights = [key for key in first if first[key].dim() > 1]
    assert weights
    assert all(not torch.equal(first[key], other[key]) for key in weights)


def test_lenet_layers() -> None:
    model = build_model("lenet", (1, 28, 28), 10, seed=0)
    assert isinstance(model, LeNet)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert sum(norm.num_features for norm in norms) == 48
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))
    # 1*16*25 + 16*32*25 convolutions, 2*48 norms, (32*7*7)*60 + 60 and 60*10 + 10 head
    assert sum(p.numel() for p in model.parameters()) == 400 + 12800 + 96 + 94140 + 610


STAGES = {
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "densenet121": [f"features.denseblock{n}" for n in (1, 2, 3, 4)],
    # The stem and the last blocks of 24, 32, 64 and 160 channels.
    "mobilenetv2": [f"features.{n}" for n in (0, 3, 6, 10, 16)],
}


@pytest.mark.parametrize(
    ("name", "pixels", "sizes"),
    [
        ("resnet18", 32, [32, 16, 8, 4]),
        ("resnet18", 28, [28, 14, 7, 4]),
        ("densenet121", 32, [32, 16, 8, 4]),
        ("densenet121", 28, [28, 14, 7, 3]),
        ("mobilenetv2", 32, [32, 32, 16, 8, 4]),
        ("mobilenetv2", 28, [28, 28, 14, 7, 4]),
        ("mobilenetv2", 8, [8, 8, 4, 2, 1]),
    ],
)
def test_small_images_keep_their_size(name: str, pixels: int, sizes: list[int]) -> None:
    """Height and width after each stage, as the table in `small_image` says."""
    model = build_model(name, (1, pixels, pixels), 10, seed=0).eval()
    shapes: list[tuple[int, ...]] = []
    for stage in STAGES[name]:
        model.get_submodule(stage).register_forward_hook(
            lambda _module, _args, output: shapes.append(tuple(output.shape[2:]))
        )
    model(torch.randn(1, 1, pixels, pixels))
    assert shapes == [(size, size) for size in sizes]


@pytest.mark.parametrize(
    ("name", "stem", "std"),
    [
        # fan out: 64 * 9 weights a channel reach; fan in: 3 * 9; gain sqrt(2)
        ("resnet18", "conv1", math.sqrt(2 / (64 * 9))),
        ("densenet121", "features.conv0", math.sqrt(2 / (3 * 9))),
        ("mobilenetv2", "features.0.0", math.sqrt(2 / (32 * 9))),
    ],
)
def test_stems_are_initialized_as_torchvision_does(name: str, stem: str, std: float) -> None:
    weight = build_model(name, (3, 32, 32), 10, seed=0).get_parameter(f"{stem}.weight")
    assert weight.shape[1:] == (3, 3, 3)
    assert float(weight.detach().std()) == pytest.approx(std, rel=0.1)
    assert abs(float(weight.detach().mean())) < 0.1 * std


@pytest.mark.parametrize(
    ("name", "shape", "classes", "sentence"),
    [
        ("lenet5", (1, 28, 28), 10, "`model` is 'lenet5'; known models: .*lenet.*resnet18"),
        ("lenet", (1, 28, 28), 0, "at least one class, got 0"),
        ("bilstm", (1, 28, 28), 10, "`model` 'bilstm' takes texts, but `dataset` holds images"),
        ("lenet", (40,), 2, "`model` 'lenet' takes images, but `dataset` holds texts"),
        ("resnet18", (40,), 2, "`model` 'resnet18' takes images, but `dataset` holds texts"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, shape: tuple[int, ...], classes: int, sentence: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        build_model(name, shape, classes, seed=0, vocabulary_size=30)


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("input_shape", [(1, 7, 28), (1, 28, 7), (0, 28, 28)])
def test_unfit_images_are_refused(name: str, input_shape: tuple[int, int, int]) -> None:
    with pytest.raises(ModelError, match="at least 8x8 pixels"):
        build_model(name, input_shape, 10, seed=0)
