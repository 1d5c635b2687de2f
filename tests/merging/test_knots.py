"""KnOTS against one dense SVD of the deltas side by side."""

from __future__ import annotations

import pytest
import torch
from merge_samples import draws, pairs, product

from adapterops.linalg.lowrank import Pair
from adapterops.merging.methods.knots import align, knots
from adapterops.merging.registry import Space, find

RANKS = (4, 3, 2)


def merged(
    given: list[Pair], weights: list[float], inner: str = "ties", density: float = 0.3, majority: str = "total"
) -> torch.Tensor:
    return product(
        knots(
            given,
            weights,
            8,
            draws=draws(len(given)),
            density=density,
            inner=inner,
            majority_sign=majority,
            sign_election="weighted",
        )
    )


def reference(given: list[Pair], weights: list[float], inner: str, density: float) -> torch.Tensor:
    """The dense SVD of [Δ₁ … Δ_K], its Σ·Vₖ pruned, elected and averaged, and U put before them again."""
    deltas = [product(pair) for pair in given]
    u, s, vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    keep = s > 1e-5
    u, s, vh = u[:, keep], s[keep], vh[keep]
    # An SVD leaves the signs of its vectors open; random masks need no sign, the election of equal sums would.
    parts = [(s[:, None] * part).float() for part in vh.split(deltas[0].shape[1], dim=1)]
    pruned = []
    for k, part in enumerate(parts):
        if inner.startswith("dare"):
            mask = torch.from_numpy(draws(k + 1)[k].keep(0, part.numel(), density)).reshape(part.shape)
            pruned.append(part * mask / density)
        else:
            kept = part.abs().flatten().topk(int(density * part.numel())).indices
            pruned.append(torch.zeros(part.numel()).index_copy(0, kept, part.flatten()[kept]).reshape(part.shape))
    weighted = torch.stack([w * p for w, p in zip(weights, pruned, strict=True)])
    if inner in ("dare_linear", "magnitude_prune"):
        merged_parts = weighted.sum(dim=0)
    else:
        agrees = torch.where(weighted.sum(dim=0) >= 0, weighted > 0, weighted < 0)
        merged_parts = (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp_min(1)
    out: torch.Tensor = u @ merged_parts.double()
    return out


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -1.0, 2.0]])
@pytest.mark.parametrize("inner", ["ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_it_merges_in_the_common_basis(inner: str, weights: list[float]) -> None:
    given = pairs(RANKS)
    torch.testing.assert_close(
        merged(given, weights, inner), reference(given, weights, inner, 0.3), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(18, 14), (5, 30), (30, 5)])
def test_the_basis_is_that_of_the_deltas_side_by_side(shape: tuple[int, int]) -> None:
    given = pairs(RANKS, *shape)
    basis, aligned = align(given)
    assert basis.shape[1] == min(sum(RANKS), shape[0])
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    for pair, part in zip(given, aligned, strict=True):
        torch.testing.assert_close(basis @ part, product(pair))
    side = torch.cat([product(pair) for pair in given], dim=1)
    wanted = torch.linalg.svdvals(side)[: basis.shape[1]]
    torch.testing.assert_close(torch.cat(aligned, dim=1).norm(dim=1), wanted)


@pytest.mark.parametrize("inner", ["dare_linear", "magnitude_prune"])
def test_a_density_of_1_gives_the_weighted_sum(inner: str) -> None:
    given, weights = pairs(RANKS), [0.5, -1.0, 2.0]
    wanted = sum(w * product(pair) for w, pair in zip(weights, given, strict=True))
    torch.testing.assert_close(merged(given, weights, inner, 1.0), wanted, rtol=1e-5, atol=1e-5)


def test_equal_adapters_give_one_of_them_and_its_rank() -> None:
    pair = pairs([3])[0]
    assert align([pair] * 4)[0].shape[1] == 3
    torch.testing.assert_close(merged([pair] * 4, [1.0] * 4, density=1.0), product(pair), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged([pair], [1.0], density=1.0), product(pair), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_order_and_scale(majority: str) -> None:
    given, weights = pairs(RANKS), [1.0, 0.5, 2.0]
    one = merged(given, weights, majority=majority)
    torch.testing.assert_close(merged(given[::-1], weights[::-1], majority=majority), one, rtol=1e-5, atol=1e-5)
    scaled = [(4 * b, a) for b, a in given]
    torch.testing.assert_close(merged(scaled, weights, majority=majority), 4 * one, rtol=1e-5, atol=1e-5)


def test_zero_deltas() -> None:
    pair = pairs([3])[0]
    zero = (torch.zeros_like(pair[0]), pair[1])
    assert not merged([zero, zero], [1.0, 1.0]).any()
    torch.testing.assert_close(merged([pair, zero], [1.0, 1.0], density=1.0), product(pair), rtol=1e-5, atol=1e-5)


def test_it_is_declared() -> None:
    method, space = find("knots")
    assert space is Space.DELTA
    assert method.settle({"density": 0.2})["inner"] == "ties"
