"""The corpus of published adapters: its files, and skeletons (keys and shapes) made into files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_MOST = 600 << 20
"""Bytes; a skeleton larger than this becomes a sparse file of zeros (all of those are refused by their keys)."""


def files(corpus: Path) -> list[tuple[str, Path]]:
    """(name, path) of every weights file, in the manifest's order."""
    manifest: list[dict[str, Any]] = json.loads((corpus / "manifest.json").read_text())
    names = [e["file"] for e in manifest if e["kind"] in ("file", "not-an-adapter") and e.get("role") != "config"]
    return [(n.removeprefix("files/"), corpus / n) for n in dict.fromkeys(names)]


def skeletons(corpus: Path) -> list[tuple[str, Path]]:
    """(name, path) of every skeleton."""
    return [(p.stem, p) for p in sorted((corpus / "skeletons").glob("*.json"))]


def fill(skeleton: Path, target: Path) -> None:
    """Write a file with a skeleton's keys and shapes: seeded random bfloat16, alphas 8."""
    shapes = {k: v["shape"] for k, v in json.loads(skeleton.read_text())["tensors"].items()}
    size = sum(2 * torch.Size(s).numel() for s in shapes.values())
    if size > _MOST:
        header, at = {}, 0
        for key, shape in shapes.items():
            end = at + 2 * torch.Size(shape).numel()
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        with target.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
        return
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(shape, generator=generator).bfloat16() if shape else torch.tensor(8.0, dtype=torch.bfloat16)
        for key, shape in shapes.items()
    }
    save_file(tensors, target)
