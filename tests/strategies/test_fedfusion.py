# SPDX-License-Identifier: Apache-2.0
"""FedFusion as a strategy: its invariants over whole rounds, partial participation, fallbacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from fedfusion_flwr import FedFusion, protocol
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.fusion import (
    DistributionInference,
    FusionPosterior,
    InferenceError,
    StatisticsError,
    fuse_state_dicts,
)
from tests.support import (
    FakeClient,
    Outcome,
    assert_identical,
    initial_arrays,
    run_federation,
    tiny_model,
)

pytestmark = pytest.mark.rounding

GROUPS = 3


def grouped_client(message: Message, context: Context) -> Message:
    """A client whose whole reply depends on its group only: partition modulo three."""
    partition = int(context.node_config["partition-id"])  # type: ignore[arg-type]
    reply = FakeClient(normalization=False)(message, context)
    received = protocol.state_from_record(message.content.array_records["arrays"])
    shift = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, -2.0]])[partition % GROUPS]
    state = dict(received)
    state["norm.running_mean"] = received["norm.running_mean"] * 0.5 + shift
    state["norm.running_var"] = 1 + shift.square()
    state["out.bias"] = received["out.bias"] + 0.1 * shift
    state["norm.num_batches_tracked"] = received["norm.num_batches_tracked"] + 1
    reply.content.array_records["arrays"] = protocol.record_from_state(state)
    reply.content.metric_records["metrics"]["num-examples"] = 10
    return reply


def fuse_groups(num_clients: int, rounds: int = 2, **settings: Any) -> Outcome:
    defaults = {"num_components": 5, "inference": None, "min_available_nodes": num_clients}
    return run_federation(
        "fedfusion", grouped_client, num_clients, rounds=rounds, **{**defaults, **settings}
    )


def test_one_component_is_fedavg_bit_for_bit() -> None:
    one = FedFusion(num_components=1, fraction_evaluate=0.0)
    fused = one.start(InProcessGrid(FakeClient(), 6), initial_arrays(), 3)
    averaged = run_federation("fedavg", FakeClient(), 6, rounds=3)
    assert_identical(protocol.state_from_record(fused.arrays), averaged.state)


def test_counts_under_full_participation_is_fedavg() -> None:
    counted = run_federation("fedfusion", FakeClient(), 6, mixture="counts")
    averaged = run_federation("fedavg", FakeClient(), 6)
    for key, value in averaged.state.items():
        torch.testing.assert_close(counted.state[key], value, rtol=1e-6, atol=1e-7)


def test_identical_clients_are_fedavg() -> None:
    def same(message: Message, context: Context) -> Message:
        context.node_config["partition-id"] = 0
        return FakeClient(normalization=False)(message, context)

    fused = run_federation("fedfusion", same, 4, mixture="balanced", balance_exponent=0.0)
    averaged = run_federation("fedavg", same, 4)
    for key, value in averaged.state.items():
        torch.testing.assert_close(fused.state[key], value, rtol=1e-6, atol=1e-7)


class PlantedInference(DistributionInference):
    """Answers one-hot with the true groups, so that weights can be worked out by hand."""

    def fit(self, vectors: torch.Tensor, num_examples: torch.Tensor, **_: Any) -> FusionPosterior:
        groups = torch.arange(len(vectors)) % GROUPS
        assignments = torch.eye(self.num_components, dtype=torch.float64)[groups]
        mixture = assignments.mean(0)
        components = torch.zeros(self.num_components, vectors.shape[1], dtype=torch.float64)
        return FusionPosterior(assignments, mixture, components, 0.0, clear_groups=True)


def test_balancing_levels_the_groups_of_unequal_size() -> None:
    """Seven clients, groups {0, 3, 6}, {1, 4}, {2, 5}: with exponent 0 each group weighs 1/3.

    So the clients of the first weigh 1/9 each and the others 1/6.
    """
    outcome = fuse_groups(7, rounds=1, balance_exponent=0.0, inference=PlantedInference(5))
    weights = [row.weight for row in outcome.reports[-1].clients]
    expected = [1 / 9, 1 / 6, 1 / 6, 1 / 9, 1 / 6, 1 / 6, 1 / 9]
    assert weights == pytest.approx(expected, abs=1e-12)
    assert outcome.reports[-1].metrics["components-occupied"] == GROUPS


def test_a_cohort_is_weighted_to_the_population() -> None:
    """Exponent 1, four of nine clients: the cohort's groups weigh what they do among all nine."""
    settings = {"fraction_train": 4 / 9, "balance_exponent": 1.0, "sampling": "random"}
    outcome = fuse_groups(9, rounds=12, **settings)
    strategy = outcome.strategy
    assert isinstance(strategy, FedFusion)
    assert len(strategy.state.memory.ids) == 9
    report = outcome.reports[-1]
    by_group: dict[int, float] = {}
    for row in report.clients:
        assert row.client is not None
        by_group[row.client % GROUPS] = by_group.get(row.client % GROUPS, 0.0) + row.weight
    present = len(by_group)
    assert list(by_group.values()) == pytest.approx([1 / present] * present, abs=0.02)
    sizes = {len(r.clients) for r in outcome.reports[1:]}
    assert sizes == {4}


def test_stratified_sampling_meets_all_clients_then_keeps_proportions() -> None:
    outcome = fuse_groups(9, rounds=8, fraction_train=1 / 3, sampling="stratified")
    cohorts = [sorted(row.client or 0 for row in r.clients) for r in outcome.reports[1:]]
    assert sorted(c for cohort in cohorts[:3] for c in cohort) == list(range(9))
    for cohort in cohorts[3:]:
        assert sorted(client % GROUPS for client in cohort) == [0, 1, 2]


def test_inferred_mixture_is_the_posterior_mean() -> None:
    outcome = fuse_groups(6, mixture="inferred")
    fusion = outcome.reports[-1].fusion
    assert fusion is not None
    assert torch.equal(fusion.mixture, fusion.posterior.mixture)


def test_absent_component_contributes_its_last_step_only_if_asked() -> None:
    # Exponent 0 keeps every group's mixture at 1/3 also when none of its clients takes part.
    settings = {"fraction_train": 1 / 3, "balance_exponent": 0.0, "rounds": 8}
    dropped = fuse_groups(6, absent="drop", inference=PlantedInference(5), **settings)
    remembered = fuse_groups(6, absent="remember", inference=PlantedInference(5), **settings)
    assert "components-remembered" not in dropped.reports[-1].metrics
    report = remembered.reports[-1]
    assert report.metrics["components-remembered"] == 1
    # One of three components stands in with its third of the mixture, two clients share the rest.
    assert report.fusion is not None
    assert float(report.fusion.weights.sum()) == pytest.approx(2 / 3)
    assert not torch.equal(dropped.state["out.bias"], remembered.state["out.bias"])


def test_vae_step_skips_inferences_but_not_for_newcomers() -> None:
    every = fuse_groups(6, rounds=6)
    rarely = fuse_groups(6, rounds=6, vae_step=3)
    assert isinstance(every.strategy, FedFusion)
    assert isinstance(rarely.strategy, FedFusion)
    assert every.strategy.state.inference.num_fits == 6
    assert rarely.strategy.state.inference.num_fits == 2


class BrokenInference(DistributionInference):
    def fit(self, vectors: torch.Tensor, num_examples: torch.Tensor, **_: Any) -> Any:
        raise InferenceError("the loss is not finite at step 1 of 2")


def test_failed_inference_falls_back_to_example_weights_and_says_so() -> None:
    broken = BrokenInference(5)
    outcome = fuse_groups(6, inference=broken, sampling="stratified")
    averaged = run_federation("fedavg", grouped_client, 6)
    assert_identical(outcome.state, averaged.state)
    assert outcome.train_metrics(1)["fusion-fallback"] == 1.0


class BreakingInference(PlantedInference):
    """Fails from its second fit on."""

    def fit(self, vectors: torch.Tensor, num_examples: torch.Tensor, **_: Any) -> FusionPosterior:
        self.num_fits += 1
        if self.num_fits > 1:
            raise InferenceError("the loss is not finite at step 1 of 2")
        return super().fit(vectors, num_examples)


def test_newcomers_of_a_failed_inference_are_served_the_global_model() -> None:
    """Those known before keep their components; nobody ends the run."""
    settings = {"fraction_train": 0.5, "fraction_evaluate": 1.0, "rounds": 3}
    outcome = fuse_groups(6, inference=BreakingInference(5), **settings)
    assert [r.metrics["fusion-fallback"] for r in outcome.reports[1:]] == [0, 1, 1]
    assert [r.metrics["evaluate-replies-valid"] for r in outcome.reports[1:]] == [6, 6, 6]


def test_model_without_normalization_is_refused_with_the_remedy() -> None:
    def plain(message: Message, context: Context) -> Message:
        return FakeClient(normalization=False)(message, context)

    model = torch.nn.Linear(2, 2)
    strategy = FedFusion(min_train_nodes=1, fraction_evaluate=0.0)
    with pytest.raises(StatisticsError, match="BatchNorm") as refusal:
        strategy.start(InProcessGrid(plain, 3), protocol.record_from_state(model.state_dict()), 1)
    assert "probe" in str(refusal.value)


def test_served_model_is_the_average_and_training_goes_on_from_the_newest() -> None:
    """After two rounds (2 w_1 + 9 w_2) / 11 is served; the second round started from w_1."""
    plain = [run_federation("fedavg", FakeClient(), 4, rounds=n).state for n in (1, 2)]
    served = run_federation("fedavg", FakeClient(), 4, rounds=2, average_decay=0.5)
    expected = fuse_state_dicts(plain, torch.tensor([2 / 11, 9 / 11]))
    for key, value in expected.items():
        torch.testing.assert_close(served.state[key], value)
    assert_identical(served.strategy.current, plain[0])


def test_inference_must_have_as_many_components() -> None:
    with pytest.raises(ValueError, match="num_components = 4"):
        FedFusion(num_components=4, inference=DistributionInference(3))


def test_tiny_model_statistics_follow_the_groups() -> None:
    """Guards `grouped_client`: the groups differ in statistics and not only in names."""
    assert "norm.running_mean" in tiny_model().state_dict()
    outcome = fuse_groups(6, rounds=1)
    fusion = outcome.reports[-1].fusion
    assert fusion is not None
    components = fusion.posterior.assignments.argmax(1).tolist()
    assert components[:GROUPS] == components[GROUPS:]
    assert len(set(components)) == GROUPS
