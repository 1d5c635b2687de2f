"""What the generators of fixtures share: drawn values, headers in one order, CLIP under its published names."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


class PublishedClip(nn.Module):
    """A CLIP text model under the names of the published checkpoints: transformers 5 dropped `text_model.`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text_model = model


def values(shape: Iterable[int], name: str, deviation: float = 0.02) -> Tensor:
    """Normal values that depend only on the tensor's name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(tuple(shape), generator=generator) * deviation


def fill(module: nn.Module, only: str = "") -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if only in name:
                parameter.copy_(values(parameter.shape, name))


def settle(path: Path, extra: dict[str, str] | None = None) -> None:
    """Adds metadata to a safetensors file, and sorts it: safetensors writes it in a new order every time."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    metadata = {**header.pop("__metadata__", {}), **(extra or {})}
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def training_metadata(module: str, rank: int, alpha: float, base: str, **extra: str) -> dict[str, str]:
    """What sd-scripts says in the header of a file that it trained."""
    return {
        "ss_base_model_version": base,
        "ss_network_alpha": str(alpha),
        "ss_network_dim": str(rank),
        "ss_network_module": module,
        "ss_output_name": "fixture",
        "ss_v2": "False",
        **extra,
    }
