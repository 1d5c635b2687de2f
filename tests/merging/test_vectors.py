"""Biases, norms and (IA)³: what is merged entry by entry beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_adapters import NORM, OUT, Array, Numbers, Q, Tensors, added, close, deltas, file, lora, pair, peft, read

import adapterops as ao
from adapterops.errors import CannotRepresent, UsageError

WEIGHTS = (0.75, -0.5)


def biased(folder: Path, seed: int, alpha: float, rslora: bool = False) -> Path:
    tensors = {**pair(seed), "l.0.q.lora_B.bias": Numbers(seed + 50)(12)}
    return peft(folder, tensors, alpha, lora_bias=True, use_rslora=rslora)


@pytest.mark.parametrize("method", ["linear", "svd", "cat"])
def test_the_bias_of_a_lora_is_added_by_weight_and_scale(method: str, tmp_path: Path) -> None:
    sources = [biased(tmp_path / "a", 1, 8), biased(tmp_path / "b", 2, 3, rslora=True)]
    out = tmp_path / "out"
    ao.merge(sources, out, method, weights=WEIGHTS)
    wanted = added(
        w * got["scale"] * got["lora_bias"] for w, got in zip(WEIGHTS, (read(s)["l.0.q"] for s in sources), strict=True)
    )
    found = read(out)["l.0.q"]
    assert close(found["scale"] * found["lora_bias"], wanted, 1e-6)


def test_a_bias_that_only_one_has_is_kept(tmp_path: Path) -> None:
    one, two = biased(tmp_path / "a", 1, 8), peft(tmp_path / "b", pair(2))
    ao.merge([one, two], tmp_path / "out", "svd", weights=WEIGHTS)
    found, own = read(tmp_path / "out")["l.0.q"], read(one)["l.0.q"]
    assert close(found["scale"] * found["lora_bias"], WEIGHTS[0] * own["scale"] * own["lora_bias"], 1e-6)


def test_modules_without_a_bias_get_one_of_zeros_where_peft_needs_it(tmp_path: Path) -> None:
    one, two = biased(tmp_path / "a", 1, 8), peft(tmp_path / "b", {**pair(2), **pair(3, "l.1.q")})
    ao.merge([one, two], tmp_path / "out", "svd", weights=WEIGHTS)
    found, own = read(tmp_path / "out"), read(one)["l.0.q"]
    assert close(
        found["l.0.q"]["scale"] * found["l.0.q"]["lora_bias"], WEIGHTS[0] * own["scale"] * own["lora_bias"], 1e-6
    )
    assert not found["l.1.q"]["lora_bias"].any()


def test_a_bias_merged_by_ties_is_a_delta(tmp_path: Path) -> None:
    """Trimmed to ⌊density · size⌋, signs elected after weighting, the mean of those that agree."""
    sources = [biased(tmp_path / "a", 1, 8), biased(tmp_path / "b", 2, 3)]
    ao.merge(sources, tmp_path / "out", "ties_svd", weights=WEIGHTS, density=0.5, rank=4)
    rows = [w * trimmed(got["scale"] * got["lora_bias"], 6) for w, got in weighted(sources, "l.0.q")]
    found = read(tmp_path / "out")["l.0.q"]
    assert close(found["scale"] * found["lora_bias"], elected(rows), 1e-5)


def weighted(sources: list[Path], module: str) -> list[tuple[float, dict[str, Array]]]:
    return list(zip(WEIGHTS, (read(s)[module] for s in sources), strict=True))


def trimmed(values: Array, keep: int) -> Array:
    out = values.copy()
    out[np.argsort(np.abs(values))[: len(values) - keep]] = 0
    return out


def elected(rows: list[Array]) -> Array:
    """The disjoint mean (TIES, https://arxiv.org/abs/2306.01708) of rows that are weighted already."""
    stacked = np.stack(rows)
    sign = np.where(stacked.sum(axis=0) >= 0, 1.0, -1.0)
    agree = (np.sign(stacked) == sign) & (stacked != 0)
    out: Array = (stacked * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    return out


def norm_file(path: Path, seed: int) -> Path:
    numbers = Numbers(seed)
    changes = {f"{NORM}.w_norm": numbers(320), f"{NORM}.b_norm": numbers(320)}
    return file(path, lora(seed), changes, {f"{OUT}.diff_b": numbers(320)})


def test_norms_and_biases_are_added_by_weight(tmp_path: Path) -> None:
    sources = [norm_file(tmp_path / "a.safetensors", 1), norm_file(tmp_path / "b.safetensors", 2)]
    out = tmp_path / "out.safetensors"
    ao.merge(sources, out, "svd", weights=WEIGHTS)
    read_out = read(out)
    for module, role in ((NORM, "w_norm"), (NORM, "b_norm"), (OUT, "diff_b")):
        wanted = added(w * got[role] for w, got in weighted(sources, module))
        assert close(read_out[module][role], wanted, 1e-6), (module, role)


def test_a_norm_under_ties(tmp_path: Path) -> None:
    sources = [norm_file(tmp_path / "a.safetensors", 1), norm_file(tmp_path / "b.safetensors", 2)]
    out = tmp_path / "out.safetensors"
    ao.merge(sources, out, "ties", weights=WEIGHTS, density=0.25)
    for module, role in ((NORM, "w_norm"), (NORM, "b_norm"), (OUT, "diff_b")):
        rows = [w * trimmed(got[role], 80) for w, got in weighted(sources, module)]
        assert close(read(out)[module][role], elected(rows), 1e-5), (module, role)


def test_a_method_of_two_directions_takes_a_vector_for_one(tmp_path: Path) -> None:
    """Slerp of two biases: their directions along the arc, and their lengths along the line."""
    sources = [norm_file(tmp_path / "a.safetensors", 1), norm_file(tmp_path / "b.safetensors", 2)]
    out = tmp_path / "out.safetensors"
    ao.merge(sources, out, "slerp", weights=(0.75, 0.25))
    one, two = (read(s)[OUT]["diff_b"] for s in sources)
    long, longer = np.linalg.norm(one), np.linalg.norm(two)
    angle = np.arccos(one @ two / long / longer)
    arc = (np.sin(0.75 * angle) * one / long + np.sin(0.25 * angle) * two / longer) / np.sin(angle)
    wanted = (0.75 * long + 0.25 * longer) * arc
    assert close(read(out)[OUT]["diff_b"], wanted, 1e-5)


def test_vectors_of_other_lengths_are_of_other_bases(tmp_path: Path) -> None:
    one = biased(tmp_path / "a", 1, 8)
    other = {**pair(2), "l.0.q.lora_B.bias": torch.ones(11)}
    with pytest.raises(UsageError, match=r"l\.0\.q.*bias.*different base models"):
        ao.merge([one, peft(tmp_path / "b", other, lora_bias=True)], tmp_path / "out", "svd")
    assert not (tmp_path / "out").exists()


# (IA)³.


def ia3(folder: Path, seed: int, size: int = 12) -> Path:
    tensors: Tensors = {
        "l.0.q.ia3_l": 1 + Numbers(seed)(size, 1),
        "l.0.down.ia3_l": 1 + Numbers(seed + 50)(1, 20),
    }
    config = {"peft_type": "IA3", "target_modules": ["q", "down"], "feedforward_modules": ["down"]}
    return peft(folder, tensors, **{**config, "r": None, "lora_alpha": None})  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["svd", "magnitude_prune"])
def test_ia3_adds_what_the_factors_are_beyond_one(method: str, tmp_path: Path) -> None:
    sources = [ia3(tmp_path / "a", 1), ia3(tmp_path / "b", 2)]
    parameters: dict[str, Any] = {"density": 1.0} if method == "magnitude_prune" else {}
    ao.merge(sources, tmp_path / "out", method, weights=WEIGHTS, **parameters)
    for module in ("l.0.q", "l.0.down"):
        wanted = 1 + added(w * (got["ia3_l"] - 1) for w, got in weighted(sources, module))
        assert close(read(tmp_path / "out")[module]["ia3_l"], wanted, 1e-6)


def lycoris_ia3(path: Path, seed: int, on_input: bool = False) -> Path:
    return file(path, {f"{Q}.weight": Numbers(seed)(*((1, 320) if on_input else (320, 1))),
                       f"{Q}.on_input": torch.tensor(on_input)})  # fmt: skip


def test_ia3_of_lycoris_starts_from_zero(tmp_path: Path) -> None:
    sources = [lycoris_ia3(tmp_path / "a.safetensors", 1), lycoris_ia3(tmp_path / "b.safetensors", 2)]
    out = tmp_path / "out.safetensors"
    ao.merge(sources, out, "svd", weights=WEIGHTS)
    wanted = added(w * got["weight"] for w, got in weighted(sources, Q))
    assert close(read(out)[Q]["weight"], wanted, 1e-6)
    assert not read(out)[Q]["on_input"]


def test_ia3_on_the_other_side_is_refused(tmp_path: Path) -> None:
    sources = [lycoris_ia3(tmp_path / "a.safetensors", 1), lycoris_ia3(tmp_path / "b.safetensors", 2, on_input=True)]
    with pytest.raises(CannotRepresent, match=r"b\.safetensors.*another side"):
        ao.merge(sources, tmp_path / "out.safetensors", "svd")


def test_ia3_beside_lora_is_refused(tmp_path: Path) -> None:
    sources = [file(tmp_path / "a.safetensors", lora(1)), lycoris_ia3(tmp_path / "b.safetensors", 2)]
    with pytest.raises(CannotRepresent, match=r"b\.safetensors.*multiplies the weight of .*attn1\.to_q"):
        ao.merge(sources, tmp_path / "out.safetensors", "svd")
    assert not (tmp_path / "out.safetensors").exists()


def test_lora_and_a_bias_difference_of_one_module(tmp_path: Path) -> None:
    """A file whose module has both keeps both: neither stands in for the other."""
    sources = [norm_file(tmp_path / "a.safetensors", 1), file(tmp_path / "b.safetensors", lora(2))]
    out = tmp_path / "out.safetensors"
    ao.merge(sources, out, "cat", weights=WEIGHTS)
    assert close(read(out)[OUT]["diff_b"], WEIGHTS[0] * read(sources[0])[OUT]["diff_b"], 1e-6)
    wanted = added(w * deltas(s)[Q] for w, s in zip(WEIGHTS, sources, strict=True))
    assert close(deltas(out)[Q], wanted)
