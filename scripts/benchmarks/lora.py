"""A LoRA as sd-scripts writes it, with random numbers in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

SEED = 20_240_229


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted module: where it is, and its names."""

    component: str
    name: str
    """Canonical."""
    original: str
    """Its authors' name for it."""
    key: str
    """What its keys begin with in the workload."""
    shape: tuple[int, ...]
    """(out_features, in_features)."""
    parts: tuple[tuple[str, int], ...] = ()
    """Of a fused projection: the canonical modules that its rows are, in order, and how many rows each has."""

    @property
    def pieces(self) -> tuple[tuple[str, int], ...]:
        """What it is in canonical names: its parts, or itself."""
        return self.parts or ((self.name, self.shape[0]),)


@dataclass(frozen=True, slots=True)
class Lora:
    """What a file is made of, besides its modules."""

    rank: int
    alpha: float
    dtype: torch.dtype
    metadata: Mapping[str, str]
    """What sd-scripts writes into the header: which of its networks it was, and for which base."""


def make(path: Path, lora: Lora, wanted: Iterable[Module], rank: int = 0) -> None:
    """Write the file: factors (rank, in) and (out, rank), and alphas; the same numbers every time.

    `rank` is another one, for tests.
    """
    rank = rank or lora.rank
    random = np.random.Generator(np.random.SFC64(SEED))
    tensors: dict[str, torch.Tensor] = {}
    for module in wanted:
        rows, columns = module.shape
        down = random.standard_normal((rank, columns), dtype=np.float32) / np.float32(columns**0.5)
        up = random.standard_normal((rows, rank), dtype=np.float32) * np.float32(0.01)
        tensors[f"{module.key}.lora_down.weight"] = torch.from_numpy(down).to(lora.dtype)
        tensors[f"{module.key}.lora_up.weight"] = torch.from_numpy(up).to(lora.dtype)
        tensors[f"{module.key}.alpha"] = torch.tensor(lora.alpha, dtype=lora.dtype)
    header = {"ss_network_dim": str(rank), "ss_network_alpha": str(lora.alpha), **lora.metadata}
    save_file(tensors, path, header)
