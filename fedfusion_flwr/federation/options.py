# SPDX-License-Identifier: Apache-2.0
"""The settings that all strategies share, in four groups; a strategy inherits them all."""

from __future__ import annotations

from dataclasses import dataclass

from fedfusion_flwr.config_rules import (
    DECAY,
    FRACTION,
    RATE,
    above,
    at_least,
    between,
    check_arguments,
    checked,
)


class Options:
    """Checked on creation: a value that is not allowed raises `ArgumentError`."""

    def __post_init__(self) -> None:
        check_arguments(type(self).__name__, self)


@dataclass(kw_only=True, eq=False, repr=False)
class Participation(Options):
    """Who takes part in a round, and how often models are evaluated.

    Attributes
    ----------
    fraction_train, fraction_evaluate : float
        Share of the connected clients that train, and that evaluate; 0 skips it.
    min_train_nodes, min_evaluate_nodes : int
        Smallest cohorts.
    min_available_nodes : int
        Clients to wait for before round 1.
    node_timeout : float
        Longest time to wait, in seconds.
    evaluate_every : int
        Rounds from one evaluation by clients to the next; they also evaluate in the last round.
    central_evaluate_every : int
        The same for the server, which also evaluates before the first round and in the last.
    """

    fraction_train: float = checked(1.0, between(0, 1))
    fraction_evaluate: float = checked(1.0, between(0, 1))
    min_train_nodes: int = checked(2, at_least(0))
    min_evaluate_nodes: int = checked(2, at_least(0))
    min_available_nodes: int = checked(2, at_least(0))
    node_timeout: float = checked(60.0, at_least(0))
    evaluate_every: int = checked(1, at_least(1))
    central_evaluate_every: int = checked(1, at_least(1))


@dataclass(kw_only=True, eq=False, repr=False)
class Plausibility(Options):
    """Which replies and models are accepted, and when a run gives up.

    Attributes
    ----------
    min_valid_replies : int
        With fewer good replies the round keeps the old model.
    max_failed_rounds : int
        This many such rounds in a row end the run.
    max_examples : int
        Largest example count that is accepted.
    max_update_ratio : float
        Refuse a model that moved by more than this times the norm of the model it started from.
    """

    min_valid_replies: int = checked(1, at_least(0))
    max_failed_rounds: int = checked(3, at_least(1))
    max_examples: int = checked(10_000_000, at_least(1))
    max_update_ratio: float = checked(10.0, above(0))


@dataclass(kw_only=True, eq=False, repr=False)
class ServerUpdate(Options):
    """How the server moves a single global model towards the clients' aggregate.

    Attributes
    ----------
    server_learning_rate, server_momentum : float
        The aggregate is a pseudo-gradient; 1 and 0 take the aggregate as it is.
    max_client_weight : float
        Upper limit of one client's weight; 1 is no limit.
    """

    server_learning_rate: float = checked(1.0, RATE)
    server_momentum: float = checked(0.0, DECAY)
    max_client_weight: float = checked(1.0, FRACTION)


@dataclass(kw_only=True, eq=False, repr=False)
class Serving(Options):
    """Which model is evaluated, saved and returned.

    Attributes
    ----------
    average_decay : float
        Decay of the moving average of global models that is served; training goes on from the
        newest model. 0 serves the newest.
    pool_moments : bool
        Fuse running statistics as moments of the mixture instead of averaging variances.
    """

    average_decay: float = checked(0.0, DECAY)
    pool_moments: bool = True
