"""The check of what a job wrote, without adapterops' readers: the same modules, and the same deltas to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from benchmarks.lora import Module

Array = np.ndarray[Any, Any]
_KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_ENDS = 8
"""How many rows are looked at on either end of a module."""


class WrongOutput(RuntimeError):
    """Raised when a converted file does not do what its source does: then its time means nothing."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a target spells modules, factors and scale."""

    stem: Callable[[str, str], str]
    """What the keys of a module begin with, from its component and its name."""
    whole: bool = False
    """Modules go by their authors' names, fused projections included; else by the canonical names of their parts."""
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"
    alpha_tensors: bool = False
    """The alpha is a tensor a module; else it is in a config.  Where there is neither, readers apply scale 1."""
    folder: bool = False
    """PEFT's: a config in a file of its own, a subfolder a component where there are several."""


SPELLINGS = {
    "diffusers": Spelling(lambda component, name: f"{component}.{name}"),
    "peft": Spelling(lambda component, name: f"base_model.model.{name}", folder=True),
    "kohya-diffusers": Spelling(
        lambda component, name: _KOHYA_PREFIXES[component] + name.replace(".", "_"),
        down=".lora_down.weight", up=".lora_up.weight", alpha_tensors=True,
    ),
    "comfy": Spelling(lambda component, name: f"diffusion_model.{name}", whole=True, alpha_tensors=True),
}  # fmt: skip


def check(
    source: Path, result: Path, spelling: str, wanted: Sequence[Module], samples: int = 12, folded: bool = False
) -> None:
    """Compare a conversion with its source, knowing nothing of how it was made.

    `spelling` names one of `SPELLINGS`; `folded` says that readers must have no scale left to apply.  Raises
    `WrongOutput` where the modules are not the same number, or a sampled one's scaled delta (the first and the last
    rows of each of its parts) is not the source's to the last bit.
    """
    form = SPELLINGS[spelling]
    files = _open(result, form, wanted)
    expected = sum(1 if form.whole else len(module.pieces) for module in wanted)
    keys = {file.path: file.keys for file in files.values()}
    count = sum(key.endswith(form.down) for own in keys.values() for key in own)
    if count != expected:
        raise WrongOutput(f"{result}: adapts {count} modules, not the {expected} of its source")
    with safe_open(source, framework="pt") as opened:
        before = _File(source, opened, frozenset(opened.keys()), {})
        for module in sampled(wanted, samples):
            _compare(before, files[module.component], form, module, folded)


def sampled(wanted: Sequence[Module], samples: int) -> list[Module]:
    """As many modules or a few more, evenly taken from those of one part, those of several and so on."""
    ordered = sorted(wanted, key=lambda module: len(module.pieces))
    return ordered[:: max(1, len(ordered) // samples)]


@dataclass(frozen=True, slots=True)
class _File:
    """An opened file, its keys, and the fields of the PEFT config that belongs to it."""

    path: Path
    opened: Any
    keys: frozenset[str]
    config: Mapping[str, Any]

    def array(self, key: str) -> Array:
        """A tensor in float64.  Raises `WrongOutput` where there is none."""
        if key not in self.keys:
            raise WrongOutput(f"{self.path}: has no {key}")
        return np.asarray(self.opened.get_tensor(key).double().numpy())


def _open(result: Path, form: Spelling, wanted: Sequence[Module]) -> dict[str, _File]:
    """The file of each component; they may share one."""
    components = list(dict.fromkeys(module.component for module in wanted))
    out = {}
    for component in components:
        folder = result / component if len(components) > 1 else result
        path = folder / "adapter_model.safetensors" if form.folder else result
        opened: Any = safe_open(path, framework="pt")
        if form.folder:
            config = json.loads((folder / "adapter_config.json").read_text())
        else:
            fields = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
            config = {k.removeprefix(f"{component}."): v for k, v in fields.items() if k.startswith(f"{component}.")}
        if config.get("alpha_pattern") or config.get("rank_pattern") or config.get("use_rslora"):
            raise WrongOutput(f"{path}: one alpha and one rank need no patterns")
        out[component] = _File(path, opened, frozenset(opened.keys()), config)
    return out


def _compare(before: _File, after: _File, form: Spelling, module: Module, folded: bool) -> None:
    down, up = before.array(f"{module.key}.lora_down.weight"), before.array(f"{module.key}.lora_up.weight")
    scale = float(before.array(f"{module.key}.alpha")) / down.shape[0]
    start = 0
    for name, rows in ((module.original, module.shape[0]),) if form.whole else module.pieces:
        stem = _stem(after, form, module.component, name)
        a, b = after.array(stem + form.down), after.array(stem + form.up)
        applied = _scale(after, form, stem, a.shape[0])
        if folded and applied != 1:
            raise WrongOutput(f"{after.path}: leaves {name} a scale of {applied:g} to apply; it is not folded")
        if b.shape[0] != rows:
            raise WrongOutput(f"{after.path}: {name} has {b.shape[0]} rows, not {rows}")
        own = up[start : start + rows]
        if not np.array_equal(_delta(scale, own, down), _delta(applied, b, a)):
            raise WrongOutput(f"{after.path}: the delta of {name} is not the one of its source")
        start += rows


def _stem(file: _File, form: Spelling, component: str, name: str) -> str:
    # Some versions of transformers' CLIP have `text_model.` in their module names, others do not.
    stems = [form.stem(component, n) for n in (name, name.removeprefix("text_model."))]
    found = next((stem for stem in stems if stem + form.down in file.keys), None)
    if found is None:
        raise WrongOutput(f"{file.path}: does not adapt {name}")
    return found


def _scale(file: _File, form: Spelling, stem: str, rank: int) -> float:
    """What readers of the target multiply with."""
    if form.alpha_tensors:
        return float(file.array(f"{stem}.alpha")) / rank if f"{stem}.alpha" in file.keys else 1.0
    return float(file.config["lora_alpha"]) / file.config["r"] if file.config else 1.0


def _delta(scale: float, b: Array, a: Array) -> Array:
    """The first and the last rows of scale · B · A."""
    return np.asarray(scale * (np.concatenate([b[:_ENDS], b[-_ENDS:]]) @ a))
