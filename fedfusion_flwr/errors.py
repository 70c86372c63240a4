# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on: one sentence that names the culprit and the remedy."""


class FedFusionError(Exception):
    """Base of every error this package raises on purpose."""


class ArgumentError(FedFusionError, ValueError):
    """An argument whose value is not allowed; names it and says what is allowed."""


def first_line(problem: Exception) -> str:
    """The first line of an exception's text, without a colon at its end; its type without text."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(":")
