"""Weighted sums of low-rank matrices against torch's decomposition of the whole matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from adapterops.linalg.lowrank import Lengths, Pair, Stacked

ROWS, COLUMNS, RANK = 120, 90, 6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(seed: int, rank: int = RANK) -> Pair:
    return random(ROWS, rank, seed=seed), random(rank, COLUMNS, seed=seed + 100)


def graded(seed: int, by: float) -> Pair:
    """Columns and rows that get smaller, down to 10^-by."""
    b, a = pair(seed)
    size = torch.logspace(0, -by, RANK, dtype=torch.float64)
    return b * size, a * size[:, None]


def near(seed: int, by: float) -> list[Pair]:
    """Two whose A's differ by so little."""
    (b, a), (other, noise) = pair(seed), pair(seed + 1)
    return [(b, a), (other, a + by * noise)]


CASES: dict[str, Callable[[], list[Pair]]] = {
    "well apart": lambda: [pair(0), pair(1), pair(2)],
    "of different ranks": lambda: [pair(0, 2), pair(1, 7), pair(2, 4)],
    "of 16 bits": lambda: [(b.bfloat16(), a.bfloat16()) for b, a in (pair(0), pair(1))],
    "falling to 1e-3": lambda: [graded(0, 3), graded(1, 3)],
    "falling to 1e-9": lambda: [graded(0, 9), graded(1, 9)],
    "the same twice": lambda: [pair(0), pair(0)],
    "with one A": lambda: [pair(0), (random(ROWS, RANK, seed=9), pair(0)[1])],
    "with nearly one A": lambda: near(0, 1e-3),
    "with an A and its rounding": lambda: near(0, 1e-8),
    "with a B of zeros": lambda: [pair(0), (torch.zeros(ROWS, RANK), pair(1)[1])],
    "of large numbers": lambda: [(b * 1e100, a * 1e80) for b, a in (pair(0), pair(1))],
    "of small numbers": lambda: [(b * 1e-90, a * 1e-100) for b, a in (pair(0), pair(1))],
}
HALF = ("the same twice", "with one A", "with an A and its rounding", "with a B of zeros")
"""Gram matrices of factors that depend on each other leave half the digits of the values that should be nothing."""
WEIGHTS = (1.0, -0.5, 2.0)
SCALES = (2.0, 1.0, 0.25)


def roots(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return s.sqrt(), s.sqrt()


LENGTHS: dict[str, Lengths] = {"roots": roots, "left": lambda s: (s, s * 0 + 1), "right": lambda s: (s * 0 + 1, s)}


def total(pairs: Sequence[Pair], weights: Sequence[float] = WEIGHTS, scales: Sequence[float] = SCALES) -> torch.Tensor:
    parts = [w * s * (b.double() @ a.double()) for (b, a), w, s in zip(pairs, weights, scales, strict=False)]
    return torch.stack(parts).sum(dim=0)


@pytest.mark.parametrize("rank", [1, RANK, None])
@pytest.mark.parametrize("name", CASES)
def test_the_best_of_a_rank(name: str, rank: int | None) -> None:
    pairs = CASES[name]()
    count = len(pairs)
    found = Stacked.of(pairs, SCALES[:count]).decompose([WEIGHTS[:count]], rank)
    whole = total(pairs)
    size = float(whole.abs().max())  # the squares of large numbers are infinite
    values = torch.linalg.svdvals(whole / size)
    norm = float(values.norm())
    best = float(values[rank:].norm()) if rank is not None else 0.0
    one = found.of(0)
    off = float(((whole - (one.u * one.s) @ one.vh) / size).norm())
    assert off <= best + (1e-8 if name == "with an A and its rounding" else 1e-12) * norm
    assert torch.allclose(one.s / size, values[: len(one.s)], rtol=0, atol=(1e-8 if name in HALF else 1e-12) * norm)
    assert found.cancels == [False]
    kept = min(1.0, float(values[: len(one.s)].square().sum()) / norm**2)
    if 1e-150 < size < 1e150:
        assert one.energy == pytest.approx((norm * size) ** 2)
        assert found.kept == [pytest.approx(kept)]
        assert one.kept == pytest.approx(kept)


@pytest.mark.parametrize("off", [1e-5, 1e-9])
def test_terms_that_cancel(off: float) -> None:
    """A Gram matrix would have lost every digit of what is left."""
    (b, a), (noise, _) = pair(0), pair(1)
    pairs = [(b, a), (b + off * noise, a)]
    found = Stacked.of(pairs).decompose([[1.0, -1.0]], RANK)
    whole = total(pairs, (1.0, -1.0), (1.0, 1.0))
    assert found.cancels == [True]
    rounding = 1e-14 * float((b @ a).norm())
    one = found.of(0)
    assert float((whole - (one.u * one.s) @ one.vh).norm()) <= rounding
    assert float(whole.norm()) > 10 * rounding


def test_what_is_nothing_at_all() -> None:
    pairs = [(torch.zeros(ROWS, RANK), pair(0)[1]), (pair(1)[0], torch.zeros(RANK, COLUMNS))]
    whole = Stacked.of(pairs)
    found = whole.decompose([[1.0, 1.0]], RANK)
    assert found.energies == [0.0]
    assert found.kept == [1.0]
    assert found.cancels == [False]
    assert not found.s.any()
    assert torch.isfinite(found.u).all()
    assert torch.isfinite(found.vh).all()
    even = whole.decompose([[1.0, 1.0]], RANK, roots)
    assert not even.u.any()
    assert not even.vh.any()
    assert even.errors(even.u, even.vh) == [0.0]
    assert even.errors(even.u + 1, even.vh + 1) == [pytest.approx(RANK * (ROWS * COLUMNS) ** 0.5)]


def test_a_weight_of_zero() -> None:
    pairs = [pair(0), pair(1), pair(2)]
    found = Stacked.of(pairs).decompose([[1.0, 0.0, 1.0]], 3 * RANK).of(0)
    whole = total(pairs, (1.0, 0.0, 1.0), (1.0, 1.0, 1.0))
    assert float((whole - (found.u * found.s) @ found.vh).norm()) <= 1e-12 * float(whole.norm())


def several(modules: Sequence[Sequence[Pair]]) -> Stacked:
    b = torch.stack([torch.cat([b for b, _ in own], dim=1) for own in modules])
    a = torch.stack([torch.cat([a for _, a in own], dim=0) for own in modules])
    return Stacked(b, a, [RANK, RANK], [SCALES[:2]] * len(modules))


def test_no_module_depends_on_the_others() -> None:
    """To the bit; one of them is of those that need another way."""
    modules = [CASES[name]() for name in ("falling to 1e-3", "the same twice", "with one A", "with nearly one A")]
    (b, a) = pair(0)
    modules.append([(b, a), (b * -2 * (1 + 1e-7), a)])  # cancels
    weights = [[1.0, 1.0]] * 5
    together = several(modules)
    found = together.decompose(weights, RANK)
    split = together.decompose(weights, RANK, roots)
    rounded = split.u.bfloat16(), split.vh.bfloat16()
    errors = split.errors(*rounded)
    assert found.cancels == [False, False, False, False, True]
    for n, own in enumerate(modules):
        lone = several([own])
        alone = lone.decompose([weights[n]], RANK)
        for one, other in ((alone.u, found.u), (alone.s, found.s), (alone.vh, found.vh), (lone.inner, together.inner)):
            assert torch.equal(one[0], other[n])
        even = lone.decompose([weights[n]], RANK, roots)
        assert torch.equal(even.u[0], split.u[n])
        assert torch.equal(even.vh[0], split.vh[n])
        parts = (part[n : n + 1] for part in rounded)
        assert even.errors(*parts) == [pytest.approx(errors[n], rel=1e-9)]


def test_inner_products() -> None:
    pairs = CASES["of different ranks"]()
    whole = Stacked.of(pairs, SCALES)
    deltas = [s * b @ a for (b, a), s in zip(pairs, SCALES, strict=True)]
    expected = torch.tensor([[float((one * two).sum()) for two in deltas] for one in deltas], dtype=torch.float64)
    assert torch.allclose(whole.inner[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, RANK, None])
@pytest.mark.parametrize("lengths", ["roots", "left", "right"])
@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("numbers")])
def test_errors_are_those_of_the_dense_matrices(name: str, lengths: str, rank: int | None, dtype: torch.dtype) -> None:
    """Of truncation and rounding together; what is as good as exact is told so to some 1e-7."""
    pairs = CASES[name]()
    merged = total(pairs)
    size = float(merged.norm())
    found = Stacked.of(pairs, SCALES[: len(pairs)]).decompose([WEIGHTS[: len(pairs)]], rank, LENGTHS[lengths])
    b, a = found.u.to(dtype), found.vh.to(dtype)
    expected = float((merged - b[0].double() @ a[0].double()).norm()) / size
    assert found.errors(b, a) == [pytest.approx(expected, rel=1e-3, abs=1e-7)]


def uneven(by: float) -> list[Pair]:
    """Numbers that float32 holds, though not what the columns of B are multiplied by."""
    b, a = pair(0)
    return [((b * by).float().double(), (a * 1e37).float().double()), (pair(1)[0] * by * 1e37, pair(1)[1])]


SINGLE: dict[str, Callable[[], list[Pair]]] = {
    **{name: make for name, make in CASES.items() if not name.endswith("numbers")},
    "with a B below the normal numbers": lambda: uneven(1e-41),
    "of large 32-bit numbers": lambda: [(b * 1e24, a * 1e24) for b, a in (pair(0), pair(1))],
    "of small 32-bit numbers": lambda: [(b * 1e-24, a * 1e-24) for b, a in (pair(0), pair(1))],
}


@pytest.mark.parametrize("rank", [1, RANK, None])
@pytest.mark.parametrize("name", SINGLE)
def test_float32_for_who_rounds_to_16_bits(name: str, rank: int | None) -> None:
    """No worse than in float64, by what bfloat16 rounds off; and the error that is told is that of the dense matrices."""
    pairs = SINGLE[name]()
    merged = total(pairs)
    whole, weights = Stacked.of(pairs, SCALES[: len(pairs)]), [WEIGHTS[: len(pairs)]]
    losses = []
    for single in (False, True):
        found = whole.decompose(weights, rank, roots, single)
        assert found.u.dtype == found.vh.dtype == (torch.float32 if single else torch.float64)
        b, a = found.u.bfloat16(), found.vh.bfloat16()
        losses.append(float((merged - b[0].double() @ a[0].double()).norm() / merged.norm()))
        assert found.errors(b, a) == [pytest.approx(losses[-1], rel=1e-3)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_float32_and_what_cancels() -> None:
    """Just not enough for another way: of the digits that are lost float32 has them to spare."""
    (b, a), (noise, _) = pair(0), pair(1)
    pairs = [(b, a), (b + 3 * 1e-3 * noise, a)]
    losses = []
    for single in (False, True):
        found = Stacked.of(pairs).decompose([[1.0, -1.0]], RANK, roots, single)
        assert found.cancels == [False]
        whole = total(pairs, (1.0, -1.0), (1.0, 1.0))
        losses.append(float((whole - (found.u.double() @ found.vh.double())[0]).norm() / whole.norm()))
    assert losses[1] <= losses[0] + 2.0**-13
