"""Methods on singular vectors, of deltas that have no low-rank factors: held to the papers' formulas in float64.

TSV-Merge arXiv:2412.00081 (`TSVM_utils.py` of github.com/AntoAndGar/task_singular_vectors), KnOTS arXiv:2410.19735
(`SVDMerger` of github.com/gstoica27/KnOTS), Iso-C arXiv:2502.04959 (`iso.py` of github.com/danielm1405/iso-merging).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from small_adapters import (
    CONV,
    OUT,
    Array,
    Numbers,
    Q,
    Tensors,
    added,
    best,
    close,
    deltas,
    file,
    lora,
    pair,
    peft,
    read,
)

import adapterops as ao
from adapterops.cli.merge_text import lines
from adapterops.merging.merge import MergeResult
from adapterops.merging.stack import TensorStack
from adapterops.merging.whole import basis_of

WEIGHTS = (0.75, -0.5)


def lokr(seed: int, stem: str = Q, sizes: tuple[int, int, int, int] = (8, 8, 40, 40)) -> Tensors:
    """Of full rank: no factor of it is decomposed."""
    n, (a, b, c, d) = Numbers(seed), sizes
    return {f"{stem}.lokr_w1": n(a, b), f"{stem}.lokr_w2": n(c, d), f"{stem}.alpha": torch.tensor(1.0)}


def loha(seed: int) -> Tensors:
    n = Numbers(seed)
    shapes = {"w1_a": (320, 20), "w1_b": (20, 320), "w2_a": (320, 20), "w2_b": (20, 320)}
    return {**{f"{Q}.hada_{role}": n(*shape) for role, shape in shapes.items()}, f"{Q}.alpha": torch.tensor(1.0)}


def diff(seed: int, *shape: int, stem: str = Q) -> Tensors:
    return {f"{stem}.diff": Numbers(seed)(*(shape or (320, 320)))}


def merged(
    folder: Path, sources: list[Tensors], method: str, weights: tuple[float, ...] = WEIGHTS, **more: Any
) -> tuple[list[Array], Array, MergeResult]:
    """What went in, what came out, both as matrices in float64, and what is said of it."""
    paths = [file(folder / f"{n}.safetensors", tensors) for n, tensors in enumerate(sources)]
    out = folder / "out.safetensors"
    done = ao.merge(paths, out, method, weights=weights, **more)
    module = next(iter(deltas(out)))
    return [deltas(path)[module] for path in paths], deltas(out)[module], done


def told(done: MergeResult) -> str:
    return click.unstyle("\n".join(lines(done, verbose=True)))


def polar(matrix: Array) -> Array:
    u, _, vh = np.linalg.svd(matrix, full_matrices=False)
    out: Array = u @ vh
    return out


def tsv(given: list[Array], weights: tuple[float, ...], counts: list[int]) -> Array:
    """The authors': U and V of all tasks side by side, each replaced by the nearest orthonormal matrix."""
    found = [np.linalg.svd(matrix, full_matrices=False) for matrix in given]
    u = np.concatenate([u[:, :k] for (u, _, _), k in zip(found, counts, strict=True)], axis=1)
    s = np.concatenate([w * s[:k] for w, (_, s, _), k in zip(weights, found, counts, strict=True)])
    vh = np.concatenate([vh[:k] for (_, _, vh), k in zip(found, counts, strict=True)])
    out: Array = polar(u) * s @ polar(vh.T).T
    return out


def iso(given: list[Array], weights: tuple[float, ...], rank: int | None = None) -> Array:
    u, s, vh = np.linalg.svd(added(w * m for w, m in zip(weights, given, strict=True)), full_matrices=False)
    out: Array = u[:, :rank] @ vh[:rank] * s[:rank].mean()
    return out


def knots(given: list[Array], weights: tuple[float, ...], density: float) -> Array:
    """The authors': one SVD of all deltas side by side, TIES on Σ·V, and U before that again; trimmed by module."""
    u, s, vh = np.linalg.svd(np.concatenate(given, axis=1), full_matrices=False)
    there = s > 1e-5 * s.max()
    u, s, vh = u[:, there], s[there], vh[there]
    parts = np.split(s[:, None] * vh, len(given), axis=1)
    kept = []
    for weight, part in zip(weights, parts, strict=True):
        cut = np.sort(np.abs(part).ravel())[::-1][int(density * part.size) - 1]
        kept.append(weight * part * (np.abs(part) >= cut))
    stacked = np.stack(kept)
    agree = (np.sign(stacked) == np.where(stacked.sum(0) >= 0, 1, -1)) & (stacked != 0)
    out: Array = u @ ((stacked * agree).sum(0) / np.maximum(agree.sum(0), 1))
    return out


KINDS = {
    "lokr": [lokr(1), lokr(2)],
    "lokr and lora": [lokr(1), lora(2, rank=8, alpha=300)],
    "lokr and a whole difference": [lokr(1), diff(2)],
    "loha": [loha(1), loha(2)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [4, 33])
def test_tsv_takes_the_leading_components(kind: str, rank: int, tmp_path: Path) -> None:
    given, made, done = merged(tmp_path, KINDS[kind], "tsv", rank=rank, svd="exact")
    second = min(rank // 2, 8) if "lora" in kind else rank // 2
    counts = [rank - second, second]
    assert close(made, tsv(given, WEIGHTS, counts), 1e-4)
    energy = [w * w * np.square(np.linalg.svd(m)[1]) for w, m in zip(WEIGHTS, given, strict=True)]
    share = sum(e[:k].sum() for e, k in zip(energy, counts, strict=True)) / sum(e.sum() for e in energy)
    assert done.modules[0].kept == pytest.approx(share, rel=1e-4)
    if kind == "lokr":
        assert done.modules[0].error is None
        assert f"{share:.1%} of the adapters' own energy" in told(done)
        assert "exact" not in told(done)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [4, 40])
def test_iso_c_lifts_the_leading_directions_and_tells_what_all_would_be(kind: str, rank: int, tmp_path: Path) -> None:
    given, made, done = merged(tmp_path, KINDS[kind], "iso_c", rank=rank, svd="exact")
    assert close(made, iso(given, WEIGHTS, rank), 1e-4)
    values = np.linalg.svd(added(w * m for w, m in zip(WEIGHTS, given, strict=True)))[1]
    there = int((values > 1e-5 * values[0]).sum())
    full = iso(given, WEIGHTS, there)
    (module,) = done.modules
    assert module.error == pytest.approx(np.linalg.norm(full - made) / np.linalg.norm(full), rel=1e-4)
    assert module.kept == pytest.approx(rank / there)
    assert module.exact_rank == there
    assert f"rank {rank} of {there}" in told(done)


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_iterated_decompositions_hold_as_much(method: str, tmp_path: Path) -> None:
    given, made, _ = merged(tmp_path, KINDS["lokr and lora"], method, rank=8)
    wanted = tsv(given, WEIGHTS, [4, 4]) if method == "tsv" else iso(given, WEIGHTS, 8)
    assert close(made, wanted, 0.02)
    assert np.linalg.norm(made) == pytest.approx(np.linalg.norm(wanted), rel=1e-4)


@pytest.mark.parametrize("kind", ["lokr", "lokr and a whole difference"])
def test_knots_aligns_whole_matrices(kind: str, tmp_path: Path) -> None:
    given, made, done = merged(tmp_path, KINDS[kind], "knots", density=0.4, rank=320)
    full = knots(given, WEIGHTS, 0.4)
    assert close(made, full, 1e-4)
    given, made, done = merged(tmp_path / "low", KINDS[kind], "knots", density=0.4, rank=24, svd="exact")
    assert close(made, best(full, 24), 1e-3)
    error = np.linalg.norm(full - best(full, 24)) / np.linalg.norm(full)
    assert done.modules[0].error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("method", ["tsv", "iso_c", "knots"])
@pytest.mark.parametrize("shape", [(320, 320), (320, 4, 3, 3)])
def test_whole_differences_stay_whole(method: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    stem = Q if len(shape) == 2 else CONV
    more = {"density": 0.4} if method == "knots" else {}
    sources = [diff(1, *shape, stem=stem), diff(2, *shape, stem=stem)]
    given, made, done = merged(tmp_path, sources, method, **more)
    assert read(tmp_path / "out.safetensors")[stem]["diff"].shape == shape
    half = min(given[0].shape) // 2
    wanted = {
        "tsv": lambda: tsv(given, WEIGHTS, [half, half]),
        "iso_c": lambda: iso(given, WEIGHTS),
        "knots": lambda: knots(given, WEIGHTS, 0.4),
    }[method]()
    assert close(made, wanted, 1e-4)
    assert done.modules[0].rank is None


def test_a_wide_lokr_whose_matrix_is_not_square(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj"
    sources = [lokr(n, stem, (8, 8, 320, 40)) for n in (1, 2)]
    given, made, _ = merged(tmp_path, sources, "knots", density=0.4, rank=320)
    assert given[0].shape == (2560, 320)
    assert close(made, best(knots(given, WEIGHTS, 0.4), 320), 1e-3)


def test_a_module_whose_deltas_are_nothing(tmp_path: Path) -> None:
    zero = {key: tensor * ("alpha" in key) for key, tensor in lokr(1).items()}
    for method, more in (("tsv", {}), ("iso_c", {}), ("knots", {"density": 0.5})):
        _, made, _ = merged(tmp_path / method, [zero, zero], method, rank=4, **more)
        assert not made.any()


@pytest.mark.parametrize("method", ["tsv", "iso_c", "knots"])
def test_the_bytes_depend_on_nothing_but_the_adapters(method: str, tmp_path: Path) -> None:
    more = {"density": 0.5, "inner": "dare_ties"} if method == "knots" else {}
    sources = [file(tmp_path / f"{n}.safetensors", lokr(n), lokr(n + 5, OUT)) for n in (1, 2)]
    outs = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for workers, out in enumerate(outs, 1):
        ao.merge(sources, out, method, rank=8, workers=workers, **more)
    assert outs[0].read_bytes() == outs[1].read_bytes()


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (12, 12)])
def test_the_basis_is_that_of_the_matrices_side_by_side(shape: tuple[int, int]) -> None:
    n = Numbers(3)
    given = [n(*shape), n(*shape)]
    basis = basis_of(TensorStack(given, (1.0, 1.0), []), 1e-6)
    u, s, _ = np.linalg.svd(np.concatenate([m.double().numpy() for m in given], axis=1), full_matrices=False)
    assert basis.shape == (shape[0], min(shape[0], 2 * shape[1]))
    assert len(s) == basis.shape[1]
    torch.testing.assert_close((torch.from_numpy(u).T @ basis).abs(), torch.eye(len(s), dtype=torch.float64))


# Deltas of low rank: what is said of a rank below that of all their directions.


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
@pytest.mark.parametrize("rank", [2, 5, 8])
def test_a_lower_rank_is_held_against_the_full_one(method: str, rank: int, tmp_path: Path) -> None:
    sources = [peft(tmp_path / name, pair(seed)) for seed, name in enumerate("ab")]
    done = ao.merge(sources, tmp_path / "out", method, weights=WEIGHTS, rank=rank)
    given = [deltas(path)["l.0.q"] for path in sources]
    made, (module,) = deltas(tmp_path / "out")["l.0.q"], done.modules
    full = tsv(given, WEIGHTS, [4, 4]) if method == "tsv" else iso(given, WEIGHTS, 8)
    assert module.error == pytest.approx(np.linalg.norm(full - made) / np.linalg.norm(full), abs=1e-6)
    assert module.exact_rank == 8
    u, _, vh = np.linalg.svd(made)
    inside = u[:, :rank].T @ full @ vh[:rank].T
    assert module.kept == pytest.approx(np.square(inside).sum() / np.square(full).sum(), abs=1e-6)
    said = told(done)
    if rank < 8:
        assert f"rank {rank} of 8, ‖full − output‖ / ‖full‖ = {module.error:.2f}" in said
        assert "--rank 8 makes all of it" in said
        assert "exact" not in said
    else:
        assert "exact up to rounding" in said


def test_knots_below_its_rank_is_held_against_all_of_it(tmp_path: Path) -> None:
    sources = [peft(tmp_path / name, pair(seed)) for seed, name in enumerate("ab")]
    done = ao.merge(sources, tmp_path / "out", "knots", density=0.6, rank=3, weights=WEIGHTS)
    full = knots([deltas(path)["l.0.q"] for path in sources], WEIGHTS, 0.6)
    error = np.linalg.norm(full - best(full, 3)) / np.linalg.norm(full)
    assert done.modules[0].error == pytest.approx(error, rel=1e-4)
    assert "--rank 8 keeps all" in told(done)
