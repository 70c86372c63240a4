# SPDX-License-Identifier: Apache-2.0
"""Several runs in one `flwr run`; `Engine.run_parts` puts a copy of this file beside an app.

The ServerApp makes one run after the other, each with a run config and a folder of its own; the
ClientApp finds there which config is in force.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from logging import ERROR, INFO
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fedfusion_flwr.app.client import handle_evaluate, handle_query, handle_train
from fedfusion_flwr.app.server import run

Handler = Callable[[Message, Context], Message]
PARTS, IN_FORCE = "parts.json", "config-in-force.json"

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run all parts; fail in the end if one has failed."""
    folder = Path(str(context.run_config["output-dir"]))
    failure: Exception | None = None
    for name, overrides in json.loads((folder / PARTS).read_text(encoding="utf-8")).items():
        config = {**context.run_config, "output-dir": str(folder / name), **overrides}
        (folder / IN_FORCE).write_text(json.dumps(config), encoding="utf-8")
        log(INFO, "Part %s begins", name)
        outcome = "completed"
        try:
            run(grid, dataclasses.replace(context, run_config=config))
        except Exception as error:  # noqa: BLE001 - the other parts have their own outcome
            outcome, failure = "failed", error
            log(ERROR, "The run raised:", exc_info=True)
        log(INFO, "Part %s %s", name, outcome)
    if failure is not None:
        raise failure


def of_part(handle: Handler) -> Handler:
    """Give a handler the run config that is in force."""

    def answer(message: Message, context: Context) -> Message:
        path = Path(str(context.run_config["output-dir"])) / IN_FORCE
        config = json.loads(path.read_text(encoding="utf-8"))
        return handle(message, dataclasses.replace(context, run_config=config))

    return answer


client = ClientApp()
client.train()(of_part(handle_train))
client.evaluate()(of_part(handle_evaluate))
client.query()(of_part(handle_query))
