# SPDX-License-Identifier: Apache-2.0
"""docs/models.md says what the code does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedfusion_flwr import protocol
from fedfusion_flwr.fusion import NormalizationStatistics
from fedfusion_flwr.models import MODELS, build_model

TEXT = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = {
    name: row
    for row in re.findall(r"^\| `[a-z0-9]+` \| [0-9].*$", TEXT, re.MULTILINE)
    for name in re.findall(r"^\| `(\w+)`", row)
}
STAGES = {
    "lenet": ["features.0.0", "features.1.0"],
    "resnet18": [f"layer{n}" for n in (1, 2, 3, 4)],
    "mobilenetv2": [f"features.{n}" for n in (0, 3, 6, 10, 16)],
    "densenet121": [f"features.denseblock{n}" for n in (1, 2, 3, 4)],
}


def sizes(model: nn.Module) -> tuple[int, float, int]:
    """Parameters, megabytes of a message, normalized channels."""
    state = model.state_dict()
    sent = sum(len(array.data) for array in protocol.record_from_state(state).values())
    channels = len(NormalizationStatistics.from_state_dict(state).mean)
    return sum(parameter.numel() for parameter in model.parameters()), sent / 1e6, channels


def feature_maps(name: str, pixels: int) -> str:
    model = build_model(name, (3, pixels, pixels), 10, seed=0).eval()
    sizes: list[str] = []
    for stage in STAGES[name]:
        model.get_submodule(stage).register_forward_hook(
            lambda _module, _args, output: sizes.append(str(output.shape[-1]))
        )
    with torch.no_grad():
        model(torch.zeros(1, 3, pixels, pixels))
    return ", ".join(sizes)


@pytest.mark.parametrize("name", [n for n, entry in MODELS.items() if entry.smallest_image])
def test_the_table_tells_what_is_built(name: str) -> None:
    parameters, megabytes, channels = sizes(build_model(name, (3, 32, 32), 10, seed=0))
    smallest = MODELS[name].smallest_image
    assert ROWS[name] == (
        f"| `{name}` | {parameters:,} | {megabytes:.2f} | {channels:,} | {4 * channels:,} | "
        f"{smallest}x{smallest} | {feature_maps(name, 32)} | {feature_maps(name, 28)} |"
    )


def test_the_model_of_ones_own_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    (reference,) = re.findall(r"""--run-config 'model="(.+?)"'""", TEXT)
    (tmp_path / f"{reference.partition(':')[0]}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    model = build_model(reference, (3, 32, 32), 10, seed=0)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_mobilenetv2_without_normalization_is_as_dead_as_the_text_says() -> None:
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = build_model("mobilenetv2", (3, 32, 32), 10, 0, normalization="none").eval()
    assert model(x).abs().max() < 1e-6


def test_what_is_said_of_the_bilstm() -> None:
    model = build_model("bilstm", (40,), 2, seed=0, vocabulary_size=20_000)
    parameters, megabytes, channels = sizes(model)
    said = (
        f"{parameters / 1e6:.2f} million parameters and {megabytes:.2f} MB",
        f"one BatchNorm layer of {channels} channels ({4 * channels} statistics)",
    )
    assert all(text in TEXT.replace("\n", " ") for text in said)
