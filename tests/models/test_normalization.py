# SPDX-License-Identifier: Apache-2.0
"""The conversion of BatchNorm layers: what Fed-GN and its relatives rest on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedfusion_flwr.app.training import evaluate
from fedfusion_flwr.config import Normalization, RunConfig
from fedfusion_flwr.data import data_for
from fedfusion_flwr.models import ModelError, build_model, convert_normalization, model_for
from tests.models.training import IMAGE_MODELS, fit
from tests.support import assert_identical

SHAPE = (3, 16, 16)
SLOW = ((), pytest.mark.slow)


def built(name: str, normalization: Normalization, groups: int = 2) -> nn.Module:
    return build_model(name, SHAPE, 5, 0, normalization=normalization, groups=groups)


def images(count: int = 32) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("normalization", ["group", "layer"])
def test_converted_models_have_the_same_parameters_and_no_buffers(
    name: str, normalization: Normalization
) -> None:
    batch, converted = built(name, "batch"), built(name, normalization)
    assert not any(isinstance(m, _BatchNorm) for m in converted.modules())
    assert list(converted.buffers()) == []
    # Names, shapes and, as scales start at 1 and shifts at 0 in both, values bit for bit.
    assert_identical(dict(converted.named_parameters()), dict(batch.named_parameters()))
    norms = [m for m in converted.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == sum(isinstance(m, _BatchNorm) for m in batch.modules())
    assert {norm.num_groups for norm in norms} == {2 if normalization == "group" else 1}


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_without_normalization_all_other_weights_are_the_same(name: str) -> None:
    batch, converted = built(name, "batch"), built(name, "none")
    norms = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
    assert not any(isinstance(m, norms) for m in converted.modules())
    removed = tuple(f"{p}." for p, m in batch.named_modules() if isinstance(m, _BatchNorm))
    left = {key: v for key, v in batch.state_dict().items() if not key.startswith(removed)}
    assert_identical(converted.state_dict(), left)


def same_alone_and_together(model: nn.Module) -> bool:
    """Whether an image's logits ignore its batch and the mode; mode eval where there is dropout."""
    x = images()
    has_dropout = any(isinstance(m, nn.Dropout) for m in model.modules())
    with torch.no_grad():
        together = model.train(not has_dropout)(x)
        alone = torch.cat([model.eval()(row[None]) for row in x[:4]])
    return torch.allclose(together[:4], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW[n != "lenet"]) for n in IMAGE_MODELS])
@pytest.mark.parametrize("normalization", ["group", "layer", "none"])
def test_an_example_does_not_depend_on_its_batch(name: str, normalization: Normalization) -> None:
    assert same_alone_and_together(built(name, normalization))


@pytest.mark.parametrize("name", ["lenet", "resnet18", "densenet121"])
def test_with_batch_normalization_it_does(name: str) -> None:
    """The negative control of the test above."""
    assert not same_alone_and_together(built(name, "batch"))


@pytest.mark.parametrize(("normalization", "channels"), [("group", 8), ("layer", 16)])
def test_scaling_a_groups_input_changes_nothing(
    normalization: Normalization, channels: int
) -> None:
    """LeNet's first layer of 16 channels: two groups of 8, or one of 16."""
    norm = built("lenet", normalization).get_submodule("features.0.1")
    x = torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    scaled = x.clone()
    scaled[:, :channels] *= 7.5
    torch.testing.assert_close(norm(scaled), norm(x), rtol=1e-4, atol=1e-4)
    scaled[:, : channels // 2] *= 7.5
    assert not torch.allclose(norm(scaled), norm(x), rtol=1e-2, atol=1e-2)


def test_layer_normalizes_over_channels_and_pixels() -> None:
    norm = built("lenet", "layer").get_submodule("features.0.1")
    out = norm(5 + 3 * torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert out.mean((1, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert out.std((1, 2, 3), correction=0).tolist() == pytest.approx([1, 1], abs=1e-4)


class Odd(nn.Module):
    """BatchNorm with settings of its own, one layer used twice, one without affine parameters."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.BatchNorm2d(4, eps=1e-2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), shared), nn.ModuleDict()])
        self.again = shared
        self.plain = nn.BatchNorm1d(4, affine=False)


def test_settings_sharing_and_depth_are_kept_without_random_numbers() -> None:
    model, state = Odd(), torch.get_rng_state()
    convert_normalization(model, "group", 2)
    assert torch.equal(torch.get_rng_state(), state)
    first, again, plain = model.get_submodule("blocks.0.1"), model.again, model.plain
    assert first is again
    assert isinstance(again, nn.GroupNorm)
    assert isinstance(plain, nn.GroupNorm)
    assert (again.eps, again.affine, plain.affine) == (1e-2, True, False)
    assert plain.eps == 1e-5


def test_groups_that_do_not_divide_name_the_layer() -> None:
    with pytest.raises(ModelError, match=r"'features\.0\.1' has 16 channels, which 3 does not"):
        built("lenet", "group", 3)


@pytest.mark.parametrize(("normalization", "features"), [("group", 2), ("layer", 1)])
def test_groups_of_one_feature_are_refused(normalization: Normalization, features: int) -> None:
    """GroupNorm of (N, C) with one feature a group always returns the shift."""
    model = nn.Sequential(nn.Linear(3, features), nn.BatchNorm1d(features))
    with pytest.raises(ModelError, match=r"'1' has . features in . normalization groups"):
        convert_normalization(model, normalization, 2)


def test_run_config_decides() -> None:
    config = RunConfig(normalization="group", normalization_groups=4)
    norm = model_for(config, data_for(config)).get_submodule("features.0.1")
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == 4


@pytest.mark.parametrize("normalization", ["group", "layer", "none"])
def test_lenet_learns_with_every_normalization(normalization: Normalization) -> None:
    model = built("lenet", normalization)
    x, y = images(), torch.arange(32) % 5
    before, _ = evaluate(model, x, y)
    fit(model, x, y, epochs=15, batch_size=8, learning_rate=0.02)
    after, accuracy = evaluate(model, x, y)
    assert after < 0.5 * before
    assert accuracy > 0.8
