# SPDX-License-Identifier: Apache-2.0
"""Round callbacks: what a run leaves on disk and on the screen."""

from fedfusion_flwr.tracking.artifacts import (
    OutputError,
    RunDirectory,
    run_path,
    state_digest,
)
from fedfusion_flwr.tracking.checkpoint import (
    Checkpointer,
    CheckpointError,
    RunInterrupted,
    ended_by_signals,
    newest_checkpoint,
)
from fedfusion_flwr.tracking.console import ConsoleLine, IdleCores
from fedfusion_flwr.tracking.records import BestModel, EarlyStopping, FusionArchive, RunLog
from fedfusion_flwr.tracking.recovery import ComponentRecovery
from fedfusion_flwr.tracking.summary import RunSummary
from fedfusion_flwr.tracking.tensorboard import TensorBoardLog

__all__ = [
    "BestModel",
    "CheckpointError",
    "Checkpointer",
    "ComponentRecovery",
    "ConsoleLine",
    "EarlyStopping",
    "FusionArchive",
    "IdleCores",
    "OutputError",
    "RunDirectory",
    "RunInterrupted",
    "RunLog",
    "RunSummary",
    "TensorBoardLog",
    "ended_by_signals",
    "newest_checkpoint",
    "run_path",
    "state_digest",
]
