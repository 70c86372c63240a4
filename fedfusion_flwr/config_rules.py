# SPDX-License-Identifier: Apache-2.0
"""Rules for the values of run-config keys and arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

from fedfusion_flwr.errors import ArgumentError


@dataclass(frozen=True)
class Rule:
    """What a value may be: a predicate, and the same in words."""

    accepts: Callable[[Any], bool]
    allowed: str

    def holds(self, value: object) -> bool:
        """Whether a value, of whatever type, keeps the rule."""
        try:
            return bool(self.accepts(value))
        except TypeError:
            return False


def checked(default: Any, rule: Rule) -> Any:
    """A dataclass field with a rule for its values."""
    return field(default=default, metadata={"rule": rule})


def choice(names: Any, default: Any) -> Any:
    """A dataclass field that holds one of the names of a ``Literal`` type."""
    return checked(default, one_of(*get_args(names)))


def check_arguments(owner: str, values: Any) -> None:
    """Raise `ArgumentError` for the first field of a dataclass that breaks its rule."""
    for item in dataclasses.fields(values):
        rule = item.metadata.get("rule")
        if rule is None:
            continue
        value = getattr(values, item.name)
        if not rule.holds(value):
            raise ArgumentError(f"{owner}: {item.name} = {value!r} is not allowed: {rule.allowed}")


def one_of(*names: str) -> Rule:
    """One of these names."""
    return Rule(lambda v: v in names, "one of " + ", ".join(f"'{n}'" for n in names))


def one_of_or_function(*names: str) -> Rule:
    """One of these names, or the user's own ``package.module:function``."""

    def accepts(value: str) -> bool:
        module, colon, function = value.partition(":")
        dotted = bool(colon) and all(part.isidentifier() for part in module.split("."))
        return value in names or (dotted and function.isidentifier())

    return Rule(accepts, one_of(*names).allowed + ", or your own as 'module:function'")


def at_least(low: float) -> Rule:
    """No less than this."""
    return Rule(lambda v: v >= low, f"at least {low}")


def above(low: float) -> Rule:
    """More than this."""
    return Rule(lambda v: v > low, f"greater than {low}")


def between(low: float, high: float) -> Rule:
    """No less than one, no more than the other."""
    return Rule(lambda v: low <= v <= high, f"from {low} to {high}")


ANY = Rule(lambda _: True, "")
A_NAME = Rule(bool, "a name, or your own as 'module:Class'")
FRACTION = Rule(lambda v: 0 < v <= 1, "greater than 0 and at most 1")
RATE = Rule(lambda v: 0 < v <= 1e6, "greater than 0 and at most 1000000")
DECAY = Rule(lambda v: 0 <= v < 1, "at least 0 and less than 1")
OWN_OR_AT_LEAST_0 = Rule(lambda v: v == -1 or v >= 0, "at least 0, or -1 for the strategy's own")
DECAY_OR_OWN = Rule(
    lambda v: v == -1 or 0 <= v < 1, "at least 0 and less than 1, or -1 for the strategy's own"
)
ZERO_OR_RATIO = Rule(lambda v: v == 0 or v >= 1, "0, or at least 1")
