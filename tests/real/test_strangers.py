"""Base models of no known size, with the names of one that is known: nobody takes their adapters for its."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from image_bases import flux2
from trainers import Modules, Tensors, comfy, musubi, write
from video_bases import hunyuan_image, hunyuan_stream, kandinsky, wan

import adapterops as ao
from adapterops.errors import AdapterOpsError

BOTH = tuple(f"{a}.to_{p}" for a in ("attn1", "attn2") for p in ("q", "k", "v", "out.0"))


def blocks(count: int, width: int) -> Modules:
    """The attention of some blocks by the names that most of diffusers' classes have."""
    return {f"transformer_blocks.{i}.{end}": (width, width) for i in range(count) for end in BOTH}


STRANGERS: dict[str, Modules] = {
    "Cosmos by diffusers' names": {"blocks.0.attn1.to_q": (2048, 2048), "blocks.0.attn2.to_k": (2048, 1024)},
    "Cosmos of another size": {
        "blocks.0.cross_attn.k_proj": (4096, 1024),
        "blocks.0.self_attn.output_proj": (4096, 4096),
        "blocks.35.mlp.layer1": (16384, 4096),
    },
    "Wan": wan(2048, 8192, 23),
    "Wan, few modules": {"blocks.0.self_attn.q": (2048, 2048), "blocks.0.ffn.0": (8192, 2048)},
    "AuraFlow": {"double_layers.0.attn.w2q": (1536, 1536), "single_layers.0.mlp.c_fc1": (4096, 1536)},
    # The size that diffusers' class has by default, and no published model.
    "ERNIE-Image": {"layers.0.self_attention.to_q": (3072, 3072), "layers.0.mlp.gate_proj": (8192, 3072)},
    "Flux.2": flux2(2048, 6, 30),
    "HiDream": {"double_stream_blocks.0.block.attn1.to_q": (3072, 3072)},
    "HiDream with more experts": {
        **{f"single_stream_blocks.0.block.ff_i.experts.{i}.w1": (8192, 2560) for i in range(2, 5)},
        "single_stream_blocks.0.block.attn1.to_q": (2560, 2560),
    },
    "Ideogram": {"layers.0.attention.qkv": (12288, 4096), "layers.0.attention.o": (4096, 4096)},
    "Lumina, as wide as Ideogram": {"layers.0.attention.qkv": (9216, 4608), "layers.0.attention.wo": (4608, 4608)},
    "Lumina, larger": {"layers.0.attention.qkv": (4320, 2592), "layers.29.feed_forward.w1": (10368, 2592)},
    "Lumina without grouped queries": {"layers.0.attention.qkv": (6912, 2304), "layers.0.attention.wo": (2304, 2304)},
    "Krea 2": {"blocks.0.attn.wq": (4096, 4096), "blocks.0.mlp.gate": (11008, 4096)},
    "HunyuanVideo": {f"double_blocks.{i}.img_attn_qkv": (9600, 3200) for i in range(20)},
    "HunyuanVideo 1.5": hunyuan_stream(0, 1536, apart=True),
    "HunyuanImage": {**hunyuan_image(0), **hunyuan_stream(0, 3200, apart=False, side="txt")},
    "Kandinsky 5": kandinsky(2048, 8192, 31),
    "Kandinsky 5 Lite, as deep as Pro": kandinsky(1792, 7168, 59),
    "Allegro": {f"transformer_blocks.{i}.attn1.to_q": (2304, 2304) for i in range(32)},
    "PixArt": blocks(4, 1408),
    "CogVideoX by Comfy's names": {"blocks.0.q": (2048, 2048), "blocks.0.ff_proj": (8192, 2048)},
    "Latte": {
        **blocks(28, 1152),
        **{f"temporal_transformer_blocks.{i}.attn1.to_q": (1152, 1152) for i in range(300)},
    },
}
"""Called as the family whose names they have."""


@pytest.mark.parametrize("writer", [comfy, musubi])
@pytest.mark.parametrize("name", STRANGERS)
def test_it_is_taken_for_none(name: str, writer: Callable[[Modules], Tensors], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer(STRANGERS[name]))
    assert ao.inspect(path).architecture.value is None
    with pytest.raises(AdapterOpsError, match="none of the known base models"):
        ao.convert(path, "diffusers", tmp_path / "diffusers")
