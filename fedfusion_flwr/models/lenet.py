# SPDX-License-Identifier: Apache-2.0
"""A small convolutional network with batch normalization, for digits and other small images."""

from __future__ import annotations

from torch import Tensor, nn


class LeNet(nn.Module):
    """Two blocks of 5x5 convolution, BatchNorm, ReLU and 2x2 max pooling; then a 60-unit head.

    Parameters
    ----------
    input_shape : tuple[int, int, int]
        Channels, height and width of an image; height and width at least 4.
    num_classes : int
        Width of the output.
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.features = nn.Sequential(_block(channels, 16), _block(16, 32))
        self.head = nn.Sequential(
            nn.Linear(32 * (height // 4) * (width // 4), 60), nn.ReLU(), nn.Linear(60, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, C, H, W)."""
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        # No bias: the normalization that follows would cancel it.
        nn.Conv2d(in_channels, out_channels, kernel_size=5, padding=2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
