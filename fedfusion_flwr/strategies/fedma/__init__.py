# SPDX-License-Identifier: Apache-2.0
"""FedMA: layer-wise matched averaging."""

from fedfusion_flwr.strategies.fedma.fedma import FedMA, class_weights

__all__ = ["FedMA", "class_weights"]
