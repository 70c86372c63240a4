# SPDX-License-Identifier: Apache-2.0
"""The ClientApp: train, evaluate and answer normalization probes."""

from flwr.clientapp import ClientApp

from fedfusion_flwr.app.client import handle_evaluate, handle_query, handle_train

app = ClientApp()
app.train()(handle_train)
app.evaluate()(handle_evaluate)
app.query()(handle_query)
