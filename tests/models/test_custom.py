# SPDX-License-Identifier: Apache-2.0
"""The user's own models, from a module file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import data_for
from fedfusion_flwr.models import ModelError, build_model, model_for
from tests.support import assert_identical

MODULE = "nets_of_this_test"
SOURCE = """
import torch
from torch import nn

def small(shape):
    pixels = shape.image[0] * shape.image[1] * shape.image[2]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 6), nn.BatchNorm1d(6), nn.Linear(6, shape.num_classes)
    )

def embedded(shape):
    return nn.Sequential(
        nn.Embedding(shape.vocabulary_size, 4), nn.Flatten(), nn.Linear(20, shape.num_classes)
    )

def lazy(shape, more=0):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(shape.num_classes + more))

def text(shape):
    return "a model"

def broken(shape):
    raise KeyError("no such width")

def wide(shape):
    return lazy(shape, more=1)

def pair(shape):
    class Pair(nn.Linear):
        def forward(self, x):
            return x, x
    return Pair(1, 1)

def colour(shape):
    return nn.Conv2d(3, 1, 3)
"""


@pytest.fixture(autouse=True)
def _nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


def build(function: str, **options: object) -> nn.Module:
    return build_model(f"{MODULE}:{function}", (1, 8, 8), 3, seed=0, **options)  # type: ignore[arg-type]


def test_the_function_gets_the_shape_and_its_model_is_ready_to_train() -> None:
    model = build("small")
    assert all(module.training for module in model.modules())
    assert model(torch.zeros(4, 1, 8, 8)).shape == (4, 3)
    texts = build_model(f"{MODULE}:embedded", (5,), 3, seed=0, vocabulary_size=30)
    assert texts(torch.zeros(4, 5, dtype=torch.int64)).shape == (4, 3)


@pytest.mark.parametrize("function", ["small", "lazy"])
def test_the_seed_decides_its_weights(function: str) -> None:
    state = torch.get_rng_state()
    first, again = (build(function).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert_identical(first, again)


def test_its_normalization_is_converted_too() -> None:
    assert isinstance(build("small", normalization="group", groups=3)[2], nn.GroupNorm)  # type: ignore[index]
    with pytest.raises(ModelError, match="'2' has 6 channels, which 4 does not divide"):
        build("small", normalization="group", groups=4)


def test_the_run_config_names_it() -> None:
    config = RunConfig(model=f"{MODULE}:small")
    model = model_for(config, data_for(config))
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("missing", r"`model` is .*nets_of_this_test\.py has no 'missing'\."),
        ("text", r"must return a torch\.nn\.Module, but it returned str\."),
        ("broken", r"fails for DataShape.* with KeyError: 'no such width'\."),
        ("wide", r"must give logits of shape \(2, 3\) for .*, but it gave \(2, 4\)\."),
        ("pair", "but it gave tuple"),
        ("colour", r"must take examples of shape \(2, 1, 8, 8\) and type torch\.float32"),
    ],
)
def test_what_is_wrong_with_it_is_one_sentence(function: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence) as refusal:
        build(function)
    assert "\n" not in str(refusal.value)
