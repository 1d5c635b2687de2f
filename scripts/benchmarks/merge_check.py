"""The check of merged adapters, without adapterops' readers: what peft's own functions and float64 make of the sources.

Random masks are the one thing taken from adapterops: peft's functions are given the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft.utils import merge_utils
from safetensors import safe_open

from adapterops.linalg.random import Draw
from benchmarks.check import WrongOutput

DENSITY = 0.2
"""Of every method that has one."""
FACTORS = ("linear", "ties", "dare_ties")
DENSE = ("ties_svd", "dare_ties_svd", "magnitude_prune_svd")
_FORMS = {True: (".lora_A.weight", ".lora_B.weight"), False: (".lora_down.weight", ".lora_up.weight")}


@dataclass(frozen=True, slots=True)
class Lora:
    """A PEFT folder, or a file with an alpha a module."""

    path: Path
    tensors: Mapping[str, torch.Tensor]
    scale: float | None

    @classmethod
    def read(cls, path: Path, names: Sequence[str] = ()) -> Lora:
        """Its tensors; of some modules only, where they are named."""
        folder = path.is_dir()
        scale = None
        if folder:
            config = json.loads((path / "adapter_config.json").read_text())
            if config.get("alpha_pattern") or config.get("rank_pattern") or config.get("use_rslora"):
                raise WrongOutput(f"{path}: one alpha and one rank need no patterns")
            scale = config["lora_alpha"] / config["r"]
        with safe_open(path / "adapter_model.safetensors" if folder else path, framework="pt") as file:
            keys = [k for k in file.keys() if not names or any(k.startswith(f"{n}.") for n in names)]  # noqa: SIM118
            return cls(path, {key: file.get_tensor(key) for key in keys}, scale)

    @property
    def modules(self) -> list[str]:
        """What the keys of its modules begin with."""
        down = _FORMS[self.scale is not None][0]
        return [key.removesuffix(down) for key in self.tensors if key.endswith(down)]

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """B, A and the scale.  Raises `WrongOutput` where there is no such module."""
        down, up = _FORMS[self.scale is not None]
        try:
            b, a = self.tensors[module + up], self.tensors[module + down]
            scale = self.scale if self.scale is not None else float(self.tensors[module + ".alpha"]) / a.shape[0]
        except KeyError as error:
            raise WrongOutput(f"{self.path}: does not adapt {module}") from error
        return b, a, scale


def modules(path: Path) -> list[str]:
    """The modules of an adapter, from its header."""
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    down = _FORMS[path.is_dir()][0]
    with safe_open(file, framework="pt") as opened:
        return [key.removesuffix(down) for key in opened.keys() if key.endswith(down)]  # noqa: SIM118


def check(sources: Sequence[Path], result: Path, method: str, names: Sequence[str], ours: bool = True) -> None:
    """Compare the named modules of a merge of weights 1 with what it should be, within the output's rounding.

    `ours` False: the peer drew its masks itself, so that of random methods only shapes are looked at.  Raises
    `WrongOutput`.
    """
    expected = modules(sources[0])
    if sorted(modules(result)) != sorted(expected):
        raise WrongOutput(f"{result}: does not adapt the {len(expected)} modules of its sources")
    inputs, output = [Lora.read(path, names) for path in sources], Lora.read(result, names)
    for name in names:
        terms = [source.factors(name) for source in inputs]
        b, a, scale = output.factors(name)
        if not (torch.isfinite(b).all() and torch.isfinite(a).all()):
            raise WrongOutput(f"{result}: {name} has numbers that are none")
        if method in FACTORS:
            if ours or method != "dare_ties":
                _compare_factors(result, name, method, terms, (b, a, scale))
        elif method in DENSE:
            merged = dense(method, terms, name if ours else None)
            _insist(excess_of_dense(merged, b.float() * scale, a.float()), 1e-3, result, name)
        else:
            _insist(excess_of_sum(terms, b, a, scale), 1e-3, result, name)


def _insist(excess: float, most: float, result: Path, name: str) -> None:
    if not excess <= most:
        raise WrongOutput(f"{result}: {name} misses the best of its rank by {excess:.1e} of its error")


Term = tuple[torch.Tensor, torch.Tensor, float]
"""B, A and the scale."""


def _compare_factors(result: Path, name: str, method: str, terms: Sequence[Term], found: Term) -> None:
    if found[2] != 1:
        raise WrongOutput(f"{result}: {name} has the scale {found[2]:g}, and its factors have it already")
    for role in "BA":
        values = [_factor(term, role).float() for term in terms]
        roots = torch.tensor([term[2] ** 0.5 for term in terms])
        merged = merge(method, values, roots, name, role)
        written = _factor(found, role)
        step = torch.finfo(written.dtype).eps
        right = torch.isclose(written.float(), merged, rtol=2 * step, atol=1e-6 * float(merged.abs().max()))
        if method == "ties":
            # Of entries that tie at the threshold, any may stay.
            right |= torch.stack([value.abs() == _threshold(value) for value in values]).any(dim=0)
        if not right.all():
            raise WrongOutput(f"{result}: the {role} of {name} is not what {method} makes of its sources")


def _factor(term: Term, role: str) -> torch.Tensor:
    return term[0] if role == "B" else term[1]


def _threshold(values: torch.Tensor) -> torch.Tensor:
    """The smallest magnitude that trimming keeps."""
    return values.abs().reshape(-1).topk(int(DENSITY * values.numel()))[0][-1]


def merge(
    method: str, values: Sequence[torch.Tensor], weights: torch.Tensor, name: str | None, role: str
) -> torch.Tensor:
    """What peft makes of tensors; its masks are those of adapterops for that module, unless `name` is None."""
    kind = method.removesuffix("_svd")
    if kind == "linear":
        return torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(dim=0)
    function: Any = getattr(merge_utils, kind)
    with _masks(name, role):
        arguments = (list(values), weights, DENSITY)
        merged: torch.Tensor = function(*arguments, "total") if "ties" in kind else function(*arguments)
    return merged


@contextmanager
def _masks(name: str | None, role: str) -> Iterator[None]:
    if name is None:
        yield
        return
    number = 0

    def pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        nonlocal number
        draw = Draw(0, "model", name.removeprefix("base_model.model."), role, number)
        number += 1
        mask = torch.from_numpy(draw.keep(0, tensor.numel(), density)).reshape(tensor.shape)
        return tensor * mask / density if rescale else tensor * mask

    with patch.object(merge_utils, "random_pruning", pruning):
        yield


def dense(method: str, terms: Sequence[Term], name: str | None) -> torch.Tensor:
    """The merged delta (out, in), float32, that a method on deltas is to factorise."""
    deltas = [(b.float() * scale) @ a.float() for b, a, scale in terms]
    return merge(method, deltas, torch.ones(len(deltas)), name, "delta")


def excess_of_dense(merged: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> float:
    """(‖M − B·A‖ − ‖M − best‖) / ‖M − best‖: the best of that rank by the eigenvalues of the float64 Gram matrix."""
    return excess_over(lost_at(merged), merged, b, a)


def lost_at(merged: torch.Tensor) -> torch.Tensor:
    """‖M − best of rank r‖² for every r, (min(m, n) + 1,), float64."""
    wide = merged if merged.shape[0] <= merged.shape[1] else merged.T
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64)
    for part in torch.split(wide, 1024, dim=1):
        gram.addmm_(part.double(), part.double().T)
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    return torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0)


def excess_over(lost: torch.Tensor, merged: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> float:
    """The excess of factors, `lost` being what `lost_at` gives."""
    square = 0.0
    for part, rows in zip(torch.split(merged, 512), torch.split(b, 512), strict=True):
        square += float((part.double() - rows.double() @ a.double()).square().sum())
    return float((square / lost[b.shape[1]]).sqrt()) - 1


def excess_of_sum(terms: Sequence[Term], b: torch.Tensor, a: torch.Tensor, scale: float) -> float:
    """Likewise of factors of Σ scale·B·A: float64, by QR of the stacked factors.

    At the rank of the sum itself, where the best has no error, what is missed is relative to the sum's own norm.
    """
    left = torch.cat([t[0].double() * t[2] for t in terms], dim=1)
    right = torch.cat([t[1].double() for t in terms], dim=0)
    qb, rb = torch.linalg.qr(left)
    qa, ra = torch.linalg.qr(right.T)
    core = rb @ ra.T
    values = torch.linalg.svdvals(core)
    best = float(values[b.shape[1] :].square().sum())
    ours_b, ours_a = b.double() * scale, a.double().T
    inside_b, inside_a = qb.T @ ours_b, qa.T @ ours_a
    # What of the output lies beside the sum's own column and row spaces is error, and is added up by itself.
    outside_b, outside_a = ours_b - qb @ inside_b, ours_a - qa @ inside_a
    square = float((core - inside_b @ inside_a.T).square().sum())
    for one, other in ((outside_b, inside_a), (inside_b, outside_a), (outside_b, outside_a)):
        square += float((one.T @ one * (other.T @ other)).sum())
    if best <= 1e-20 * float(values.square().sum()):
        return sqrt(square / float(values.square().sum()))
    return sqrt(square / best) - 1
