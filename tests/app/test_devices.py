# SPDX-License-Identifier: Apache-2.0
"""Nodes with their own data: ``data-root`` and no ``partition-id``; augmentation in a client."""

from __future__ import annotations

import functools
import hashlib
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

from client_app import app
from fedfusion_flwr import RunConfig, protocol
from fedfusion_flwr.app import local_work
from fedfusion_flwr.app.server import run
from fedfusion_flwr.data import client_key, data_for, local_data
from fedfusion_flwr.data.dataset import FederatedData, signature_difference
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.models import model_for
from tests.data.files import image
from tests.runs import ask_client, rows

CLASSES = ("ant", "bee", "cow")
SERVER_ROUND = 3


def write_device(root: Path, classes: tuple[str, ...], count: int, *, listed: bool = True) -> Path:
    """8x8 images of grey noise, around a different level for every class."""
    noise = np.random.default_rng(len(str(root)))
    for name in classes:
        level = 60 * CLASSES.index(name)
        for split, images in (("train", count), ("test", 2)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                picture = image(size=(8, 8), mode="L")
                picture.putdata((level + noise.integers(40, size=64)).tolist())
                picture.save(folder / f"{number}.png")
    if listed:
        (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The run config of three devices; ``server`` holds all classes, ``one`` and ``two`` some."""
    monkeypatch.setenv("FEDFUSION_CACHE", str(tmp_path / "cache"))
    write_device(tmp_path / "server", CLASSES, 4, listed=False)
    write_device(tmp_path / "one", ("ant", "cow"), 6)
    write_device(tmp_path / "two", ("bee",), 10)
    return {
        "dataset": "imagefolder",
        "data-root": str(tmp_path / "server"),
        "partition": "iid",
        "num-clients": 2,
        "num-server-rounds": 1,
        "batch-size": 4,
        "output-dir": str(tmp_path / "run"),
    }


def ask(
    config: dict[str, Any], node: dict[str, Any], *, kind: str = "train", **sent: Any
) -> Message:
    typed = RunConfig.from_run_config(config)
    arrays = protocol.record_from_state(model_for(typed, data_for(typed)).state_dict())
    return ask_client(config, node, arrays, kind, {"server-round": SERVER_ROUND, **sent})


def payload(reply: Message) -> bytes:
    return b"".join(a.data for a in reply.content.array_records["arrays"].values())


def test_a_device_uses_all_of_its_own_data(config: dict[str, Any], tmp_path: Path) -> None:
    # num-partitions says nothing where there is no partition.
    node = {"data-root": str(tmp_path / "two"), "num-partitions": 77}
    reply = ask(config, node)
    # Ten bees, of which a tenth is held out.
    assert reply.content.metric_records["metrics"]["num-examples"] == 9
    assert dict(reply.content.config_records["client"]) == {"server-round": SERVER_ROUND}
    evaluated = ask(config, node, kind="evaluate").content.metric_records["metrics"]
    assert evaluated["num-examples"] == 1


def test_with_a_partition_id_a_node_has_that_part(config: dict[str, Any], tmp_path: Path) -> None:
    reply = ask(config, {"data-root": str(tmp_path / "one"), "partition-id": 1})
    # Half of twelve, of which one is held out.
    assert reply.content.metric_records["metrics"]["num-examples"] == 5
    assert reply.content.config_records["client"]["partition-id"] == 1


def test_planted_components_do_not_concern_a_device(config: dict[str, Any], tmp_path: Path) -> None:
    typed = RunConfig.from_run_config(
        {
            **config,
            "data-root": str(tmp_path / "two"),
            "validation-fraction": 0.0,
            "fraction-evaluate": 0.0,
        }
        | {"partition": "components", "planted-components": 2, "component-transform": "rotate"}
    )
    data = data_for(typed)
    assert torch.equal(local_data(typed, None).x, data.inputs(data.x_train))


def test_devices_draw_differently_and_repeatably(config: dict[str, Any], tmp_path: Path) -> None:
    one, two = (
        client_key(RunConfig.from_run_config({**config, "data-root": str(tmp_path / name)}), None)
        for name in ("one", "two")
    )
    assert one != two
    labels = struct.pack("<12q", *[0] * 6, *[2] * 6)
    assert one == int(hashlib.sha256(labels).hexdigest()[:16], 16)
    assert client_key(RunConfig.from_run_config(config), 5) == 5
    node = {"data-root": str(tmp_path / "one")}
    assert payload(ask(config, node)) == payload(ask(config, node))


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_other_data_than_the_servers_is_refused(
    config: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    signature = data_for(RunConfig.from_run_config(config)).signature
    node: dict[str, Any] = {"data-root": str(tmp_path / "one")}
    assert not ask(config, node, kind=kind, **{"data-signature": signature}).has_error()
    (tmp_path / "one" / "classes.txt").write_text("ant\ncow\nbee\n")
    node["data-root"] += "/"  # another key of the cache, so that the data are loaded again
    assert not ask(config, node, kind=kind).has_error()
    refused = ask(config, node, kind=kind, **{"data-signature": signature})
    assert refused.error.reason == (
        "this node's data set differs from the server's in the class names; copy classes.txt or "
        "vocabulary.txt from the run directory into this node's data-root"
    )


def test_what_differs_is_named() -> None:
    x, y = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])

    def signature(**changes: Any) -> str:
        fields = {"x_train": x, "x_test": x, "num_classes": 2} | changes
        return FederatedData("toy", y_train=y, y_test=y, **fields).signature

    plain = signature()
    assert signature_difference(plain, signature()) == ""
    assert signature_difference(plain, signature(num_classes=3)) == "the number of classes"
    wide = torch.zeros(2, 1, 8, 9)
    assert signature_difference(plain, signature(x_train=wide, x_test=wide)) == (
        "the shape of an example"
    )
    texts = torch.ones(2, 8, dtype=torch.int64)
    one, other = (
        signature(x_train=texts, x_test=texts, vocabulary=("", "?", word)) for word in "ab"
    )
    assert signature_difference(one, other) == "the vocabulary"
    assert signature_difference(plain, signature(num_classes=3, classes=("a", "b", "c"))) == (
        "the number of classes and the class names"
    )
    assert signature_difference(plain, "an older one") == "the form of the signature"


def test_a_run_of_devices(config: dict[str, Any], tmp_path: Path) -> None:
    """A device with classes in another order loses its replies until it has the server's order."""
    write_device(tmp_path / "three", ("ant", "cow"), 7)
    (tmp_path / "three" / "classes.txt").write_text("cow\nbee\nant\n")

    def dropped(folder: str, *devices: str) -> list[str | None]:
        run_config = {**config, "output-dir": str(tmp_path / folder)}
        grid = InProcessGrid(app, 0, run_config)
        for device in devices:
            grid.add_node({"data-root": str(tmp_path / device)})
        run(grid, Context(1, 0, {}, RecordDict(), run_config))
        clients = sorted(rows(tmp_path / folder, "clients.jsonl"), key=lambda row: row["client"])
        assert all(row.get("partition") is None for row in clients)
        return [row.get("detail") for row in clients]

    first = dropped("first", "two", "three")
    assert first[0] is None
    assert first[1] is not None
    assert "differs from the server's in the class names" in first[1]
    assert rows(tmp_path / "first")[-1]["evaluate-replies-dropped"] == 1
    shutil.copytree(tmp_path / "three", tmp_path / "four")
    for name in ("classes.txt", "moments.txt"):
        shutil.copy(tmp_path / "first" / name, tmp_path / "four")
    assert (tmp_path / "four" / "classes.txt").read_text() == "ant\nbee\ncow\n"
    served, device = (
        data_for(RunConfig.from_run_config({**config, "data-root": str(tmp_path / name)}))
        for name in ("server", "four")
    )
    assert (device.mean, device.std) == (served.mean, served.std)
    assert dropped("second", "two", "four") == [None, None]


@pytest.fixture
def augmented(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Which batches were augmented, by shape."""
    shapes: list[Any] = []
    augment = local_work.augment

    def record(x: torch.Tensor, **settings: Any) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return augment(x, **settings)

    monkeypatch.setattr(local_work, "augment", record)
    return shapes


def test_training_is_augmented_and_evaluation_is_not(
    config: dict[str, Any], augmented: list[Any]
) -> None:
    node = {"partition-id": 0}
    with_it = payload(ask(config, node))
    # Six of twelve, one held out: a batch of four, which the last one joins.
    assert augmented == [(5, 1, 8, 8)]
    again = payload(ask(config, node))
    assert again == with_it
    without = payload(ask({**config, "augment": False}, node))
    assert without != with_it
    for kind in ("evaluate", "query"):
        ask(config, node, kind=kind)
    assert len(augmented) == 2


def test_augmentation_does_not_change_the_shuffles(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An augmentation that changes nothing gives the reply without augmentation, bit for bit."""
    draw = functools.partial(torch.randint, 9)

    def identity(x: torch.Tensor, *, generator: torch.Generator, **_: object) -> torch.Tensor:
        draw((1000,), generator=generator)
        return x

    monkeypatch.setattr(local_work, "augment", identity)
    node = {"partition-id": 1}
    assert payload(ask(config, node)) == payload(ask({**config, "augment": False}, node))
