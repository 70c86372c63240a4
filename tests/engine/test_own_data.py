# SPDX-License-Identifier: Apache-2.0
"""A data set of one's own through `flwr run`: a module beside the app's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.engine.harness import Engine, copy_of_app

pytestmark = pytest.mark.engine

MY_DATA = """
import torch
from fedfusion_flwr.data import FederatedData


def stripes(options):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 1, 8, 8, generator=generator)
    y = torch.arange(200) % 2
    x[y == 1, :, ::2] += 1
    return FederatedData("stripes", x, y, x[:40], y[:40], num_classes=2, classes=("no", "yes"))
"""


def test_a_module_beside_the_app_goes_into_the_bundle(engine: Engine, tmp_path: Path) -> None:
    app = copy_of_app(tmp_path)
    (app / "my_stripes.py").write_text(MY_DATA, encoding="utf-8")
    config = {
        "num-server-rounds": 2,
        "dataset": "my_stripes:stripes",
        "partition": "iid",
        "num-clients": 2,
    }
    done = engine.run(config, app=app, supernodes=2)
    assert done.status == "finished:completed", done.log[-3000:]
    assert [row["replies-valid"] for row in done.metrics()[1:]] == [2, 2]
    assert (done.directory / "classes.txt").read_text(encoding="utf-8") == "no\nyes\n"

    refused = engine.run({**config, "dataset": "my_strypes:stripes"}, app=app, supernodes=2)
    assert refused.status == "finished:failed"
    assert re.search(r"no module 'my_strypes': put my_strypes\.py beside", refused.log)
