# SPDX-License-Identifier: Apache-2.0
"""One Flower strategy: what a round is, whatever the algorithm."""
