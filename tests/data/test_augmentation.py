# SPDX-License-Identifier: Apache-2.0
"""Random crops and flips: windows of the padded image, mirrored or not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfusion_flwr.data.augmentation import Augmentation, augment
from fedfusion_flwr.randomness import torch_generator


def generator(seed: int = 0) -> torch.Generator:
    return torch_generator(seed, "augmentation", 1)


def applied(x: Tensor, padding: int, flip: bool, fill: float = -9.0, seed: int = 0) -> Tensor:
    black = torch.full((x.shape[1],), fill)
    return augment(x, Augmentation(padding, flip), generator(seed), black)


def test_every_window_of_a_tiny_image() -> None:
    """[[1, 2], [3, 4]] in a frame of -9 has nine windows of 2x2."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(500, 1, 2, 2)
    seen = {tuple(image.flatten().tolist()) for image in applied(x, 1, flip=False)}
    assert seen == {
        *((-9, -9, -9, 1), (-9, -9, 1, 2), (-9, -9, 2, -9)),
        *((-9, 1, -9, 3), (1, 2, 3, 4), (2, -9, 4, -9)),
        *((-9, 3, -9, -9), (3, 4, -9, -9), (4, -9, -9, -9)),
    }


def test_flip_mirrors_left_to_right_half_of_the_images() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).expand(2000, 2, 2, 3)
    result = applied(x, 0, flip=True)
    mirrored = (result == x.flip(3)).all((1, 2, 3))
    assert (mirrored | (result == x).all((1, 2, 3))).all()
    # Five standard deviations of a binomial.
    assert abs(int(mirrored.sum()) - 1000) < 5 * (2000 * 0.25) ** 0.5


def test_windows_are_equally_likely() -> None:
    x = torch.arange(9.0).reshape(1, 1, 3, 3).expand(5000, 1, 3, 3)
    centres = applied(x, 1, flip=False)[:, 0, 1, 1].long()
    counts = centres.bincount(minlength=9)
    assert (counts - 5000 / 9).abs().max() < 5 * (5000 * 8 / 81) ** 0.5


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    *[st.integers(1, 6)] * 2,
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_every_result_is_a_window_of_its_padded_image(
    count: int, channels: int, height: int, width: int, padding: int, flip: bool, seed: int
) -> None:
    # Every pixel of every image differs from all others and from the padding.
    numbers = torch.arange(1.0, count * channels * height * width + 1)
    x = numbers.reshape(count, channels, height, width)
    fill = -torch.arange(1.0, channels + 1)
    before = x.clone()
    result = augment(x, Augmentation(padding, flip), generator(seed), fill)
    assert torch.equal(x, before)
    assert result.shape == x.shape
    for image, original in zip(result, x, strict=True):
        frame = fill[:, None, None].repeat(1, height + 2 * padding, width + 2 * padding)
        frame[:, padding : padding + height, padding : padding + width] = original
        windows = [
            frame[:, top : top + height, left : left + width]
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        ]
        candidates = windows + [w.flip(2) for w in windows] if flip else windows
        assert any(torch.equal(image, candidate) for candidate in candidates)


def test_images_are_treated_each_on_its_own() -> None:
    x = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(32, 1, 1, 1)
    assert len({tuple(image.flatten().tolist()) for image in applied(x, 4, flip=True)}) > 16


def test_generator_decides() -> None:
    x = torch.randn(16, 3, 8, 8, generator=generator(5))
    assert torch.equal(applied(x, 4, flip=True, seed=1), applied(x, 4, flip=True, seed=1))
    assert not torch.equal(applied(x, 4, flip=True, seed=1), applied(x, 4, flip=True, seed=2))
    state = torch.random.get_rng_state()
    applied(x, 4, flip=True)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_nothing_to_do_changes_nothing() -> None:
    x = torch.randn(4, 3, 8, 8, generator=generator())
    assert torch.equal(applied(x, 0, flip=False), x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same() -> None:
    x = torch.randn(16, 3, 8, 8, generator=generator())
    assert torch.equal(applied(x.cuda(), 4, flip=True).cpu(), applied(x, 4, flip=True))
