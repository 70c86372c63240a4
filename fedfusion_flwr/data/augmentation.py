# SPDX-License-Identifier: Apache-2.0
"""Random crops and flips of whole batches of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """What training may do to images at random.

    Attributes
    ----------
    crop_padding : int
        Black pixels added to every side before cropping back at random; 0 for no crops.
    flip : bool
        Mirror every other image, left to right.
    """

    crop_padding: int = 0
    flip: bool = False


NO_AUGMENTATION = Augmentation()
CROP_AND_FLIP = Augmentation(crop_padding=4, flip=True)
"""The usual choice for small photographs."""


def augment(
    x: Tensor, augmentation: Augmentation, generator: torch.Generator, fill: Tensor
) -> Tensor:
    """Crop and flip each image of a batch on its own.

    Parameters
    ----------
    x : Tensor
        Images (N, C, H, W), floating point, on any device; not changed.
    augmentation : Augmentation
        What to do.
    generator : torch.Generator
        On the CPU, so that every device draws the same.
    fill : Tensor
        Value of a padding pixel, (C,).

    Returns
    -------
    Tensor
        (N, C, H, W): a window of the padded image at one of (2 * crop_padding + 1)^2 equally likely
        places, mirrored with probability 1/2.
    """
    count, channels, height, width = x.shape
    pad = augmentation.crop_padding
    places = torch.randint(2 * pad + 1, (2, count, 1), generator=generator)
    rows = places[0] + torch.arange(height)
    columns = places[1] + torch.arange(width)
    if augmentation.flip:
        mirrored = torch.rand((count, 1), generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    # Channels last: the gather below then copies whole pixels, and convolutions run on it as it is.
    padded = fill.to(x).expand(count, height + 2 * pad, width + 2 * pad, channels).contiguous()
    padded[:, pad : pad + height, pad : pad + width] = x.permute(0, 2, 3, 1)
    images = torch.arange(count, device=x.device)[:, None, None]
    windows = padded[images, rows.to(x.device)[:, :, None], columns.to(x.device)[:, None, :]]
    return windows.permute(0, 3, 1, 2)
