"""Sums of low rank are computed several modules at a time: to the bit what each gives alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_adapters import Numbers, Tensors, peft, weights_of

import adapterops as ao
from adapterops.merging import run

SIZES = {"wide": (24, 40), "tall": (40, 24)}
LAYERS = 7


def tensors(seed: int, kind: str, layers: int = LAYERS, rank: int = 4) -> Tensors:
    out: Tensors = {}
    for layer in range(layers):
        n = Numbers(100 * seed + layer)
        for name, (rows, columns) in SIZES.items():
            out[f"l.{layer}.{name}.lora_A.weight"] = n(rank, columns).to(getattr(torch, kind))
            out[f"l.{layer}.{name}.lora_B.weight"] = n(rows, rank).to(getattr(torch, kind))
    return out


def merged(sources: list[Path], out: Path, method: str = "svd", **options: Any) -> Tensors:
    ao.merge(sources, out, method, weights=[0.75, 0.5, 1.25][: len(sources)], overwrite=True, **options)
    return load_file(weights_of(out))


CASES: dict[str, tuple[tuple[str, int], ...]] = {
    "of one type": (("bfloat16", 4), ("bfloat16", 4), ("bfloat16", 4)),
    "of different ranks": (("float16", 2), ("float16", 4)),
    "of two types": (("float32", 4), ("float16", 4)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["svd", "slerp"])
@pytest.mark.parametrize("name", CASES)
def test_each_as_alone(name: str, method: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = []
    for seed, (kind, rank) in enumerate(CASES[name][: 2 if method == "slerp" else None]):
        given = tensors(seed, kind, rank=rank)
        if seed == 1:  # one module needs another way: the same twice
            first = load_file(weights_of(sources[0]))
            for end in ("lora_A.weight", "lora_B.weight"):
                same = first[f"base_model.model.l.2.wide.{end}"]
                if same.shape == given[f"l.2.wide.{end}"].shape:
                    given[f"l.2.wide.{end}"] = same.to(given[f"l.2.wide.{end}"].dtype)
        sources.append(peft(tmp_path / f"{seed}", given))
    options: dict[str, Any] = {"rank": 3, "dtype": dtype}
    found = merged(sources, tmp_path / "out", method, workers=1, **options)
    assert len(found) == 4 * LAYERS
    for workers in (2, 5):
        other = merged(sources, tmp_path / "other", method, workers=workers, **options)
        assert all(torch.equal(tensor, other[key]) for key, tensor in found.items())
    monkeypatch.setattr(run, "TOGETHER", 0)
    alone = merged(sources, tmp_path / "alone", method, **options)
    assert all(torch.equal(tensor, alone[key]) for key, tensor in found.items())


@pytest.mark.parametrize(("one", "other"), [("float16", "bfloat16"), ("float32", "float16")])
def test_modules_of_one_size_and_two_types(one: str, other: str, tmp_path: Path) -> None:
    """Of adapters that share one layer, whose others are alike in all but the type of their numbers; both at a scale of 2."""
    left = {key: tensor for key, tensor in tensors(0, one).items() if int(key.split(".")[1]) <= 3}
    right = {key: tensor for key, tensor in tensors(1, other).items() if int(key.split(".")[1]) >= 3}
    merged([peft(tmp_path / "left", left), peft(tmp_path / "right", right)], tmp_path / "out", rank=8, dtype="float32")
    found = load_file(weights_of(tmp_path / "out"))
    for layer in range(LAYERS):
        for name in SIZES:
            key = f"l.{layer}.{name}.lora_"
            expected = sum(
                (weight * own[f"{key}B.weight"].double() @ own[f"{key}A.weight"].double())
                for own, weight in ((left, 2 * 0.75), (right, 2 * 0.5))
                if f"{key}A.weight" in own
            )
            b, a = (found[f"base_model.model.{key}{side}.weight"].double() for side in "BA")
            torch.testing.assert_close(b @ a, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "float64"])
def test_the_one_that_is_broken_is_named(kind: str, bad: float, tmp_path: Path) -> None:
    sources = [peft(tmp_path / str(seed), tensors(seed, kind)) for seed in range(2)]
    given = tensors(1, kind)
    given["l.4.tall.lora_A.weight"][-1, -1] = bad
    peft(sources[1], given)
    with pytest.raises(ao.AdapterOpsError, match=r"l\.4\.tall\.lora_A\.weight'.*NaN or infinity"):
        merged(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_made_is_told_of_each(tmp_path: Path) -> None:
    given = tensors(0, "float32")
    other = tensors(1, "float32")
    nothing = {key: -tensor if "l.3.wide.lora_B" in key else tensor for key, tensor in given.items()}
    for key in given:
        if "l.3.wide" not in key:
            nothing[key] = other[key]
    sources = [peft(tmp_path / "a", given), peft(tmp_path / "b", nothing)]
    result = ao.merge(sources, tmp_path / "out", "svd", rank=8)
    found = load_file(weights_of(tmp_path / "out"))
    for report in result.modules:
        parts = [load_file(weights_of(source)) for source in sources]
        key = f"base_model.model.{report.module}.lora"
        whole = sum((2 * t[f"{key}_B.weight"].double() @ t[f"{key}_A.weight"].double() for t in parts), torch.zeros(()))
        error = float((whole - found[f"{key}_B.weight"].double() @ found[f"{key}_A.weight"].double()).norm())
        assert report.kept == pytest.approx(1.0)
        if report.module == "l.3.wide":
            assert report.cancels or report.empty
            assert error < 1e-6
        else:
            assert not report.cancels
            assert report.error is not None
            assert error <= 1e-6 * float(whole.norm())
            assert report.error <= 1e-6
