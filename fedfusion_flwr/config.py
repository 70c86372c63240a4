# SPDX-License-Identifier: Apache-2.0
"""The run configuration: every key of ``[tool.flwr.app.config]``, parsed and checked once."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from fedfusion_flwr.config_rules import (
    A_NAME,
    ANY,
    DECAY,
    DECAY_OR_OWN,
    FRACTION,
    OWN_OR_AT_LEAST_0,
    RATE,
    ZERO_OR_RATIO,
    Rule,
    above,
    at_least,
    between,
    checked,
    choice,
    one_of_or_function,
)
from fedfusion_flwr.errors import FedFusionError

Value = str | int | float | bool


class ConfigError(FedFusionError, ValueError):
    """A run-config key that is unknown, of the wrong type or out of range."""


DATASETS = (
    "mnist-5k",
    "mnist",
    "fashion-mnist",
    "cifar10",
    "sentiment140",
    "imagefolder",
    "npz",
)
MODELS = ("lenet", "resnet18", "mobilenetv2", "densenet121", "bilstm")

BestMetric = Literal["global-accuracy", "global-loss", "personalized-accuracy", "personalized-loss"]
PartitionKind = Literal["iid", "dirichlet", "pathological", "shards", "components", "user"]
BEST_METRICS = get_args(BestMetric)
ComponentSizes = Literal["balanced", "long-tailed"]
ComponentTransform = Literal["none", "rotate"]
Normalization = Literal["batch", "group", "layer", "none"]
LocalNormalization = Literal["batch", "fused"]
EvaluationNormalization = Literal["received", "own"]
Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
Sampling = Literal["random", "stratified"]
Mixture = Literal["inferred", "balanced", "counts"]
StatisticsSource = Literal["local", "probe"]
LayerChoice = Literal["all", "ends"]
Absent = Literal["drop", "remember"]
Linkage = Literal["ward", "complete", "average"]
CentreUpdate = Literal["all", "round"]
MatchingWidth = Literal["variable", "fixed"]
DefencePreset = Literal["none", "robust"]


@dataclass(frozen=True)
class RunConfig:
    """One run, typed; attribute names are the keys with ``-`` written as ``_``.

    Each key is explained next to its default in ``pyproject.toml``; a test keeps the two lists of
    defaults equal.
    """

    num_server_rounds: int = checked(30, at_least(1))
    seed: int = checked(0, at_least(0))
    strategy: str = checked("fedfusion", A_NAME)
    output_dir: str = checked("", ANY)
    checkpoint_every: int = checked(10, at_least(0))
    resume_from: str = checked("", ANY)
    best_metric: BestMetric = choice(BestMetric, "global-accuracy")
    patience: int = checked(0, at_least(0))
    tensorboard: bool = checked(False, ANY)

    dataset: str = checked("mnist-5k", one_of_or_function(*DATASETS))
    data_root: str = checked("", ANY)
    train_examples: int = checked(0, at_least(0))
    test_examples: int = checked(0, at_least(0))
    augment: bool = checked(True, ANY)
    vocabulary_size: int = checked(20_000, at_least(3))
    text_length: int = checked(40, at_least(1))
    num_clients: int = checked(10, at_least(1))
    partition: PartitionKind = choice(PartitionKind, "components")
    dirichlet_alpha: float = checked(0.1, above(0))
    min_partition_size: int = checked(10, at_least(2))
    classes_per_client: int = checked(2, at_least(1))
    shards_per_client: int = checked(2, at_least(1))
    planted_components: int = checked(5, at_least(1))
    component_mixing: float = checked(0.0, at_least(0))
    component_sizes: ComponentSizes = choice(ComponentSizes, "balanced")
    component_transform: ComponentTransform = choice(ComponentTransform, "none")
    validation_fraction: float = checked(0.1, DECAY)

    model: str = checked("lenet", one_of_or_function(*MODELS))
    normalization: Normalization = choice(Normalization, "batch")
    normalization_groups: int = checked(2, at_least(1))
    local_epochs: int = checked(1, at_least(1))
    local_steps: int = checked(0, at_least(0))
    batch_size: int = checked(32, at_least(2))
    learning_rate: float = checked(0.02, RATE)
    momentum: float = checked(0.9, DECAY)
    weight_decay: float = checked(1e-4, at_least(0))
    label_calibration: float = checked(-1.0, OWN_OR_AT_LEAST_0)
    local_normalization: LocalNormalization = choice(LocalNormalization, "batch")
    fused_from_round: int = checked(5, at_least(2))
    precision: Precision = choice(Precision, "fp32")
    compile: bool = checked(False, ANY)
    device: Device = choice(Device, "auto")
    threads_per_client: int = checked(1, at_least(1))

    fraction_train: float = checked(1.0, FRACTION)
    fraction_evaluate: float = checked(1.0, between(0, 1))
    evaluate_every: int = checked(10, at_least(1))
    evaluation_normalization: EvaluationNormalization = choice(EvaluationNormalization, "received")
    finetune_steps: int = checked(0, at_least(0))
    central_evaluate_every: int = checked(1, at_least(1))
    sampling: Sampling = choice(Sampling, "stratified")

    num_components: int = checked(8, at_least(1))
    mixture: Mixture = choice(Mixture, "balanced")
    balance_exponent: float = checked(0.5, between(0, 1))
    statistics_source: StatisticsSource = choice(StatisticsSource, "local")
    statistics_layers: LayerChoice = choice(LayerChoice, "all")
    statistics_noise: float = checked(0.0, between(0, 10))
    assignment_smoothing: float = checked(0.5, DECAY)
    absent: Absent = choice(Absent, "drop")
    component_coupling: float = checked(0.0, between(0, 1))
    coupled_rounds: int = checked(0, at_least(0))
    vae_step: int = checked(1, at_least(1))
    vae_steps: int = checked(200, at_least(1))
    vae_refit_steps: int = checked(10, at_least(1))
    vae_learning_rate: float = checked(2e-2, RATE)

    proximal_mu: float = checked(0.01, at_least(0))
    num_clusters: int = checked(5, at_least(1))
    cluster_round: int = checked(5, at_least(1))
    distance_threshold: float = checked(0.0, at_least(0))
    linkage: Linkage = choice(Linkage, "ward")
    reshuffle_cycle: bool = checked(True, ANY)
    centre_update: CentreUpdate = choice(CentreUpdate, "all")
    warm_start: bool = checked(True, ANY)
    warmup_rounds: int = checked(3, at_least(0))
    pretrain_steps: int = checked(50, at_least(1))
    pretrain_clients: int = checked(20, at_least(1))
    inter_group_rate: float = checked(0.0, at_least(0))
    matching_width: MatchingWidth = choice(MatchingWidth, "variable")
    matching_gamma: float = checked(1e-3, above(0))
    matching_sweeps: int = checked(5, at_least(1))

    pool_moments: bool = checked(True, ANY)
    server_learning_rate: float = checked(1.0, RATE)
    server_momentum: float = checked(-1.0, DECAY_OR_OWN)
    average_decay: float = checked(-1.0, DECAY_OR_OWN)
    max_client_weight: float = checked(1.0, FRACTION)

    min_valid_replies: int = checked(1, at_least(1))
    max_failed_rounds: int = checked(3, at_least(1))
    max_examples: int = checked(10_000_000, at_least(1))
    max_update_ratio: float = checked(10.0, above(0))
    defence: DefencePreset = choice(DefencePreset, "none")
    outlier_threshold: float = checked(20.0, at_least(0))
    clip_quantile: float = checked(0.5, FRACTION)
    max_examples_ratio: float = checked(3.0, ZERO_OR_RATIO)
    round_timeout: float = checked(3600.0, above(0))
    node_timeout: float = checked(60.0, above(0))
    min_available_clients: int = checked(0, at_least(0))

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Value]) -> RunConfig:
        """Parse Flower's run config.

        Raises
        ------
        ConfigError
            One sentence naming the key, its value and what is allowed.
        """
        fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(cls)}
        values: dict[str, Value] = {}
        for key, value in run_config.items():
            if key not in fields:
                close = difflib.get_close_matches(key, fields, n=1)
                hint = f"did you mean '{close[0]}'?" if close else "see [tool.flwr.app.config]"
                raise ConfigError(f"unknown run-config key '{key}'; {hint}")
            values[fields[key].name] = _typed(key, value, type(fields[key].default))
        config = cls(**cast(dict[str, Any], values))
        config._check_together()
        return config

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            rule: Rule = f.metadata["rule"]
            value = getattr(self, f.name)
            if not rule.accepts(value):
                raise ConfigError(f"{_shown(f.name, value)} is not allowed: {rule.allowed}")

    def _check_together(self) -> None:
        trained = self.num_clients * self.fraction_train
        if trained < 1 - 1e-9:
            raise ConfigError(
                f"{_shown('fraction_train', self.fraction_train)} is less than one of "
                f"{self.num_clients} clients: at least "
                f"{math.ceil(1e6 / self.num_clients) / 1e6} is allowed"
            )
        if self.min_valid_replies > self.num_train_clients:
            raise ConfigError(
                f"{_shown('min_valid_replies', self.min_valid_replies)} can never be met: only "
                f"{self.num_train_clients} of {self.num_clients} clients train in a round; "
                f"at most {self.num_train_clients} is allowed"
            )
        if self.min_available_clients > self.num_clients:
            raise ConfigError(
                f"{_shown('min_available_clients', self.min_available_clients)} can never be met: "
                f"at most num-clients, which is {self.num_clients}, is allowed"
            )
        if self.fraction_evaluate > 0 and self.validation_fraction == 0:
            raise ConfigError(
                "validation-fraction = 0.0 leaves clients nothing to evaluate on: set "
                "fraction-evaluate = 0.0 too"
            )
        if self.compile and self.strategy == "fedma":
            raise ConfigError(
                "compile = True does not go with strategy = 'fedma', whose models change their "
                "shapes: set compile = False"
            )
        if self.partition == "components" and self.num_clients < self.planted_components:
            raise ConfigError(
                f"{_shown('planted_components', self.planted_components)} is not allowed: at most "
                f"num-clients, which is {self.num_clients}"
            )

    @property
    def num_train_clients(self) -> int:
        """How many clients train in a round."""
        return cohort_size(self.num_clients, self.fraction_train)

    def rounds_after_one_of_all(self) -> int:
        """``num-server-rounds`` minus the cost of training every client once, at least 1."""
        return max(1, self.num_server_rounds - round(self.num_clients / self.num_train_clients))

    @property
    def num_first_clients(self) -> int:
        """How many clients round 1 needs."""
        return self.min_available_clients or self.num_clients

    @property
    def model_normalization(self) -> str:
        """What the model's normalization layers become: Fed-GN is FedAvg with group norm."""
        if self.strategy == "fed-gn" and self.normalization == "batch":
            return "group"
        return self.normalization

    def to_run_config(self) -> dict[str, Value]:
        """Back to kebab-case keys; `from_run_config` inverts it."""
        return {k.replace("_", "-"): v for k, v in dataclasses.asdict(self).items()}


def cohort_size(population: int, fraction: float) -> int:
    """floor(population * fraction), at least 1; whole products survive rounding errors."""
    return max(1, math.floor(population * fraction + 1e-9))


def _shown(name: str, value: object) -> str:
    return f"{name.replace('_', '-')} = {value!r}"


def _typed(key: str, value: object, kind: type) -> Value:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise ConfigError(f"{_shown(key, value)} is not allowed: it must be {wanted[kind]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{_shown(key, value)} is not allowed: it must be finite")
    return cast(Value, value)
