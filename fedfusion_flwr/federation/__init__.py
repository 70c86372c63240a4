# SPDX-License-Identifier: Apache-2.0
"""The engine that all strategies share: what a round is, whatever the algorithm."""
