# SPDX-License-Identifier: Apache-2.0
"""The run configuration: every key of ``[tool.flwr.app.config]``, parsed and checked once."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from fedfusion_flwr.errors import FedFusionError

Value = str | int | float | bool


class ConfigError(FedFusionError, ValueError):
    """A run-config key that is unknown, of the wrong type or out of range."""


@dataclass(frozen=True)
class _Rule:
    """What a key may hold: a predicate, and the same in words."""

    accepts: Callable[[Any], bool]
    allowed: str


def _key(default: Any, rule: _Rule) -> Any:
    return field(default=default, metadata={"rule": rule})


def _one_of(*names: str) -> _Rule:
    return _Rule(lambda v: v in names, "one of " + ", ".join(f"'{n}'" for n in names))


def _one_of_or_function(*names: str) -> _Rule:
    """A name, or what the user wrote: ``package.module:function``."""

    def accepts(value: str) -> bool:
        module, colon, function = value.partition(":")
        dotted = bool(colon) and all(part.isidentifier() for part in module.split("."))
        return value in names or (dotted and function.isidentifier())

    return _Rule(accepts, _one_of(*names).allowed + ", or your own as 'module:function'")


def _at_least(low: float) -> _Rule:
    return _Rule(lambda v: v >= low, f"at least {low}")


def _above(low: float) -> _Rule:
    return _Rule(lambda v: v > low, f"greater than {low}")


def _between(low: float, high: float) -> _Rule:
    return _Rule(lambda v: low <= v <= high, f"from {low} to {high}")


_ANY = _Rule(lambda _: True, "")
_FRACTION = _Rule(lambda v: 0 < v <= 1, "greater than 0 and at most 1")
_RATE = _Rule(lambda v: 0 < v <= 1e6, "greater than 0 and at most 1000000")
_DECAY = _Rule(lambda v: 0 <= v < 1, "at least 0 and less than 1")

STRATEGIES = (
    "fedfusion",
    "fedavg",
    "fedavgm",
    "fedprox",
    "fed-gn",
    "fedbn",
    "fedma",
    "fesem",
    "ifca",
    "fedcluster",
    "fedcluster-cycling",
    "fedgroup",
)
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
BEST_METRICS = (
    "global-accuracy",
    "global-loss",
    "personalized-accuracy",
    "personalized-loss",
)
PARTITIONS = ("iid", "dirichlet", "pathological", "shards", "components", "user")


@dataclass(frozen=True)
class RunConfig:
    """One run, typed; attribute names are the keys with ``-`` written as ``_``.

    The meaning of each key stands beside its default in ``pyproject.toml``; a test holds the two
    lists of defaults together.
    """

    num_server_rounds: int = _key(30, _at_least(1))
    seed: int = _key(0, _at_least(0))
    strategy: str = _key("fedfusion", _one_of(*STRATEGIES))
    output_dir: str = _key("", _ANY)
    checkpoint_every: int = _key(10, _at_least(0))
    resume_from: str = _key("", _ANY)
    best_metric: str = _key("global-accuracy", _one_of(*BEST_METRICS))
    patience: int = _key(0, _at_least(0))

    dataset: str = _key("mnist-5k", _one_of_or_function(*DATASETS))
    data_root: str = _key("", _ANY)
    augment: bool = _key(True, _ANY)
    vocabulary_size: int = _key(20_000, _at_least(3))
    text_length: int = _key(40, _at_least(1))
    num_clients: int = _key(10, _at_least(1))
    partition: str = _key("components", _one_of(*PARTITIONS))
    dirichlet_alpha: float = _key(0.1, _above(0))
    min_partition_size: int = _key(10, _at_least(2))
    classes_per_client: int = _key(2, _at_least(1))
    shards_per_client: int = _key(2, _at_least(1))
    planted_components: int = _key(5, _at_least(1))
    component_mixing: float = _key(0.0, _at_least(0))
    component_sizes: str = _key("balanced", _one_of("balanced", "long-tailed"))
    component_transform: str = _key("none", _one_of("none", "rotate"))
    validation_fraction: float = _key(0.1, _DECAY)

    model: str = _key("lenet", _one_of_or_function(*MODELS))
    normalization: str = _key("batch", _one_of("batch", "group", "layer", "none"))
    normalization_groups: int = _key(2, _at_least(1))
    local_epochs: int = _key(1, _at_least(1))
    batch_size: int = _key(32, _at_least(2))
    learning_rate: float = _key(0.02, _RATE)
    momentum: float = _key(0.9, _DECAY)
    weight_decay: float = _key(1e-4, _at_least(0))
    local_normalization: str = _key("batch", _one_of("batch", "fused"))
    fused_from_round: int = _key(5, _at_least(2))
    precision: str = _key("fp32", _one_of("fp32", "bf16"))
    compile: bool = _key(False, _ANY)
    device: str = _key("auto", _one_of("auto", "cpu", "cuda"))
    threads_per_client: int = _key(1, _at_least(1))

    fraction_train: float = _key(1.0, _FRACTION)
    fraction_evaluate: float = _key(1.0, _between(0, 1))
    evaluate_every: int = _key(10, _at_least(1))
    sampling: str = _key("random", _one_of("random", "stratified"))

    num_components: int = _key(8, _at_least(1))
    mixture: str = _key("balanced", _one_of("inferred", "balanced", "counts"))
    balance_exponent: float = _key(0.5, _between(0, 1))
    statistics_source: str = _key("local", _one_of("local", "probe"))
    statistics_layers: str = _key("all", _one_of("all", "ends"))
    assignment_smoothing: float = _key(0.5, _DECAY)
    absent: str = _key("drop", _one_of("drop", "remember"))
    vae_step: int = _key(1, _at_least(1))
    vae_steps: int = _key(150, _at_least(1))
    vae_refit_steps: int = _key(30, _at_least(1))
    vae_learning_rate: float = _key(3e-3, _RATE)

    proximal_mu: float = _key(0.01, _at_least(0))
    num_clusters: int = _key(5, _at_least(1))
    cluster_round: int = _key(5, _at_least(1))
    distance_threshold: float = _key(0.0, _at_least(0))
    linkage: str = _key("ward", _one_of("ward", "complete", "average"))
    reshuffle_cycle: bool = _key(True, _ANY)
    centre_update: str = _key("all", _one_of("all", "round"))
    warm_start: bool = _key(True, _ANY)
    warmup_rounds: int = _key(3, _at_least(0))
    pretrain_steps: int = _key(50, _at_least(1))
    pretrain_clients: int = _key(20, _at_least(1))
    inter_group_rate: float = _key(0.0, _at_least(0))
    matching_width: str = _key("variable", _one_of("variable", "fixed"))
    matching_gamma: float = _key(1e-3, _above(0))
    matching_sweeps: int = _key(5, _at_least(1))

    pool_moments: bool = _key(True, _ANY)
    server_learning_rate: float = _key(1.0, _RATE)
    server_momentum: float = _key(0.5, _DECAY)
    average_decay: float = _key(0.8, _DECAY)
    max_client_weight: float = _key(1.0, _FRACTION)

    min_valid_replies: int = _key(1, _at_least(1))
    max_failed_rounds: int = _key(3, _at_least(1))
    max_examples: int = _key(10_000_000, _at_least(1))
    max_update_ratio: float = _key(10.0, _above(0))
    round_timeout: float = _key(3600.0, _above(0))
    node_timeout: float = _key(60.0, _above(0))
    min_available_clients: int = _key(0, _at_least(0))

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
            values[fields[key].name] = _typed(key, value, str(fields[key].type))
        config = cls(**cast(dict[str, Any], values))
        config._check_together()
        return config

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            rule: _Rule = f.metadata["rule"]
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

    @property
    def num_first_clients(self) -> int:
        """Without how many clients round 1 does not begin."""
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


def _typed(key: str, value: object, type_name: str) -> Value:
    if type_name == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value).__name__ != type_name:
        wanted = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "str": "a string",
        }
        raise ConfigError(f"{_shown(key, value)} is not allowed: it must be {wanted[type_name]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{_shown(key, value)} is not allowed: it must be finite")
    return cast(Value, value)
