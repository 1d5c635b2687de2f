"""Weights and densities at the ends of what numbers can say: told by name, never a traceback, never zeros in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_adapters import pair, peft

import adapterops as ao
from adapterops.errors import UsageError


@pytest.fixture
def both(tmp_path: Path) -> list[Path]:
    return [peft(tmp_path / f"a{k}", pair(k)) for k in range(2)]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {"weights": [1e80, 1], "density": 0.5}),
        ("linear", {"weights": [1e80, 1], "dtype": "float64"}),
        ("ties_svd", {"weights": [1, -1e39], "density": 0.5}),
        ("dare_ties", {"density": 1e-80}),
        ("dare_linear_svd", {"density": 1e-39}),
        ("della", {"weights": [1e39, 1], "density": 0.5}),
        ("knots", {"weights": [1e39, 1], "density": 0.5}),
    ],
)
def test_factors_beyond_float32(method: str, options: dict[str, Any], both: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"multiplied by -?[0-9.]+e\+\d+ .* more than float32 holds"):
        ao.merge(both, tmp_path / "out", method, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["magnitude_prune", "ties", "magnitude_prune_svd", "ties_svd"])
def test_a_density_that_keeps_nothing_is_told(method: str, both: list[Path]) -> None:
    adapters = [ao.load(path) for path in both]
    (report,) = ao.combine(adapters, method, density=1e-6).modules
    assert report.empty
    (report,) = ao.combine(adapters, method, density=0.5).modules
    assert not report.empty


@pytest.mark.parametrize("method", ["ties", "ties_svd", "svd"])
def test_adapters_of_zeros_are_not_made_nothing(method: str, tmp_path: Path) -> None:
    zeros = {name: tensor * 0 for name, tensor in pair(0).items()}
    adapters = [ao.load(peft(tmp_path / f"a{k}", zeros)) for k in range(2)]
    merged = ao.combine(adapters, method, **({} if method == "svd" else {"density": 0.5}))
    assert not any(report.empty for report in merged.modules)
    (update,) = merged.adapter
    assert not torch.frombuffer(update.tensors["B"].read(), dtype=torch.uint8).any()
