# SPDX-License-Identifier: Apache-2.0
"""The Flower app: a run from the server's and from the client's side."""
