"""Blocks of 4-bit numbers, beside what bitsandbytes makes of the same."""

from __future__ import annotations

import pytest
import torch

from adapterops.linalg import four_bit

functional = pytest.importorskip("bitsandbytes.functional")

SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def samples(kind: str) -> torch.Tensor:
    """Numbers of all sizes, some on and beside the bounds between two values, blocks of nothing, and what is no number."""
    generator = torch.Generator().manual_seed(0)
    usual = 0.02 * torch.randn(1 << 15, generator=generator)
    any_bits = torch.randint(-(1 << 31), 1 << 31, (1 << 15,), generator=generator).to(torch.int32).view(torch.float32)
    finite = torch.where(any_bits.isfinite(), any_bits, 1.0)
    bounds = torch.from_numpy(four_bit._levels(kind, functional).bounds)
    beside = torch.stack([bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0))]).view(-1)
    edges = torch.cat([beside, torch.ones(1)]).repeat(4096)[:4096]  # every block's largest is 1
    tiny = torch.full((4096,), 1e-42)
    broken = torch.randn(4096, generator=generator)
    broken[5], broken[3000], broken[3001] = float("nan"), float("inf"), float("-inf")
    return torch.cat([usual, any_bits, finite, edges, torch.zeros(4096), tiny, broken])


def bits(numbers: torch.Tensor) -> torch.Tensor:
    """All NaN the same: which one it is may differ."""
    return torch.where(numbers.isnan(), float("nan"), numbers).view(torch.int32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("extra", [0, 1, 7, 31], ids=lambda extra: f"{extra} numbers more")
def test_as_bitsandbytes_packs(kind: str, size: int, extra: int) -> None:
    numbers = torch.cat([samples(kind), torch.linspace(-3, 2, extra)])
    packed, state = four_bit.quantise(functional, numbers, size, kind)
    expected, other = functional.quantize_4bit(numbers, blocksize=size, quant_type=kind)
    assert torch.equal(packed, expected)
    assert torch.equal(bits(state.absmax), bits(other.absmax))
    made, theirs = functional.dequantize_4bit(packed, state), functional.dequantize_4bit(expected, other)
    assert torch.equal(bits(made), bits(theirs))
    assert made.shape == theirs.shape
    assert made.numel() == numbers.numel()
