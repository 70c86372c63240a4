# SPDX-License-Identifier: Apache-2.0
"""Inference of the clients' mixtures on planted and on degenerate data."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from fedfusion_flwr.fusion import (
    DistributionInference,
    FusionPosterior,
    InferenceError,
    client_weights,
    example_weights,
)
from fedfusion_flwr.fusion import inference as inference_module
from fedfusion_flwr.fusion.folding import Folding
from fedfusion_flwr.fusion.vae import FusionVAE
from tests.fusion.tensors import f64

pytestmark = pytest.mark.rounding

SEEDS = range(10)


class Planted(NamedTuple):
    """Clients x (K, D) scattered around the centres (G, D) of their groups."""

    x: Tensor
    labels: Tensor
    centers: Tensor

    def agreement(self, posterior: FusionPosterior) -> float:
        return float(adjusted_rand_score(self.labels, main(posterior)))

    def decoded(self, posterior: FusionPosterior) -> Tensor:
        """Components (G, D) in which most clients of the groups are."""
        found = main(posterior)
        groups = range(len(self.centers))
        return posterior.components[[int(found[self.labels == g].mode().values) for g in groups]]


Recovered = list[tuple[Planted, FusionPosterior]]


def main(posterior: FusionPosterior) -> Tensor:
    return posterior.assignments.argmax(1)


def planted(
    seed: int, clients: int = 50, width: int = 192, groups: int = 4, noise: float = 0.3
) -> Planted:
    """Centres ~ N(0, 1), so the between-component spread of a feature is about 1."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(groups, width))
    labels = np.concatenate([np.arange(groups), rng.integers(0, groups, clients - groups)])
    x = centers[labels] + noise * rng.normal(size=(clients, width))
    return Planted(torch.as_tensor(x), torch.as_tensor(labels), torch.as_tensor(centers))


def examples(clients: int, seed: int = 0) -> Tensor:
    return torch.randint(50, 200, (clients,), generator=torch.Generator().manual_seed(seed))


def small(components: int = 5, seed: int = 0, **options: object) -> DistributionInference:
    settings = {"steps": 60, **options}
    return DistributionInference(components, seed, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def easy() -> Planted:
    return planted(3, clients=24, width=24, groups=3, noise=0.2)


@pytest.fixture(scope="module")
def recovered() -> Recovered:
    """The default inference with twice as many components as there are groups, ten times."""
    data = [planted(seed) for seed in SEEDS]
    return [(d, DistributionInference(8, s).fit(d.x, examples(50, s))) for s, d in enumerate(data)]


def test_planted_components_are_recovered(recovered: Recovered) -> None:
    scores = [data.agreement(fit) for data, fit in recovered]
    assert sum(score >= 0.95 for score in scores) >= 9, scores


def test_assignments_and_mixture_are_distributions(recovered: Recovered) -> None:
    for _, fit in recovered:
        assert fit.assignments.shape == (50, 8)
        assert fit.components.shape == (8, 192)
        assert float(fit.assignments.min()) >= 0
        torch.testing.assert_close(fit.assignments.sum(1), torch.ones(50).double())
        assert float(fit.mixture.min()) >= 0
        assert float(fit.mixture.sum()) == pytest.approx(1, abs=1e-12)


def test_components_decode_near_the_planted_centres(recovered: Recovered) -> None:
    """Centres lie sqrt(2 * 192) = 19.6 apart; the error may be a sixth of that, in input units."""
    for data, fit in recovered:
        assert float((data.decoded(fit) - data.centers).norm(dim=1).max()) < 19.6 / 6


def test_inferred_mixture_is_close_to_the_shares_of_the_groups(recovered: Recovered) -> None:
    """Total variation below 0.15, and nearly nothing on empty components."""
    for data, fit in recovered:
        if data.agreement(fit) < 0.95:
            continue
        share = torch.bincount(main(fit), minlength=8).double() / 50
        assert float((fit.mixture - share).abs().sum()) / 2 < 0.15
        assert float(fit.mixture[share == 0].sum()) < 0.06


def test_components_come_in_the_units_of_the_input(easy: Planted) -> None:
    """Features scaled by 1e-3 to 1e3 and moved by 1e4: the components move along."""
    scale = torch.logspace(-3, 3, 24, dtype=torch.float64)
    plain = small().fit(easy.x, examples(24))
    moved = small().fit(1e4 + scale * easy.x, examples(24))
    assert easy.agreement(moved) == 1.0
    unmoved = (moved.components - 1e4) / scale
    torch.testing.assert_close(unmoved, plain.components, rtol=0, atol=1e-2)


@pytest.mark.parametrize("fitted", [False, True])
def test_wide_statistics_pass_through_a_projection(fitted: bool) -> None:
    """2000 features through 64: groups, and components in all 2000 features, are found."""
    data = planted(1, clients=30, width=2000, groups=3)
    inference = small(max_features=64)
    for _ in range(1 + fitted):
        fit = inference.fit(data.x, examples(30))
    assert data.agreement(fit) == 1.0
    assert fit.components.shape == (5, 2000)
    distance = torch.cdist(data.decoded(fit), data.centers)
    assert distance.argmin(1).tolist() == [0, 1, 2]
    assert float(distance.diag().max()) < 0.5 * float(data.centers.norm(dim=1).min())


def same(first: FusionPosterior, second: FusionPosterior) -> bool:
    return first.elbo == second.elbo and all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("assignments", "mixture", "components")
    )


def test_equal_seeds_give_equal_posteriors_and_other_seeds_do_not(easy: Planted) -> None:
    fits = [small(seed=seed).fit(easy.x, examples(24)) for seed in (7, 7, 8)]
    assert same(fits[0], fits[1])
    assert not same(fits[0], fits[2])


def test_seeds_and_fits_share_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they share it with the network's start or the folding of wide statistics."""
    x, noise, start, folding = planted(0, clients=8, width=40, groups=2).x, set(), set(), set()

    class Watched(FusionVAE):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            start.add(torch.default_generator.initial_seed())
            super().__init__(*arguments, **options)

        def elbo(self, *arguments: Any) -> Tensor:
            noise.add(arguments[3].initial_seed())
            return super().elbo(*arguments)

    def watched(width: int, max_width: int, seed: int) -> Folding:
        folding.add(seed)
        return Folding(width, max_width, seed)

    monkeypatch.setattr(inference_module, "FusionVAE", Watched)
    monkeypatch.setattr(inference_module, "Folding", watched)
    for seed in range(3):
        inference = small(3, seed, steps=1, refit_steps=1, max_features=16)
        for _ in range(3):
            inference.fit(x, examples(8))
    assert (len(noise), len(start), len(folding)) == (9, 3, 3)
    assert len(noise | start | folding) == 15


def test_global_random_states_are_neither_read_nor_written(easy: Planted) -> None:
    def draws() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002

    def seed_all(seed: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)

    fits = []
    for seed in (1, 2):
        seed_all(seed)
        expected = draws()
        seed_all(seed)
        fits.append(small().fit(easy.x, examples(24)))
        assert draws() == expected
    assert same(*fits)


def test_the_order_of_clients_changes_nothing_but_labels(easy: Planted) -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    n = examples(24)
    plain, shuffled = small().fit(easy.x, n), small().fit(easy.x[order], n[order])
    assert adjusted_rand_score(main(plain)[order], main(shuffled)) == 1.0


def test_a_refit_keeps_the_assignments_and_the_network(easy: Planted) -> None:
    inference = small()
    first = inference.fit(easy.x, examples(24))
    network = inference._vae
    noise = 0.02 * torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    second = inference.fit(easy.x + noise, examples(24))
    assert inference._vae is network
    assert inference.num_fits == 2
    assert torch.equal(main(first), main(second))


def _on_a_line(*places: float, seed: int) -> Planted:
    """Three groups in one direction, where turning cannot bring other groups into the old place."""
    rng = np.random.default_rng(seed)
    labels = np.arange(24) % 3
    direction = np.where(np.arange(24) % 2, 1.0, -1.0)
    centers = np.outer(places, direction)
    x = centers[labels] + 0.05 * rng.normal(size=(24, 24))
    return Planted(torch.as_tensor(x), torch.as_tensor(labels), torch.as_tensor(centers))


@pytest.mark.parametrize(
    ("before", "warm"),
    [
        ("all but one", True),
        ("all but twelve", True),
        ("all but one group", False),
        ("other groups", False),
    ],
)
def test_a_later_fit_is_warm_unless_the_groups_have_changed(
    easy: Planted, before: str, warm: bool
) -> None:
    known = {
        "all but one": easy.x[:-1],
        "all but twelve": easy.x[:-12],
        "all but one group": easy.x[easy.labels != easy.labels.max()],
        "other groups": _on_a_line(0, 8, 9, seed=1).x,
    }[before]
    if before == "other groups":
        easy = _on_a_line(0, 1, 9, seed=0)
    inference = small()
    inference.fit(known, examples(len(known)))
    network = inference._vae
    fit = inference.fit(easy.x, examples(24))
    assert (inference._vae is network) == warm
    assert easy.agreement(fit) == 1.0


def test_identical_clients_are_one_component_and_get_example_weights() -> None:
    x, n = torch.randn(1, 6).expand(9, 6), examples(9)
    fit = small().fit(x, n)
    assert fit.assignments[:, 0].tolist() == [1.0] * 9
    assert fit.mixture.tolist() == [1, 0, 0, 0, 0]
    torch.testing.assert_close(fit.components, x[:5].double())
    assert torch.equal(client_weights(fit.assignments, fit.mixture, n), example_weights(n))


def test_pure_noise_is_one_component() -> None:
    x = torch.randn(50, 192, generator=torch.Generator().manual_seed(0))
    assert len(main(small(8).fit(x, examples(50))).unique()) == 1


def test_one_component_is_fedavg_bit_for_bit(easy: Planted) -> None:
    n = examples(24)
    fit = DistributionInference(1).fit(easy.x, n)
    assert torch.equal(client_weights(fit.assignments, fit.mixture, n), example_weights(n))
    torch.testing.assert_close(fit.components, easy.x.mean(0, keepdim=True))


@pytest.mark.parametrize("clients", [1, 2, 3, 4])
def test_fewer_clients_than_components_still_give_weights(clients: int) -> None:
    inference, n, data = small(8), examples(clients), planted(0, 4, 12, groups=2)
    for _ in range(2):
        fit = inference.fit(data.x[:clients], n)
        p = client_weights(fit.assignments, fit.mixture, n)
        assert fit.assignments.shape == (clients, 8)
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)


def test_constant_features_are_ignored_and_come_back_as_they_are(easy: Planted) -> None:
    """Constants of any size, float noise included, change no assignment."""
    constants = torch.tensor([0.0, -3.0, 1e7]).expand(24, 3).double()
    dust = 1e-4 * torch.rand(24, 1, generator=torch.Generator().manual_seed(0)).double()
    fit = small().fit(torch.cat([constants, 1e7 + dust, easy.x], 1), examples(24))
    assert easy.agreement(fit) == 1.0
    assert fit.components[:, :3].tolist() == [[0.0, -3.0, 1e7]] * 5
    groups = torch.stack([dust[easy.labels == g].mean() for g in range(3)])
    torch.testing.assert_close(easy.decoded(fit)[:, 3], 1e7 + groups, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "n", "message"),
    [
        (f64([0, 0], [0, math.nan]), torch.ones(2), "statistics must be finite"),
        (f64([0, 0], [0, math.inf]), torch.ones(2), "statistics must be finite"),
        (f64([0, 0], [0, -math.inf]), torch.ones(2), "statistics must be finite"),
        (torch.zeros(3, 2), torch.tensor([1, 0, 2]), "examples positive"),
        (torch.zeros(3, 2), f64(1, math.nan, 2), "examples positive"),
        (torch.zeros(3, 2), torch.ones(2), "expected"),
        (torch.zeros(0, 2), torch.ones(0), "expected"),
        (torch.zeros(3), torch.ones(3), "expected"),
    ],
)
def test_impossible_input_is_refused(x: Tensor, n: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().fit(x, n)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_components must be at least 1, got 0"):
        DistributionInference(0)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        DistributionInference(3, -1)


@pytest.mark.parametrize("warm", [False, True])
def test_a_diverged_fit_is_reported_and_never_a_warm_start(
    easy: Planted, monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    inference = small()
    if warm:
        inference.fit(easy.x, examples(24))

    def diverged(*_: object) -> Tensor:
        return torch.full((24,), float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(FusionVAE, "elbo", diverged)
        with pytest.raises(InferenceError, match="loss is not finite at step 1"):
            inference.fit(easy.x, examples(24))
    assert inference._vae is None
    assert easy.agreement(inference.fit(easy.x, examples(24))) == 1.0


def test_a_posterior_that_is_not_finite_is_reported_and_forgotten(
    easy: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    inference = small(steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(FusionVAE, "memberships", lambda *_: torch.full((24, 3), float("nan")))
        with pytest.raises(InferenceError, match="posterior is not finite"):
            inference.fit(easy.x, examples(24))
    assert inference._vae is None
    assert inference.fit(easy.x, examples(24)).mixture.isfinite().all()
