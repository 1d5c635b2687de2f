"""LoHa and LoKr (LyCORIS) in pipelines, alone and beside LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from adapterops.integrations.diffusers import load_into

Tensors = dict[str, torch.Tensor]


def loha(shape: torch.Size, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    """Two products of rank 2, one on the other: its tensors and its delta at scale 1."""
    rows, columns = shape[0], shape[1:].numel()
    own = {
        f"hada_{name}": torch.randn(size, generator=generator)
        for name, size in (("w1_a", (rows, 2)), ("w1_b", (2, columns)), ("w2_a", (rows, 2)), ("w2_b", (2, columns)))
    }
    wide = {name: t.double() for name, t in own.items()}
    return own, (wide["hada_w1_a"] @ wide["hada_w1_b"]) * (wide["hada_w2_a"] @ wide["hada_w2_b"])


def lokr(shape: torch.Size, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    """A Kronecker product of a whole factor and one of rank 2."""
    rows, columns = shape[0] // 2, shape[1] // 2
    own = {
        f"lokr_{name}": torch.randn(size, generator=generator)
        for name, size in (("w1", (2, 2)), ("w2_a", (rows, 2)), ("w2_b", (2, columns)))
    }
    wide = {name: t.double() for name, t in own.items()}
    return own, torch.kron(wide["lokr_w1"], wide["lokr_w2_a"] @ wide["lokr_w2_b"])


Maker = Callable[[torch.Size, torch.Generator], tuple[Tensors, torch.Tensor]]


def write(pipe: Any, make: Maker, path: Path, ends: tuple[str, ...]) -> dict[tiny.Key, torch.Tensor]:
    """A file as LyCORIS writes it, alpha 1; the deltas, scaled."""
    generator = torch.Generator().manual_seed(2)
    tensors, deltas = {}, {}
    for name, module in pipe.unet.named_modules():
        if name.endswith(ends):
            own, delta = make(module.weight.shape, generator)
            stem = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{stem}.{key}": t for key, t in own.items()} | {f"{stem}.alpha": torch.tensor(1.0)}
            deltas["unet", name] = delta.reshape(module.weight.shape) / 2
    save_file(tensors, path)
    return deltas


def as_factors(delta: torch.Tensor) -> tiny.Raw:
    """The delta as one product, for `tiny.fused`."""
    flat = delta.flatten(1)
    b = torch.eye(len(flat), dtype=torch.float64).reshape(len(flat), -1, *(1,) * (delta.ndim - 2))
    return tiny.Raw(delta, b, float(len(flat)))


@pytest.mark.parametrize("make", [loha, lokr])
def test_products_as_fused_and_beside_lora(make: Maker, tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    deltas = write(pipe, make, tmp_path / "x.safetensors", ("to_q", "to_v", "ff.net.2", "time_emb_proj"))
    raw = {key: as_factors(delta) for key, delta in deltas.items()}
    lora = tiny.adapter(pipe)
    base = tiny.outputs(pipe)
    alone, both = tiny.fused(pipe, (raw, 1.0)), tiny.fused(pipe, (raw, 0.5), (lora, -1.0))
    loaded = load_into(pipe, tmp_path / "x.safetensors", "product")
    assert {("unet", m) for m in loaded.modules["unet"]} == deltas.keys()
    tiny.assert_close(tiny.outputs(pipe), alone)
    tiny.assert_differ(alone, base, ["unet"])
    load_into(pipe, tiny.write_diffusers(lora, tmp_path / "lora.safetensors"), "lora")
    pipe.set_adapters(["product", "lora"], [0.5, -1.0])
    tiny.assert_close(tiny.outputs(pipe), both)
    load_into(pipe, tmp_path / "x.safetensors", "again")
    tiny.assert_close(tiny.outputs(pipe), alone)
    pipe.unload_lora_weights()
    assert tiny.equal(tiny.outputs(pipe), base)
    assert not any(isinstance(m, BaseTunerLayer) for m in pipe.unet.modules())


def test_loha_of_convolutions(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    deltas = write(pipe, loha, tmp_path / "x.safetensors", ("proj_in", "resnets.0.conv1", "resnets.1.conv2"))
    wanted = tiny.fused(pipe, ({key: as_factors(delta) for key, delta in deltas.items()}, 1.0))
    load_into(pipe, tmp_path / "x.safetensors")
    tiny.assert_close(tiny.outputs(pipe), wanted)
