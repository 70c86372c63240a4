# SPDX-License-Identifier: Apache-2.0
"""Random crops and flips of whole batches of images."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Augmentation:
    """What training may do to images at random.

    Attributes
    ----------
    crop_padding : int
        Pad every side by this many black pixels and crop back at random; 0 does not.
    flip : bool
        Mirror every other image, left to right.
    """

    crop_padding: int = 0
    flip: bool = False


NO_AUGMENTATION = Augmentation()
