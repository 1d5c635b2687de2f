"""Random numbers against the published generator, and what must not change them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from adapterops.linalg.random import Draw

M64 = (1 << 64) - 1


def philox(counter: int, key: int) -> list[int]:
    """Philox4x64-10 as its paper defines it: four words of 64 bits."""
    c0, c1, c2, c3 = (counter >> 64 * i & M64 for i in range(4))
    k0, k1 = key & M64, key >> 64
    for _ in range(10):
        left, right = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = right >> 64 ^ c1 ^ k0, right & M64, left >> 64 ^ c3 ^ k1, left & M64
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & M64, k1 + 0xBB67AE8584CAA73B & M64
    return [c0, c1, c2, c3]


def test_the_reference_gives_the_papers_numbers() -> None:
    # Random123's published answer for a counter and a key of zeros.
    wanted = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox(0, 0) == wanted


def test_words_are_philox_under_a_hash_of_the_purpose() -> None:
    digest = hashlib.blake2b(b"int:3\0str:lora_A", digest_size=16).digest()
    key = int.from_bytes(digest, "little")
    words = [part for step in range(1, 4) for word in philox(step, key) for part in (word & 0xFFFFFFFF, word >> 32)]
    assert Draw(3, "lora_A").words(0, 24).tolist() == words


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 9), (7, 8), (8, 16), (95, 1000), (500, 500)])
def test_a_part_is_that_part_of_the_whole(start: int, stop: int) -> None:
    draw = Draw(0, "unet", "down.0")
    assert np.array_equal(draw.words(start, stop), draw.words(0, 1000)[start:stop])
    assert np.array_equal(draw.uniform(start, stop), draw.uniform(0, 1000)[start:stop])
    assert np.array_equal(draw.keep(start, stop, 0.3), draw.keep(0, 1000, 0.3)[start:stop])


def test_each_purpose_has_its_own_numbers() -> None:
    purposes = [(0, "a"), (1, "a"), (0, "b"), ("0", "a"), (0, "a", ""), ("a", 0), (0,)]
    assert len({Draw(*purpose).words(0, 4).tobytes() for purpose in purposes}) == len(purposes)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.93])
def test_masks_have_their_density(density: float) -> None:
    count = 1 << 20
    kept = int(Draw("mask").keep(0, count, density).sum())
    assert abs(kept - density * count) < 5 * (count * density * (1 - density)) ** 0.5


def test_a_mask_holds_every_mask_of_smaller_density() -> None:
    draw = Draw("mask")
    assert not (draw.keep(0, 4096, 0.2) & ~draw.keep(0, 4096, 0.6)).any()
    assert draw.keep(0, 4096, 1.0).all()
    assert draw.keep(0, 4096, 0.5).dtype == np.bool_


def test_uniform_numbers_fill_their_interval() -> None:
    numbers = Draw("uniform").uniform(0, 1 << 20)
    assert numbers.dtype == np.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    assert float(((counts - (1 << 14)) ** 2).sum() / (1 << 14)) < 63 + 5 * (2 * 63) ** 0.5


def test_normal_numbers_are_normal_and_repeatable() -> None:
    numbers = Draw("start").normal(1 << 18)
    assert numbers.dtype == np.float32
    assert abs(float(numbers.mean())) < 0.01
    assert abs(float(numbers.std()) - 1) < 0.01
    assert np.array_equal(numbers, Draw("start").normal(1 << 18))
