"""Trimming against torch.topk and Python's sort."""

from __future__ import annotations

import math

import pytest
import torch

from adapterops.linalg import trimming
from adapterops.linalg.trimming import Cut, find_cut, trim_


def expected(values: torch.Tensor, keep: int) -> torch.Tensor:
    """The `keep` largest by a stable sort: the first in row-major order where magnitudes tie."""
    flat = values.reshape(-1)
    kept = flat.abs().sort(descending=True, stable=True).indices[:keep]
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).reshape(values.shape)


def trimmed(values: torch.Tensor, keep: int, rows: int = 0) -> torch.Tensor:
    out, cut = values.clone(), find_cut(values, keep)
    for start in range(0, len(out), rows or len(out)):
        trim_(out[start : start + (rows or len(out))], cut, start * values[0].numel())
    return out


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SIZE = (200, 1000)  # large enough to be sampled
TENSORS = {
    "normal": torch.randn(SIZE, generator=generator()),
    "product": torch.randn(200, 8, generator=generator(1)) @ torch.randn(8, 1000, generator=generator(2)),
    "heavy tails": torch.randn(SIZE, generator=generator(3)) ** 9,
    "bfloat16": torch.randn(SIZE, generator=generator(4)).bfloat16().float(),
    "few values": torch.randint(-3, 4, SIZE, generator=generator(5)).float(),
    "signs": torch.randn(SIZE, generator=generator(6)).sign(),
    "mostly zeros": torch.nn.functional.dropout(torch.ones(SIZE), 0.97) * torch.randn(SIZE, generator=generator(7)),
    "tiny": torch.randn(SIZE, generator=generator(8)) * 1e-42,
    "sorted": torch.linspace(-1, 2, 200_000).reshape(SIZE),
    "small": torch.randn(5, 7, generator=generator(9)),
    "small, tied": torch.randint(-2, 3, (5, 7), generator=generator(10)).float(),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("density", [0.001, 0.2, 0.97])
def test_exactly_the_largest_are_kept(name: str, density: float) -> None:
    values = TENSORS[name]
    keep = int(density * values.numel())
    assert torch.equal(trimmed(values, keep), expected(values, keep))


@pytest.mark.parametrize("name", ["normal", "few values", "bfloat16", "mostly zeros"])
def test_the_threshold_is_topks(name: str) -> None:
    values, keep = TENSORS[name], 40_000
    assert find_cut(values, keep).threshold == float(values.abs().reshape(-1).topk(keep).values[-1])


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("name", ["normal", "few values"])
def test_blocks_give_what_the_whole_gives(name: str, rows: int) -> None:
    values = TENSORS[name]
    assert torch.equal(trimmed(values, 60_001, rows), expected(values, 60_001))


def test_of_ties_the_first_are_kept() -> None:
    values = torch.tensor([[1.0, -2.0, 2.0], [2.0, -2.0, 0.5]])
    assert find_cut(values, 3) == Cut(2.0, 3)
    assert trimmed(values, 3).tolist() == [[0.0, -2.0, 2.0], [2.0, 0.0, 0.0]]
    assert trimmed(values, 3, rows=1).tolist() == [[0.0, -2.0, 2.0], [2.0, 0.0, 0.0]]


def test_nothing_and_everything() -> None:
    values = TENSORS["normal"]
    assert find_cut(values, 0).threshold == math.inf
    assert not trimmed(values, 0).any()
    assert torch.equal(trimmed(values, values.numel()), values)
    assert torch.equal(trimmed(values, values.numel() + 1), values)
    assert find_cut(torch.zeros(4, 4), 3).threshold == 0.0
    assert not trimmed(torch.zeros(4, 4), 3).any()
    assert torch.equal(trimmed(values, values.numel() - 1), expected(values, values.numel() - 1))
    assert torch.equal(trimmed(values, 1), expected(values, 1))


@pytest.mark.parametrize("name", ["normal", "few values", "mostly zeros", "small", "tiny"])
def test_bisecting_finds_what_sampling_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = TENSORS[name]
    keep = values.numel() // 5
    wanted = find_cut(values, keep)
    monkeypatch.setattr(trimming, "_sampled", lambda bits, keep: None)
    assert find_cut(values, keep) == wanted


@pytest.mark.parametrize(
    "bracket", [(0, 1), (0, 0), (0x3F800000, 0x3F800000), (0x7F000000, 0x7FFFFFFF), (0, 0x7FFFFFFF)]
)
def test_a_sample_that_misleads_costs_only_time(bracket: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    values = TENSORS["normal"]
    monkeypatch.setattr(trimming, "_bracket", lambda bits, keep: bracket)
    assert torch.equal(trimmed(values, 30_000), expected(values, 30_000))


def test_what_the_sample_does_not_see() -> None:
    # Every sampled entry is zero, and all that counts lies between.
    flat = torch.randn(1 << 20, generator=generator())
    flat[:: (flat.numel() // (1 << 18)) | 1] = 0
    assert torch.equal(trimmed(flat, 1 << 19), expected(flat, 1 << 19))


def test_the_tensor_is_left_as_it_is() -> None:
    values = TENSORS["normal"].clone()
    find_cut(values, 1000)
    assert torch.equal(values, TENSORS["normal"])
    block = values[100:150]
    assert trim_(block, Cut(1.0, -1), 100_000) is block
    assert torch.equal(values[:100], TENSORS["normal"][:100])
    assert torch.equal(values[150:], TENSORS["normal"][150:])
