# SPDX-License-Identifier: Apache-2.0
"""Every model, shape and normalization: builds, trains, travels and has its statistics."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from fedfusion_flwr import protocol
from fedfusion_flwr.app.training import evaluate
from fedfusion_flwr.computation import place_model
from fedfusion_flwr.config import Normalization
from fedfusion_flwr.fusion import NormalizationStatistics, StatisticsError
from fedfusion_flwr.models import build_model
from tests.models.training import IMAGE_MODELS, fit
from tests.support import assert_identical

CHANNELS = {
    # 16 + 32
    "lenet": (48, 16 + 32),
    # Stem 64; stages 4*64, 4*128 + 128, 4*256 + 256, 4*512 + 512 with their shortcuts.
    "resnet18": (4800, 64 + 512),
    # Stem 32, last 1280 and the blocks' expansions (twice) and outputs: the first 32 + 16; 24:
    # 2*96 + 24, 2*144 + 24; 32: 2*144 + 32, 2 of 2*192 + 32; 64: 2*192 + 64, 3 of 2*384 + 64; 96:
    # 2*384 + 96, 2 of 2*576 + 96; 160: 2*576 + 160, 2 of 2*960 + 160; 320: 2*960 + 320.
    "mobilenetv2": (17056, 32 + 1280),
    # 64; blocks of 6, 12, 24 and 16 layers from 64, 128, 256 and 512 channels: a layer normalizes
    # all before it and 128 of its own; transitions 256, 512, 1024; 1024 at the end.
    "densenet121": (41824, 64 + 1024),
}
SHAPES = [(1, 28, 28), (3, 32, 32), (1, 8, 8), (3, 17, 26)]
DEEP = ("mobilenetv2", "densenet121")
CASES = [
    pytest.param(
        *(name, shape, normalization),
        # Of deep models one case is tried by default; the others take minutes.
        marks=pytest.mark.slow
        if name in DEEP and (shape, normalization) != ((3, 32, 32), "batch")
        else (),
    )
    for name in IMAGE_MODELS
    for shape in SHAPES
    for normalization in get_args(Normalization)
]


def built(
    name: str, shape: tuple[int, int, int], normalization: Normalization = "batch"
) -> nn.Module:
    model = build_model(name, shape, 3, 0, normalization=normalization)
    return place_model(model, torch.device("cpu"))


def examples(shape: tuple[int, int, int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(count) % 3


@pytest.mark.parametrize(("name", "shape", "normalization"), CASES)
def test_one_round_of_one_client(
    name: str, shape: tuple[int, int, int], normalization: Normalization
) -> None:
    model = built(name, shape, normalization)
    # Of 8x8 pixels the last layers see one: two examples would be too few for their variance.
    x, y = examples(shape, 4)
    assert model(x).shape == (4, 3)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    fit(model, x, y)
    state = model.state_dict()
    assert {key for key in state if not torch.equal(state[key], start[key])}

    returned = protocol.state_from_record(protocol.record_from_state(state))
    assert_identical(returned, state)
    again = built(name, shape, normalization)
    again.load_state_dict(returned)
    assert_identical(again.state_dict(), state)
    counters = {value.dtype for key, value in returned.items() if key.endswith("_tracked")}
    assert counters == ({torch.int64} if normalization == "batch" else set())

    if normalization == "none":
        with pytest.raises(StatisticsError, match="no normalization layer"):
            NormalizationStatistics.probe(model, [x])
        return
    everything, ends = CHANNELS[name]
    probed = NormalizationStatistics.probe(model, [x])
    assert probed.vector().shape == (4 * everything,)
    assert probed.vector(log_std=True).isfinite().all()
    assert NormalizationStatistics.probe(model, [x], layers="ends").mean.shape == (ends,)
    if normalization == "batch":
        read = NormalizationStatistics.from_state_dict(state)
        assert read.mean.shape == (everything,)
        # Both list the layers in one order, so that either source means the same.
        assert torch.equal(read.scale, probed.scale)
        assert torch.equal(read.shift, probed.shift)


@pytest.mark.parametrize("name", sorted(CHANNELS))
def test_ends_are_the_first_and_the_last_layer_of_the_forward_pass(name: str) -> None:
    model = built(name, (1, 8, 8)).eval()
    order: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, _args, _out: order.append(m))
    x, _ = examples((1, 8, 8), 2)
    with torch.no_grad():
        model(x)
    # Each layer has its own scale.
    for number, layer in enumerate(order):
        nn.init.constant_(layer.weight, float(number))
    read = NormalizationStatistics.from_state_dict(model.state_dict(), layers="ends")
    assert set(read.scale.tolist()) == {0.0, float(len(order) - 1)}


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_every_model_lowers_the_loss(name: str) -> None:
    """Eight images by heart, a few steps."""
    model = built(name, (1, 8, 8))
    x, y = examples((1, 8, 8), 8)
    before, _ = evaluate(model.train(), x, y)
    assert fit(model, x, y, batch_size=8, epochs=12, learning_rate=0.02) < 0.6 * before
