# SPDX-License-Identifier: Apache-2.0
"""torchvision networks, untrained, with stems for small images.

Built for 224x224 pixels, they would shrink 32x32 or 28x28 to a pixel or two before their last
stage. Here they shrink images less; the feature maps are

============  =================================  ================  ================
network       where                              of 32x32          of 28x28
============  =================================  ================  ================
resnet18      stages 1 to 4                      32, 16, 8, 4      28, 14, 7, 4
densenet121   dense blocks 1 to 4                32, 16, 8, 4      28, 14, 7, 3
mobilenetv2   stem; 24, 32, 64, 160 channels     32; 32, 16, 8, 4  28; 28, 14, 7, 4
============  =================================  ================  ================

A replaced convolution is initialized as torchvision initializes it. Each function takes the shape
of an image (channels, height, width) and the number of classes. torchvision is imported inside
the functions: the import takes about a second, in every process of a simulation.
"""

from __future__ import annotations

from typing import Literal

from torch import nn


def resnet18(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """ResNet-18 with a 3x3 stem of stride 1 and without the pooling after it."""
    from torchvision import models

    model: nn.Module = models.resnet18(weights=None, num_classes=num_classes)
    model.conv1 = _stem(input_shape[0], 64, mode="fan_out")
    model.maxpool = nn.Identity()
    return model


def densenet121(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """DenseNet-121 with a 3x3 stem of stride 1 and without the pooling after it."""
    from torchvision import models

    model: nn.Module = models.densenet121(weights=None, num_classes=num_classes)
    model.set_submodule("features.conv0", _stem(input_shape[0], 64, mode="fan_in"))
    model.set_submodule("features.pool0", nn.Identity())
    return model


MOBILENETV2_STAGES = [
    # expansion, channels, blocks, stride of the first block; torchvision's second has stride 2
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]


def mobilenetv2(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """MobileNetV2 with stride 1 in its stem and in its second stage.

    torchvision's dropout of 0.2 before the classifier stays, so that results compare with those
    that others report; `training.train` draws it from the client's own generator.
    """
    from torchvision import models

    model: nn.Module = models.mobilenet_v2(
        weights=None, num_classes=num_classes, inverted_residual_setting=MOBILENETV2_STAGES
    )
    model.set_submodule("features.0.0", _stem(input_shape[0], 32, mode="fan_out"))
    return model


def _stem(in_channels: int, out_channels: int, *, mode: Literal["fan_in", "fan_out"]) -> nn.Conv2d:
    stem = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode=mode)
    return stem
