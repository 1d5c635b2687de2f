"""Safetensors files written byte by byte, sound or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from adapterops import architectures
from adapterops.storage import dtypes

F16_NUMBERS = bytes.fromhex("0000013c66b2a03512bb0080ff03007b")
"""Eight float16 numbers: zeros, a subnormal and a large one among them."""


def write_raw(path: Path, header: str | bytes | Mapping[str, Any], data: bytes = b"") -> Path:
    """A file with this header, whatever it says, and these bytes after it."""
    text = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else dump(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def dump(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def entry(dtype: str, shape: list[int], begin: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + prod(shape) * dtypes.BITS[dtype] // 8]}


def write_kohya_sd1(path: Path, rank: int) -> int:
    """A float16 adapter of every SD1 layer that sd-scripts would train, as it spells them; returns its bytes."""
    header: dict[str, Any] = {}
    position = 0
    for name, component in architectures.load("sd1").components.items():
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[name]
        for module, info in component.modules.items():
            if len(info.shape) < 2 or "embedding" in module:
                continue
            key, ones = prefix + module.replace(".", "_"), [1] * (len(info.shape) - 2)
            for suffix, shape in (
                (".alpha", []),
                (".lora_down.weight", [rank, info.shape[1], *info.shape[2:]]),
                (".lora_up.weight", [info.shape[0], rank, *ones]),
            ):
                header[key + suffix] = entry("F16", list(shape), position)
                position = header[key + suffix]["data_offsets"][1]
    with path.open("wb") as file:
        text = dump(header)
        file.write(len(text).to_bytes(8, "little") + text)
        block = F16_NUMBERS * 4096
        for fields in header.values():
            begin, end = fields["data_offsets"]
            size = end - begin
            file.write(b"\0\x44" if size == 2 else (block * (size // len(block) + 1))[:size])
    return position
