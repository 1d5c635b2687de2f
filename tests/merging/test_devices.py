"""Merging on a GPU gives what it gives on the CPU.  Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import adapterops as ao
from adapterops.linalg.dense import truncated
from adapterops.linalg.random import Draw
from adapterops.linalg.trimming import find_cut, trim_
from adapterops.merging.registry import METHODS, find
from adapterops.merging.run import devices_of

find("svd")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPES = {"a": (96, 160), "b": (320, 80), "c": (64, 64)}
CASES = [(m.name, space.value) for m in METHODS.values() for space in m.spaces]


def folder(path: Path, seed: int) -> Path:
    """A PEFT adapter of rank 8; adapters of different seeds share a part."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)
    tensors = {}
    for name, (rows, columns) in SHAPES.items():
        for role, shape in (("A", (8, columns)), ("B", (rows, 8))):
            value = torch.randn(shape, generator=shared) + 0.5 * torch.randn(shape, generator=own)
            tensors[f"base_model.model.layers.0.{name}.lora_{role}.weight"] = value
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["a", "b", "c"]}'
    )
    return path


def deltas(adapter: ao.Adapter) -> dict[str, np.ndarray]:
    from adapterops.methods import METHODS as KINDS

    return {u.module: KINDS[u.method].delta(u).numpy() for u in adapter}


@CUDA
@pytest.mark.parametrize(("method", "space"), CASES)
def test_a_gpu_merges_as_the_cpu_does(method: str, space: str, tmp_path: Path) -> None:
    count = METHODS[method].adapters or 3
    adapters = [ao.load(folder(tmp_path / str(n), n)) for n in range(count)]
    needed = {p.name: {"density": 0.4}.get(p.name, 0.1) for p in METHODS[method].parameters if p.default is None}
    one, two = (
        deltas(ao.combine(adapters, method, space=space, device=device, seed=5, **needed).adapter)
        for device in ("cpu", "cuda")
    )
    for module, expected in one.items():
        error = np.linalg.norm(two[module] - expected) / np.linalg.norm(expected)
        assert error < 1e-4, (module, error)


@CUDA
@pytest.mark.parametrize("method", ["tsv", "iso_c", "knots"])
def test_a_gpu_merges_whole_matrices_as_the_cpu_does(method: str, tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        tensors = {f"{stem}.diff": torch.randn(320, 320, generator=generator)}
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file(tensors, paths[-1])
    needed = {"density": 0.4} if method == "knots" else {}
    adapters = [ao.load(path) for path in paths]
    one, two = (deltas(ao.combine(adapters, method, device=device, **needed).adapter) for device in ("cpu", "cuda"))
    for module, expected in one.items():
        assert np.linalg.norm(two[module] - expected) / np.linalg.norm(expected) < 1e-3, module


@CUDA
@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_a_gpu_trims_to_the_same_entries(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    cut, other = find_cut(values, size // 5), find_cut(values.cuda(), size // 5)
    assert cut == other
    here, there = values.clone().reshape(-1, 100), values.cuda().reshape(-1, 100)
    trim_(here, cut, 0)
    trim_(there, other, 0)
    assert torch.equal(here, there.cpu())


@CUDA
def test_a_gpu_decomposes_a_dense_matrix_as_well() -> None:
    matrix = torch.randn(900, 700, generator=torch.Generator().manual_seed(2))
    matrix *= torch.linspace(2, 0.1, 700)
    best = torch.linalg.svdvals(matrix.double())
    found, excess = truncated(matrix.cuda(), 16, draw=Draw("test"))
    error = float((matrix.double() - (found.u * found.s @ found.vh).cpu().double()).norm())
    optimum = float(best[16:].square().sum().sqrt())
    assert error / optimum - 1 < 1e-4
    assert excess < 1e-4


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(ao.AdapterOpsError, match="is none of auto, cpu, cuda"):
        devices_of("gpu7")
    with pytest.raises(ao.AdapterOpsError, match=r"this machine has \d+ CUDA devices"):
        devices_of("cuda:99")
    assert [d.type for d in devices_of("cpu")] == ["cpu"]
