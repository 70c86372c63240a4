# SPDX-License-Identifier: Apache-2.0
"""bfloat16, compilation and layers that draw random numbers, in local training."""

from __future__ import annotations

import functools
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedfusion_flwr import computation
from fedfusion_flwr.app.training import evaluate
from fedfusion_flwr.computation import (
    compiled_forward,
    has_bfloat16,
    place_model,
    slow_precision,
    warn_of_slow_precision,
)
from fedfusion_flwr.experiments.compare import Comparison
from fedfusion_flwr.experiments.suite import load_suite
from fedfusion_flwr.experiments.work import Machine
from fedfusion_flwr.models import build_model
from tests.models import training
from tests.runs import CONFIG, run_in_process, write_pictures
from tests.support import assert_identical, tiny_model

fit = functools.partial(training.fit, epochs=2, batch_size=8, learning_rate=0.05, weight_decay=1e-4)


def pictures(count: int = 40) -> tuple[Tensor, Tensor]:
    """Four classes, each a bright quarter of the image."""
    generator = torch.Generator().manual_seed(5)
    y = torch.arange(count) % 4
    x = torch.randn(count, 1, 8, 8, generator=generator)
    for label in range(4):
        row, column = 4 * (label // 2), 4 * (label % 2)
        x[y == label, :, row : row + 4, column : column + 4] += 2
    return x, y


def lenet() -> nn.Module:
    return place_model(build_model("lenet", (1, 8, 8), 4, seed=0), torch.device("cpu"))


def test_bfloat16_is_close_to_float32_and_not_the_same() -> None:
    full, half = lenet(), lenet()
    slow = {"learning_rate": 0.005, "epochs": 1}
    losses = [fit(full, *pictures(), **slow), fit(half, *pictures(), precision="bf16", **slow)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]
    for key, value in full.state_dict().items():
        other = half.state_dict()[key]
        assert other.dtype == value.dtype, key
        torch.testing.assert_close(other, value, rtol=0.05, atol=0.02)
    evaluated = evaluate(full, *pictures()), evaluate(full, *pictures(), "bf16")
    assert evaluated[1][0] == pytest.approx(evaluated[0][0], rel=0.05)
    assert evaluated[1][0] != evaluated[0][0]
    assert evaluated[1][1] == pytest.approx(evaluated[0][1], abs=0.05)


def test_convolutions_compute_in_bfloat16_and_statistics_stay_float32() -> None:
    model = lenet()
    seen: list[torch.dtype] = []
    convolution = model.get_submodule("features.0.0")
    convolution.register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
    fit(model, *pictures(8), precision="bf16", epochs=1)
    evaluate(model, *pictures(8), "bf16")
    evaluate(model, *pictures(8))
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32]
    norm = model.get_submodule("features.0.1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert norm.running_var.dtype == torch.float32
    # Not bfloat16 values stored as float32.
    assert not torch.equal(norm.running_var, norm.running_var.bfloat16().float())


@pytest.mark.parametrize("normalization", ["batch", "group", "layer", "none"])
def test_bfloat16_is_repeatable_with_every_normalization(normalization: Any) -> None:
    states = []
    for _ in range(2):
        model = build_model("lenet", (1, 8, 8), 4, seed=0, normalization=normalization)
        fit(model, *pictures(), precision="bf16")
        states.append(model.state_dict())
    assert_identical(*states)
    assert all(value.dtype in (torch.float32, torch.int64) for value in states[0].values())


@pytest.mark.parametrize("able", [True, False])
def test_texts_train_in_bfloat16_on_every_processor(
    able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN has no LSTM in bfloat16 where the processor has no arithmetic for it."""
    if able and not has_bfloat16(torch.device("cpu")):
        pytest.skip("this processor has no bfloat16 arithmetic")
    monkeypatch.setattr(computation, "has_bfloat16", lambda device: able)
    model = build_model("bilstm", (6,), 2, seed=0, vocabulary_size=20)
    seen: list[torch.dtype] = []
    model.get_submodule("lstm").register_forward_hook(
        lambda *call: seen.append(call[2][0].data.dtype)
    )
    x = torch.randint(1, 20, (16, 6), generator=torch.Generator().manual_seed(0))
    assert fit(model, x, torch.arange(16) % 2, precision="bf16") > 0
    assert {*seen} == {torch.bfloat16 if able else torch.float32}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor without bfloat16 arithmetic, in a process that has not warned yet."""
    monkeypatch.setattr(computation, "has_bfloat16", lambda device: False)
    warn_of_slow_precision.cache_clear()
    yield
    warn_of_slow_precision.cache_clear()


@pytest.mark.rounding
@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks for the flags of x86 processors")
def test_bfloat16_on_the_cpu_needs_avx512() -> None:
    """Of the processor, and of what oneDNN is allowed to use of it."""
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii").split()
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper() not in (
        "SSE41",
        "AVX",
        "AVX2",
    )
    has_avx512 = {"avx512bw", "avx512dq", "avx512vl"} <= {*flags}
    assert has_bfloat16(torch.device("cpu")) == (has_avx512 and allowed)


def test_fp32_is_never_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(computation, "has_bfloat16", lambda device: True)
    assert slow_precision(cpu, "bf16") is None
    monkeypatch.setattr(computation, "has_bfloat16", lambda device: False)
    assert slow_precision(cpu, "fp32") is None
    assert "precision = 'bf16' is emulated here" in (slow_precision(cpu, "bf16") or "")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("precision", "warnings"), [("bf16", 1), ("fp32", 0)])
def test_a_run_says_once_that_bfloat16_is_emulated(
    precision: str, warnings: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Server and clients share a process here."""
    config = {
        **CONFIG,
        "data-root": str(write_pictures(tmp_path / "pictures.npz")),
        "output-dir": str(tmp_path / "run"),
        "strategy": "fedavg",
        "num-server-rounds": 1,
        "device": "cpu",
        "precision": precision,
    }
    run_in_process(config)
    said = [message for message in caplog.messages if "emulated" in message]
    assert len(said) == warnings
    assert all("precision = 'fp32'" in sentence for sentence in said)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("suite", "notes"), [("deep", 1), ("quick", 0)])
def test_a_comparison_says_beforehand_that_bfloat16_is_emulated(
    suite: str, notes: int, tmp_path: Path
) -> None:
    plan = Comparison(load_suite(suite), Machine(tmp_path)).plan()
    assert plan.count("note: precision = 'bf16' is emulated here") == notes


def test_dropout_draws_from_the_clients_generator() -> None:
    """One seed gives one result, whatever the global random state, which is not changed."""
    states = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        model = nn.Sequential(nn.Dropout(0.5), *tiny_model())
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
        # One batch: the shuffle alone would not change the outcome.
        fit(model, x, torch.arange(16) % 2, seed=seed, batch_size=16, epochs=1)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(model.state_dict())
    assert_identical(states[0], states[1])
    assert not torch.allclose(states[0]["1.weight"], states[2]["1.weight"], rtol=1e-3)


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler: neither g++ nor clang++ is here",
)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    compiled_forward.cache_clear()
    yield
    compiled_forward.cache_clear()
    torch.compiler.reset()


@needs_compiler
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.slow
def test_compiled_training_is_close_repeatable_and_keeps_the_keys() -> None:
    from torch._dynamo.utils import counters

    model = tiny_model()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = pictures(21)[0].flatten(1)[:, :2], torch.arange(21) % 2

    def trained(count: int, compiled: bool) -> dict[str, Tensor]:
        model.load_state_dict(start)
        fit(model, x[:count], y[:count], epochs=1, compiled=compiled)
        return {key: value.clone() for key, value in model.state_dict().items()}

    counters.clear()
    plain, compiled = trained(21, compiled=False), trained(21, compiled=True)
    assert list(compiled) == list(plain)
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-5)
    trained(4, compiled=True)
    assert_identical(trained(21, compiled=True), compiled)
    # One graph for batches of 8, 5 and 4: else a result would depend on earlier batch sizes.
    assert counters["stats"]["unique_graphs"] == 1
