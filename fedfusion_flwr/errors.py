# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on: one sentence that names the culprit and the remedy."""


class FedFusionError(Exception):
    """Base of every error this package raises on purpose."""


class ArgumentError(FedFusionError, ValueError):
    """An argument whose value is not allowed; names it and says what is allowed."""
