"""Random PEFT folders, merged as a user does it, against each method on whole deltas (`merge_references.py`).

Sizes, ranks, alphas, types and missing modules are mixed inside each adapter, since modules that are alike are computed
together; the output is read by a few lines of this file's own.
"""

from __future__ import annotations

import json
import random
import re
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_references import REFERENCES, Matrix, best
from safetensors.torch import load_file, save_file

import adapterops as ao

SIZES = [(24, 16), (16, 24), (32, 32), (48, 16), (16, 64), (7, 13)]
TYPES = [torch.float32, torch.float16, torch.bfloat16]
WITH_SIGNS = {"svd", "cat", "subtract", "magnitude_prune_svd", "breadcrumbs", "ties_svd", "sce"}
"""Methods that take a negative weight."""
BEHIND = "base_model.model."


def adapter(folder: Path, rng: random.Random, shapes: dict[str, tuple[int, int]]) -> dict[str, Matrix]:
    """Writes a PEFT folder; gives its deltas."""
    rank, alpha, rslora, usual = (
        rng.choice([1, 2, 4, 5]),
        rng.choice([0.5, 1, 3, 8]),
        rng.random() < 0.3,
        rng.choice(TYPES),
    )
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    tensors: dict[str, torch.Tensor] = {}
    deltas: dict[str, Matrix] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, (rows, columns) in shapes.items():
        if deltas and rng.random() < 0.15:
            continue
        r = min(rank if rng.random() < 0.6 else rng.choice([1, 2, 3, 6]), rows, columns)
        own = alpha if rng.random() < 0.7 else rng.choice([2, 7.5])
        dtype = usual if rng.random() < 0.7 else rng.choice(TYPES)
        a = (0.3 * torch.randn(r, columns, generator=generator)).to(dtype)
        b = (0.3 * torch.randn(rows, r, generator=generator)).to(dtype)
        if deltas and rng.random() < 0.05:
            b.zero_()
        tensors |= {f"{BEHIND}{name}.lora_A.weight": a, f"{BEHIND}{name}.lora_B.weight": b}
        ranks |= {name: r} if r != rank else {}
        alphas |= {name: own} if own != alpha else {}
        deltas[name] = own / (sqrt(r) if rslora else r) * (b.double() @ a.double()).numpy()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas,
        "use_rslora": rslora, "target_modules": sorted(deltas), "bias": "none", "task_type": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def read(folder: Path) -> dict[str, Matrix]:
    """The deltas of a PEFT folder, as peft scales them."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")

    def said(field: str, name: str, otherwise: Any) -> Any:
        return next((v for k, v in (config.get(field) or {}).items() if re.match(rf"(.*\.)?({k})$", name)), otherwise)

    out = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removeprefix(BEHIND).removesuffix(".lora_A.weight")
        a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        rank = said("rank_pattern", name, config["r"])
        assert rank == a.shape[0]
        scale = said("alpha_pattern", name, config["lora_alpha"]) / (sqrt(rank) if config.get("use_rslora") else rank)
        out[name] = (scale * b @ a).numpy()
    return out


def parameters(method: str, rng: random.Random) -> dict[str, Any]:
    out: dict[str, Any] = {} if method == "cat" else {"rank": rng.choice([3, 64])}
    if method in ("magnitude_prune_svd", "breadcrumbs", "ties_svd", "sce", "knots"):
        out["density"] = rng.choice([0.2, 0.5, 0.9])
    if method == "breadcrumbs":
        out["gamma"] = rng.choice([0.01, 0.05, 0.1])
    if method == "ties_svd":
        out["majority_sign"] = rng.choice(["total", "frequency"])
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", REFERENCES)
def test_what_comes_out_is_the_method(method: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{method} {seed}")
    names = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(rng.choice([1, 3, 6])) for p in "qkv"]
    shapes = {name: rng.choice(SIZES) for name in names}
    count = 2 if method == "slerp" else rng.choice([2, 2, 3, 4])
    folders = [tmp_path / f"a{k}" for k in range(count)]
    adapters = [adapter(folder, rng, shapes) for folder in folders]
    signs = [-1 if method in WITH_SIGNS and rng.random() < 0.2 else 1 for _ in folders]
    weights = [sign * round(rng.uniform(0.2, 1.5), 2) for sign in signs]
    given = parameters(method, rng)
    ao.merge(
        folders, tmp_path / "out", method=method, weights=weights, dtype="float32", workers=rng.choice([1, 2]), **given
    )

    found = read(tmp_path / "out")
    for name, shape in shapes.items():
        if not any(name in deltas for deltas in adapters):
            assert name not in found
            continue
        deltas = [own.get(name, np.zeros(shape)) for own in adapters]
        wanted = REFERENCES[method](deltas, weights, given.get("rank", max(shape)), given)
        got, size = found.get(name, np.zeros(shape)), float(np.linalg.norm(wanted))
        least = float(np.linalg.norm(wanted - best(wanted, given.get("rank", max(shape)))))
        # The best of the rank may not be the only one: what counts is how far each is from what was to be merged.
        assert float(np.linalg.norm(got - wanted)) <= least * (1 + 1e-4) + 5e-6 * size, name
