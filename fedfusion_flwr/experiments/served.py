# SPDX-License-Identifier: Apache-2.0
"""How well each client is served, without the noise of its few held-out examples.

What a client will see is known in a comparison: its own labels, and its component's view of the
pictures. So each client's model is scored on the whole test set, shown as its component shows it,
and every class counts as much as the client has of it:

    accuracy of client k = sum_vc s_kvc a_vc / sum_vc s_kvc

s_kvc is the share of the client's examples of class c in view v, and a_vc the accuracy on the test
examples of class c in view v.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn

from fedfusion_flwr import protocol
from fedfusion_flwr.app.local_work import LocalWork
from fedfusion_flwr.app.server import label_calibration
from fedfusion_flwr.app.training import logits_of
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import data_for, partition_for, partition_spec
from fedfusion_flwr.data.partition import transform_component
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.experiments.results import rounded
from fedfusion_flwr.experiments.rows import Row
from fedfusion_flwr.federation.strategy import FederatedStrategy

PHASE = "served"
"""Purpose of the generator that shuffles the epoch of each client."""
NAMES = ("served", "served-prior", "served-epoch-prior")


class Served(NamedTuple):
    """Accuracies of K clients, each (K,) in [0, 1]: without and with their own label prior."""

    plain: np.ndarray
    prior: np.ndarray


def served_accuracy(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    shares: np.ndarray,
    log_priors: Tensor,
    precision: str = "fp32",
) -> Served:
    """Accuracy of one model for K clients, each on test data with its own labels and views.

    Parameters
    ----------
    model : nn.Module
        Left in eval mode.
    views : Sequence[Tensor]
        The test inputs (N, ...) in each of V views; only what clients have is looked at.
    labels : Tensor
        Their classes, (N,).
    shares : np.ndarray
        How much of each view and class each client has, (K, V, C), not negative; only ratios count.
        What the test set has no example of does not count.
    log_priors : Tensor
        Log q_k of the clients, (K, C), on the model's device.
    precision : {"fp32", "bf16"}
        As in training.

    Returns
    -------
    Served
        NaN for clients that have nothing of what is in the test set.
    """
    clients, _, classes = shares.shape
    right, total = np.zeros((2, clients)), np.zeros(clients)
    for view, share in zip(views, shares.swapaxes(0, 1), strict=True):
        rows = torch.from_numpy(share.any(0))[labels]
        if not rows.any():
            continue
        wanted = labels[rows].numpy()
        available = np.bincount(wanted, minlength=classes)
        # Of every test example of its class, its part of each client's share, (K, n).
        weights = (share / np.maximum(available, 1))[:, wanted]
        inputs = view[rows].to(log_priors.device)
        logits = torch.cat(list(logits_of(model, inputs, precision)))
        plain = logits.argmax(1).cpu().numpy() == wanted
        right[0] += weights @ plain
        for k, prior in enumerate(log_priors):
            right[1, k] += weights[k] @ ((logits + prior).argmax(1).cpu().numpy() == wanted)
        total += weights.sum(1)
    with np.errstate(invalid="ignore"):
        return Served(*(right / total))


def client_shares(config: RunConfig) -> np.ndarray:
    """How many examples of each view and class each client holds, (K, V, C), held-out ones too.

    Views are the planted components where they turn the pictures, else there is one.
    """
    data, cut = data_for(config), partition_for(config)
    labels, turned = data.y_train.numpy(), _are_turned(config)
    count = config.planted_components if turned else 1
    shares = np.zeros((len(cut.indices), count, data.num_classes))
    for client, indices in enumerate(cut.indices):
        view: Any = 0
        if turned and cut.example_components is not None:
            view = cut.example_components[client]
        np.add.at(shares[client], (view, labels[indices]), 1)
    return shares


def views_of_test_set(config: RunConfig) -> list[Tensor]:
    """The test inputs as each planted component shows them; just as they are if none does."""
    data = data_for(config)
    x = data.inputs(data.x_test)
    if not _are_turned(config):
        return [x]
    count, kind = config.planted_components, config.component_transform
    return [transform_component(x, np.full(len(x), m), count, kind) for m in range(count)]


def measure_served(config: Mapping[str, Any], strategy: FederatedStrategy) -> Row:
    """Score what a finished run serves its clients.

    Parameters
    ----------
    config : Mapping
        The run's overrides.
    strategy : FederatedStrategy
        As the run left it; client k of it is partition k.

    Returns
    -------
    Row
        ``served``: the model that serves the client, argmax f(x), normalized as
        ``evaluation-normalization`` says; ``served-prior``: the same with
        its own label prior, argmax f(x) + log q_k; ``served-epoch-prior``: also after one epoch on
        its training data, with the run's loss and optimizer. Each has ``mean`` over the clients and
        ``worst``, its least, in [0, 1]. If this cannot be measured, only ``missing``, the reason.
    """
    try:
        return _measured(RunConfig.from_run_config(config), strategy)
    except (FedFusionError, OSError) as problem:
        return {"missing": str(problem)}
    except Exception as problem:  # noqa: BLE001 - a run of hours is not lost for it
        traceback.print_exc()
        return {"missing": f"{type(problem).__name__}: {problem}"}


def _measured(config: RunConfig, strategy: FederatedStrategy) -> Row:
    torch.set_num_threads(config.threads_per_client)
    shares, views = client_shares(config), views_of_test_set(config)
    labels, clients = data_for(config).y_test, range(len(shares))
    strategy.prepare_evaluation()
    models = [strategy.personal_model(client) for client in clients]
    log_priors: dict[int, Tensor] = {}
    alike: dict[tuple[int, ...], list[int]] = {}
    alone = config.evaluation_normalization == "own"

    def ready(client: int) -> tuple[LocalWork, int]:
        """The client with its model loaded, and the number of the model that it chose."""
        settings = ConfigRecord(
            {
                protocol.SERVER_ROUND: strategy.server_round,
                protocol.LABEL_CALIBRATION: label_calibration(config),
                **strategy.evaluate_settings(client),
            }
        )
        work = LocalWork.prepare(config, client, settings, models[client])
        choice = work.choose().get(protocol.CLUSTER, 0)
        work.normalize_for_evaluation()
        return work, choice

    def scored(work: LocalWork, those: list[int]) -> Served:
        priors = torch.stack([log_priors[client] for client in those])
        return served_accuracy(work.model, views, labels, shares[those], priors, config.precision)

    for client in clients:
        work, choice = ready(client)
        log_priors[client] = work.log_prior
        key = (id(models[client]), choice, *([client] if alone else []))
        alike.setdefault(key, []).append(client)
    found = np.full((3, len(shares)), np.nan)
    for those in alike.values():
        found[:2, those] = scored(ready(those[0])[0], those)
    for client in clients:
        work, _ = ready(client)
        work.fit(PHASE)
        found[2, client] = scored(work, [client]).prior[0]
    return {
        name: {"mean": rounded(np.nanmean(values)), "worst": rounded(np.nanmin(values))}
        for name, values in zip(NAMES, found, strict=True)
    }


def _are_turned(config: RunConfig) -> bool:
    return config.partition == "components" and partition_spec(config).component_transform != "none"
