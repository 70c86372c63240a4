# SPDX-License-Identifier: Apache-2.0
"""Suites: what they mean, and what is wrong with those that mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.experiments.results import slug
from fedfusion_flwr.experiments.suite import SuiteError, load_suite, parse_suite, with_equal_steps
from fedfusion_flwr.strategies import registry

SMALL = """
[common]
num-server-rounds = 6
learning-rate = 0.5
momentum = 0.1

[partitions.skewed]
partition = "dirichlet"
dirichlet-alpha = 0.3

[strategies.fedfusion]
learning-rate = 0.4
num-components = 3

[strategies.variant]
based-on = "fedfusion"
num-components = 4

[tune]
datasets = ["mnist-5k"]
models = ["lenet"]
partitions = ["iid"]
seeds = [100]
seconds = 7
[tune.candidates]
fedfusion = [{ learning-rate = 0.1 }, { learning-rate = 0.2, momentum = 0.3 }]

[[groups]]
name = "main"
strategies = ["fedfusion", "variant"]
datasets = ["mnist-5k"]
models = ["lenet"]
partitions = ["iid", "skewed"]
seeds = [0, 1]

[[groups]]
name = "plain"
strategies = ["variant"]
datasets = ["mnist-5k"]
models = ["lenet"]
partitions = ["iid"]
seeds = [0]
tuned = false
[groups.config]
batch-size = 64

[centralized]
groups = ["main"]
seeds = [0]
batch-seeds = [0, 1]
"""


def refusal(text: str) -> str:
    with pytest.raises(SuiteError) as caught:
        parse_suite(text, "mine")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cells_are_all_combinations() -> None:
    cells = parse_suite(SMALL, "mine").cells({})
    assert len(cells) == 2 * 2 * 2 + 1
    assert len({cell.id for cell in cells}) == len(cells)
    assert cells[0].id == "main-mnist-5k-lenet-iid-fedfusion-s0"
    skewed = next(cell for cell in cells if cell.partition == "skewed")
    assert skewed.config == {
        "num-server-rounds": 6,
        "learning-rate": 0.4,
        "momentum": 0.1,
        "dataset": "mnist-5k",
        "model": "lenet",
        "partition": "dirichlet",
        "dirichlet-alpha": 0.3,
        "strategy": "fedfusion",
        "num-components": 3,
        "seed": 0,
    }


def test_tuned_keys_reach_all_that_is_based_on_the_strategy() -> None:
    suite = parse_suite(SMALL, "mine")
    winner = {"fedfusion": suite.tuning.candidates["fedfusion"][1]} if suite.tuning else {}
    cells = {cell.id: cell.config for cell in suite.cells(winner)}
    tuned = cells["main-mnist-5k-lenet-iid-variant-s0"]
    assert tuned["strategy"] == "fedfusion"
    assert (tuned["learning-rate"], tuned["momentum"], tuned["num-components"]) == (0.2, 0.3, 4)
    plain = cells["plain-mnist-5k-lenet-iid-variant-s0"]
    assert (plain["learning-rate"], plain["momentum"], plain["batch-size"]) == (0.4, 0.1, 64)


def test_tuning_tries_every_candidate() -> None:
    cells = parse_suite(SMALL, "mine").tune_cells()
    assert [(c.candidate, c.seed, c.config["learning-rate"]) for c in cells] == [
        (0, 100, 0.1),
        (1, 100, 0.2),
    ]
    assert {cell.seconds for cell in cells} == {7.0}
    assert cells[0].factors()["candidate"] == 0


def test_references_have_no_strategy_and_two_orders_of_batches() -> None:
    found = parse_suite(SMALL, "mine").references()
    assert [(r.id, r.batch_seed) for r in found] == [
        ("mnist-5k-lenet-s0-b0", 0),
        ("mnist-5k-lenet-s0-b1", 1),
    ]
    assert "strategy" not in found[0].config
    assert found[0].config["learning-rate"] == 0.5
    everywhere = parse_suite(SMALL.replace("seeds = [0]\nbatch-seeds = [0, 1]", ""), "mine")
    assert [(r.seed, r.batch_seed) for r in everywhere.references()] == [(0, 0), (1, 0)]
    # An empty table stands for all groups.
    every_group = parse_suite(f"{SMALL.partition('[centralized]')[0]}[centralized]", "mine")
    assert every_group.references() == everywhere.references()


@pytest.mark.parametrize(
    ("strategy", "keys", "rounds"),
    [
        ("fedavg", {}, 20),
        ("fedma", {}, 20),
        # A round trains one of five clusters.
        ("fedcluster-cycling", {"num_clusters": 5}, 100),
        # Everybody trains once beforehand: one round's worth, or six where 10 of 60 train.
        ("fesem", {}, 19),
        ("fesem", {"warm_start": False}, 20),
        ("fedgroup", {"num_clients": 60, "fraction_train": 1 / 6}, 14),
        ("fedcluster", {"num_clients": 60, "fraction_train": 0.16667}, 14),
    ],
)
def test_rounds_of_equal_gradient_steps(strategy: str, keys: dict[str, Any], rounds: int) -> None:
    config = RunConfig(strategy=strategy, num_server_rounds=20, num_clients=20)
    config = RunConfig(**{**vars(config), **keys})
    assert with_equal_steps(config.to_run_config())["num-server-rounds"] == rounds


@pytest.mark.parametrize("name", ["quick", "small", "method", "deep", "paper"])
def test_shipped_suites(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    cells = suite.cells({})
    assert all(cell.seconds > 0 for cell in cells)
    if name in ("small", "paper"):
        assert {cell.config["strategy"] for cell in cells} == set(registry())
        assert {"hyper-parameters", "ablation"} <= {cell.group for cell in cells}
        assert suite.tuning is not None
        compared = [cell for cell in cells if cell.group not in ("hyper-parameters", "ablation")]
        assert {cell.seed for cell in compared}.isdisjoint(suite.tuning.grid.seeds)
        partitions = {cell.partition for cell in cells}
        assert partitions.isdisjoint(suite.tuning.grid.partitions)
        tuned = {g.name: g.strategies for g in suite.grids if g.tuned}
        for strategies in tuned.values():
            assert set(strategies) <= set(suite.tuning.candidates)


def test_the_suite_on_the_methods_parts_compares_like_with_like() -> None:
    cells = load_suite("method").cells({})
    assert all(cell.served for cell in cells)
    assert {cell.config["learning-rate"] for cell in cells} == {RunConfig().learning_rate}
    settings: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for cell in cells:
        of_setting = settings.setdefault((cell.dataset, cell.partition, cell.seed), {})
        of_setting[cell.strategy] = cell.config
    assert {seed for *_, seed in settings} == set(range(5))
    for configs in settings.values():
        assert {"fedavg", "fedavgm", "fedfusion", "fedavgm + calibration"} <= configs.keys()
        # No part of the method is in the control.
        control = {**configs["fedavgm"], "average-decay": 0.8, "label-calibration": 0.5}
        assert control == configs["fedavgm + calibration + average"]
        assert configs["fedavgm"]["average-decay"] == 0.0
        rounds = {config["num-server-rounds"] for config in configs.values()}
        assert len(rounds) == 1


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SMALL)
    assert load_suite(str(path)).name == "mine"
    with pytest.raises(SuiteError, match="'smal': use one of deep, method, paper, quick, small"):
        load_suite("smal")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("[common]", "[comon]", "unknown key 'comon'; did you mean 'common'?"),
        ('[[groups]]\nname = "main"', '[[groups]]\nnmae = "main"', "did you mean 'name'?"),
        ("momentum = 0.1", "momentum = 1.5", "momentum = 1.5 is not allowed"),
        ("momentum = 0.1", "momentun = 0.1", "did you mean 'momentum'?"),
        ('based-on = "fedfusion"', 'based-on = "variant"', "'variant' is based on itself"),
        ('based-on = "fedfusion"', 'based-on = "fedsgd"', "strategy = 'fedsgd' is not allowed"),
        ("seeds = [0, 1]", "seeds = 0", "seeds must be a list of one or more"),
        ('partitions = ["iid", "skewed"]', "partitions = []", "partitions must be a list"),
        ('name = "plain"', 'name = "main"', "two cells are called"),
        ("[tune.candidates]", "[tune.candidates]\nfedavg = [{}]", "2 for fedfusion"),
        ("[common]", "[common", "is not TOML"),
        (
            "[tune.candidates]",
            "[tune.metric]\nfedavg = 'x'\n[tune.candidates]",
            "unknown key 'fedavg'",
        ),
        (
            "[tune.candidates]",
            "[tune.metric]\nfedfusion = 'speed'\n[tune.candidates]",
            "metric 'speed' is none of global-accuracy",
        ),
        ('groups = ["main"]', 'groups = ["mian"]', "there is no group 'mian'"),
        ('name = "plain"', 'name = "tune"', "that name is taken"),
        ("[groups.config]\nbatch-size = 64", "config = 64", "not laid out as docs/compare.md says"),
        ("[partitions.skewed]", "[partitions]\nskewed = 3\n[models.x]", "not laid out"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(old: str, new: str, sentence: str) -> None:
    assert old in SMALL
    assert sentence in refusal(SMALL.replace(old, new, 1))


def test_a_suite_without_groups() -> None:
    assert refusal("[common]\nseed = 1") == "suite 'mine' has no [[groups]]"


def test_data_roots_name_data_sets_of_the_suite() -> None:
    suite = parse_suite(SMALL, "mine")
    suite.check_data_roots(["mnist-5k"])
    with pytest.raises(SuiteError, match="no data set 'mnist'; it has mnist-5k"):
        suite.check_data_roots(["mnist"])


def test_slug() -> None:
    assert slug("a b", "components, 10 of 60", "Paper + probe", "0.5") == (
        "a-b-components-10-of-60-paper-probe-0.5"
    )
