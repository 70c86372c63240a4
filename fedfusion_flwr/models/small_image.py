# SPDX-License-Identifier: Apache-2.0
"""torchvision networks with a stem for small images."""

from __future__ import annotations

from torch import nn


def resnet18(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """ResNet-18, untrained, that does not shrink the image before its first stage.

    The stem made for 224x224 pixels would leave 8x8 of a 32x32 image: here it is a 3x3 convolution
    of stride 1 without pooling.

    Parameters
    ----------
    input_shape : tuple[int, int, int]
        Channels, height and width of an image.
    num_classes : int
        Width of the output.
    """
    # Here and not above: the import takes about a second, in every process of a simulation.
    from torchvision import models

    model: nn.Module = models.resnet18(weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(input_shape[0], 64, kernel_size=3, padding=1, bias=False)
    # As torchvision initializes the convolution that this one replaces.
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
