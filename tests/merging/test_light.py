"""What numpy alone merges: every number against one rounding of float32's sum, whatever the blocks."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_adapters import Numbers, Tensors, peft, weights_of

import adapterops as ao
from adapterops.merging import light

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SIZES, RANK = (150, 90), 5
WEIGHTS = (0.75, -1.5, 1.0)


def adapters(folder: Path, kinds: tuple[str, ...]) -> tuple[list[Path], list[Tensors]]:
    paths, given = [], []
    for seed, kind in enumerate(kinds):
        n = Numbers(seed)
        tensors = {"l.0.q.lora_A.weight": n(RANK, SIZES[1]), "l.0.q.lora_B.weight": n(SIZES[0], RANK)}
        given.append({key.rpartition("q.")[2]: t.to(TYPES[kind]) for key, t in tensors.items()})
        paths.append(peft(folder / f"{kind}{seed}", tensors, alpha=2.0 * RANK, dtype=TYPES[kind]))
    return paths, given


def merged(paths: list[Path], out: Path, method: str, **options: Any) -> Tensors:
    ao.merge(paths, out, method, weights=WEIGHTS[: len(paths)], overwrite=True, **options)
    found = load_file(weights_of(out))
    return {
        role: next(t for key, t in found.items() if key.endswith(role)) for role in ("lora_A.weight", "lora_B.weight")
    }


@pytest.mark.parametrize("block", [7, 1 << 16])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kinds", list(product(TYPES, repeat=2)))
def test_linear_is_one_rounding_of_the_sum(
    kinds: tuple[str, ...], dtype: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(light, "BLOCK", block)
    paths, given = adapters(tmp_path, kinds)
    found = merged(paths, tmp_path / "out", "linear", dtype=dtype)
    for role, first in (("lora_A.weight", 1.0), ("lora_B.weight", -1.0)):
        total = torch.zeros(())
        for weight, tensors in zip(WEIGHTS, given, strict=False):
            # The sign of a negative weight goes into A; scales are 2, the output's is 1.
            root = abs(2 * weight) ** 0.5 * (-1.0 if weight < 0 and first > 0 else 1.0)
            total = total + tensors[role].float() * np.float32(root).item()
        assert torch.equal(found[role], total.to(TYPES[dtype]))


@pytest.mark.parametrize("block", [7, 64, 1 << 16])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kinds", [("bfloat16",) * 3, ("float16", "bfloat16", "float32")])
def test_cat_is_a_copy_but_for_the_strengths(
    kinds: tuple[str, ...], dtype: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(light, "BLOCK", block)
    paths, given = adapters(tmp_path, kinds)
    found = merged(paths, tmp_path / "out", "cat", dtype=dtype)
    a = torch.cat([t["lora_A.weight"].double() * 2 * w for t, w in zip(given, WEIGHTS, strict=True)])
    assert torch.equal(found["lora_A.weight"], a.to(TYPES[dtype]))
    b = torch.cat([t["lora_B.weight"].float() for t in given], dim=1)
    assert torch.equal(found["lora_B.weight"], b.to(TYPES[dtype]))


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_as_torchs(dtype: str) -> None:
    """Halves go to the even neighbour, denormal numbers stay, the largest ones are held."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 17, dtype=np.uint64).astype("<u4")
    bits[: 1 << 12] = (bits[: 1 << 12] & 0xFFFF0000) | 0x8000  # halfway between two of bfloat16
    bits[1 << 12 : 1 << 13] = (bits[1 << 12 : 1 << 13] & 0xFFFFE000) | 0x1000  # … of float16
    bits[1 << 13 : 1 << 14] &= 0x807FFFFF  # denormal
    values = bits.view("<f4")
    limit = light.ROUNDS_TO_INFINITY["BF16" if dtype == "bfloat16" else dtype[0].upper() + dtype[-2:]]
    values = np.append(values[np.abs(values) < limit], np.nextafter(np.float32(limit), np.float32(0)))
    made = np.empty(len(values) * torch.finfo(TYPES[dtype]).bits // 8, dtype=np.uint8)
    expected = torch.from_numpy(values.copy()).to(TYPES[dtype])
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    light.encode(values.copy(), name, made, np.empty_like(values))
    assert torch.isfinite(expected).all()
    assert made.tobytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("method", ["linear", "cat"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", TYPES)
def test_numbers_that_are_none_are_named(method: str, bad: float, kind: str, tmp_path: Path) -> None:
    paths, _ = adapters(tmp_path, (kind, kind))
    tensors = load_file(weights_of(paths[1]))
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    tensors[key][-1, -1] = bad
    peft(paths[1], {k.removeprefix("base_model.model."): t for k, t in tensors.items()})
    with pytest.raises(ao.AdapterOpsError, match=r"q\.lora_B\.weight'.*NaN or infinity"):
        merged(paths, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_numbers_that_do_not_fit(method: str, tmp_path: Path) -> None:
    paths, _ = adapters(tmp_path, ("float32", "float32"))
    with pytest.raises(ao.AdapterOpsError, match=r"q\.A: .* F16 cannot hold"):
        ao.merge(paths, tmp_path / "out", method, weights=[1e12, 1e13], dtype="float16")
    assert not (tmp_path / "out").exists()


def test_torch_is_not_needed(tmp_path: Path) -> None:
    paths, _ = adapters(tmp_path, ("bfloat16", "bfloat16"))
    code = (
        "import sys, adapterops as ao; ao.merge(sys.argv[1:3], sys.argv[3], 'linear'); "
        "ao.merge(sys.argv[1:3], sys.argv[3], 'cat', overwrite=True); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
