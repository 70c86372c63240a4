# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: what goes in comes out, damage is noticed, the previous file is found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfusion_flwr import RunConfig
from fedfusion_flwr.fusion import (
    DistributionInference,
    FusionPosterior,
    ServedAverage,
    ServerStep,
    StatisticsMemory,
)
from fedfusion_flwr.tracking import RunDirectory
from fedfusion_flwr.tracking.checkpoint import (
    Checkpoint,
    CheckpointError,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from fedfusion_flwr.tracking.snapshot import SnapshotError, capture, rebuild

CONFIG = RunConfig()


def write(directory: RunDirectory, server_round: int, state: Any = None, **config: Any) -> Path:
    values = dataclasses.replace(CONFIG, **config).to_run_config()
    write_checkpoint(directory, Checkpoint(server_round, values, *capture({"state": state})))
    return directory.path / f"checkpoint-{server_round:06d}.safetensors"


def through_file(directory: RunDirectory, value: object, present: object = None) -> Any:
    return read_checkpoint(write(directory, 1, value)).restored("state", present)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda items: (
        st.lists(items, max_size=3)
        | st.tuples(items, items)
        | st.dictionaries(st.integers() | st.text(max_size=5), items, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(plain)
def test_plain_values_come_back_with_their_types(value: object) -> None:
    trees, tensors = capture({"state": value})
    assert repr(rebuild(trees["state"], tensors)) == repr(value)


@dataclass
class Everything:
    """A state of all kinds of values."""

    tensors: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    array: np.ndarray | None = None
    posteriors: dict[int, FusionPosterior] = field(default_factory=dict)
    pair: tuple[int, float | None] = (0, None)
    nothing: FusionPosterior | None = None


def test_tensors_arrays_and_records_come_back_bit_for_bit(directory: RunDirectory) -> None:
    tensors = [
        torch.tensor([1.0, float("nan"), -0.0]),
        torch.tensor(3),
        torch.zeros(0, 2),
        torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
        torch.tensor([True, False]),
    ]
    posterior = FusionPosterior(torch.eye(2), torch.ones(2) / 2, torch.zeros(2, 1), -1.25)
    value = Everything({"a": tensors}, np.array([1, 2]), {3: posterior}, (1, None))
    back = through_file(directory, value, Everything())
    for before, after in zip(tensors, back.tensors["a"], strict=True):
        assert before.dtype == after.dtype
        assert before.shape == after.shape
        assert before.contiguous().numpy().tobytes() == after.contiguous().numpy().tobytes()
    np.testing.assert_array_equal(back.array, value.array)
    assert list(back.posteriors) == [3]
    assert isinstance(back.posteriors[3], FusionPosterior)
    assert back.posteriors[3].elbo == -1.25
    assert back.pair == (1, None)
    assert back.nothing is None


def test_a_tensor_that_occurs_twice_is_stored_once(directory: RunDirectory) -> None:
    big = torch.zeros(10_000)
    path = write(directory, 1, {"a": big, "b": [big]})
    assert path.stat().st_size < 1.5 * big.nbytes


def test_inference_goes_on_as_it_would_have(directory: RunDirectory) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(12) % 3
    noise = [0.1 * torch.randn(12, 6, generator=generator) for _ in range(3)]
    vectors = [torch.eye(6)[groups] + n for n in noise]
    examples = torch.ones(12)

    def fresh() -> tuple[DistributionInference, StatisticsMemory]:
        return DistributionInference(4, 0, steps=20, refit_steps=5), StatisticsMemory(0.5)

    def fitted(inference: DistributionInference, memory: StatisticsMemory) -> FusionPosterior:
        rounds, residuals = memory.rounds(), memory.residuals
        return inference.fit(memory.vectors(), examples, rounds=rounds, residuals=residuals)

    inference, memory = fresh()
    for server_round in (1, 2):
        rows = dict(enumerate(vectors[server_round - 1]))
        memory.remember(server_round, rows, dict.fromkeys(rows, 10))
        memory.absorb(fitted(inference, memory))
    never_ran, _ = fresh()
    through_file(directory, fresh()[0], never_ran)
    assert never_ran.num_fits == 0
    resumed, remembered = fresh()
    through_file(directory, inference, resumed)
    remembered = through_file(directory, memory, remembered)
    assert torch.equal(remembered.vectors(), memory.vectors())
    for known in (memory, remembered):
        known.remember(3, dict(enumerate(vectors[2])), dict.fromkeys(range(12), 10))
    assert memory.residuals is not None
    assert remembered.residuals is not None
    assert torch.equal(remembered.residuals, memory.residuals)
    expected = memory.absorb(fitted(inference, memory))
    found = remembered.absorb(fitted(resumed, remembered))
    assert torch.equal(found.assignments, expected.assignments)
    assert torch.equal(found.components, expected.components)
    assert found.elbo == expected.elbo


def test_state_of_another_shape_is_refused() -> None:
    trees, tensors = capture({"step": ServerStep()})
    with pytest.raises(SnapshotError, match="ServedAverage does not fit"):
        rebuild(trees["step"], tensors, ServedAverage())
    with pytest.raises(TypeError, match="cannot be part of a state"):
        capture({"step": object()})


def test_the_newest_two_stay_and_the_newest_is_found(directory: RunDirectory) -> None:
    for server_round in (1, 2, 10):
        write(directory, server_round, torch.tensor(server_round))
    names = sorted(path.name for path in directory.path.glob("checkpoint-*"))
    assert names == ["checkpoint-000002.safetensors", "checkpoint-000010.safetensors"]
    found = newest_checkpoint(directory.path, CONFIG)
    assert found.server_round == 10
    assert found.restored("state", None).item() == 10


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "garbage", "other"])
def test_a_damaged_one_is_skipped(directory: RunDirectory, damage: str) -> None:
    write(directory, 4, torch.arange(100))
    path = write(directory, 5, torch.arange(100))
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[:-1],
            "flipped": content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
            "garbage": b"x" * 1000,
            "other": (directory.path / "checkpoint-000004.safetensors").read_bytes()[:200],
        }[damage]
    )
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)
    assert newest_checkpoint(directory.path, CONFIG).server_round == 4
    path.with_name("checkpoint-000004.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        newest_checkpoint(directory.path, CONFIG)


def test_every_flipped_byte_is_noticed(directory: RunDirectory) -> None:
    path = write(directory, 1, {"w": torch.arange(4.0), "n": 3})
    content = path.read_bytes()
    for position in range(0, len(content), 11):
        spoiled = bytearray(content)
        spoiled[position] ^= 255
        path.write_bytes(bytes(spoiled))
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_another_file_of_tensors_is_not_a_checkpoint(directory: RunDirectory) -> None:
    directory.write_state("checkpoint-000003.safetensors", {"w": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="not a checkpoint of format"):
        read_checkpoint(directory.path / "checkpoint-000003.safetensors")


def test_another_config_is_refused_by_the_key_that_differs(directory: RunDirectory) -> None:
    write(directory, 3)
    with pytest.raises(CheckpointError, match=r"^learning-rate = 0.5, but the run in .* 0.02"):
        newest_checkpoint(directory.path, dataclasses.replace(CONFIG, learning_rate=0.5))
    longer = dataclasses.replace(
        CONFIG, num_server_rounds=50, output_dir="elsewhere", resume_from="run", patience=3
    )
    assert newest_checkpoint(directory.path, longer).server_round == 3
    with pytest.raises(CheckpointError, match=r"num-server-rounds = 2, .* finished 3 rounds"):
        newest_checkpoint(directory.path, dataclasses.replace(CONFIG, num_server_rounds=2))


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run directory"):
        newest_checkpoint(tmp_path / "none", CONFIG)
