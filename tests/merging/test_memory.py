"""Memory follows the largest module, not the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_adapters import peft

SIZE, RANK, FEW, MANY = 768, 16, 4, 32


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of four modules each (`few0`, `few1`), and two of thirty-two (`many0`, `many1`)."""
    folder = tmp_path_factory.mktemp("layers")
    generator = torch.Generator().manual_seed(0)
    for name, layers in (("few", FEW), ("many", MANY)):
        for n in (0, 1):
            tensors = {}
            for layer in range(layers):
                tensors[f"l.{layer}.q.lora_A.weight"] = torch.randn(RANK, SIZE, generator=generator)
                tensors[f"l.{layer}.q.lora_B.weight"] = torch.randn(SIZE, RANK, generator=generator)
            peft(folder / f"{name}{n}", tensors)
    return folder


_CODE = """
import sys
import numpy, torch
import adapterops as ao
import adapterops.merging.merge, adapterops_formats.peft
from adapterops.linalg import dense, lowrank, random, trimming
torch.linalg.svd(torch.ones(8, 8))
torch.linalg.qr(torch.ones(8, 8, dtype=torch.float64))

def peak():
    # Not getrusage's ru_maxrss, which begins with what the parent had.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

before = peak()
one, two, out = sys.argv[1:]
work = {"rank": 16, "device": "cpu", "workers": 1, "overwrite": True}
ao.merge([one, two], out, "svd", **work)
factors = peak()
ao.merge([one, two], out, "dare_ties_svd", density=0.5, **work)
print(before, factors, peak())
"""


def peaks(adapters: Path, name: str, out: Path) -> list[int]:
    """Most bytes resident in a process: with all imported that a merge needs, after one of factors, after one of deltas."""
    paths = [str(adapters / f"{name}{n}") for n in (0, 1)]
    command = [sys.executable, "-c", _CODE, *paths, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process its own peak")
def test_many_layers_need_what_few_do(adapters: Path, tmp_path: Path) -> None:
    before, *few = peaks(adapters, "few", tmp_path / "few")
    _, *many = peaks(adapters, "many", tmp_path / "many")
    for low, high in zip(few, many, strict=True):
        assert abs(high - low) <= 0.2 * low
        # The interpreter and torch are most of that: what the work itself adds must not grow with the files either.
        assert high - before <= 1.2 * (low - before) + (8 << 20)
