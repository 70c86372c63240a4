# SPDX-License-Identifier: Apache-2.0
"""Round callbacks: what a run leaves on disk and on the screen."""

from fedfusion_flwr.tracking.artifacts import (
    BestModel,
    FusionArchive,
    OutputError,
    RunDirectory,
    RunLog,
    state_digest,
)
from fedfusion_flwr.tracking.console import ConsoleLine
from fedfusion_flwr.tracking.recovery import ComponentRecovery
from fedfusion_flwr.tracking.summary import RunSummary

__all__ = [
    "BestModel",
    "ComponentRecovery",
    "ConsoleLine",
    "FusionArchive",
    "OutputError",
    "RunDirectory",
    "RunLog",
    "RunSummary",
    "state_digest",
]
