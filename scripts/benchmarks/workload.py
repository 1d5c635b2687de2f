"""A LoRA of SDXL as sd-scripts writes it, with random numbers in it, and the check of what was made of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from adapterops import architectures

RANK, ALPHA = 32, 16.0
SEED = 20_240_229
_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


class WrongOutput(RuntimeError):
    """Raised when a converted file does not do what its source does: then its time means nothing."""


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted module: where it is, and its names."""

    component: str
    name: str
    """Canonical."""
    key: str
    """What its keys begin with in the workload."""
    shape: tuple[int, ...]
    """(out_features, in_features)."""

    @property
    def diffusers_key(self) -> str:
        """What Kohya keys with diffusers' block names begin with."""
        return _PREFIXES[self.component] + self.name.replace(".", "_")


def modules(every: int = 1) -> list[Module]:
    """The linear layers that sd-scripts adapts: of the UNet's attention blocks, and the encoders' layers.

    `every` takes one of so many, for tests.
    """
    out = []
    for component in architectures.load("sdxl").components.values():
        parts = ("attentions",) if component.name == "unet" else ("self_attn", "mlp")
        for spec in component.modules.values():
            if spec.kind == "linear" and not set(parts).isdisjoint(spec.name.split(".")):
                original = spec.original if component.name == "unet" else spec.name
                key = _PREFIXES[component.name] + original.replace(".", "_")
                out.append(Module(component.name, spec.name, key, spec.shape))
    return out[::every]


def make(path: Path, wanted: Iterable[Module], rank: int = RANK) -> None:
    """Write the workload: float16 factors and alphas, the same numbers every time."""
    random = np.random.Generator(np.random.SFC64(SEED))
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for module in wanted:
        rows, columns = module.shape
        down = random.standard_normal((rank, columns), dtype=np.float32) / np.float32(columns**0.5)
        up = random.standard_normal((rows, rank), dtype=np.float32) * np.float32(0.01)
        tensors[f"{module.key}.lora_down.weight"] = down.astype(np.float16)
        tensors[f"{module.key}.lora_up.weight"] = up.astype(np.float16)
        tensors[f"{module.key}.alpha"] = np.array(ALPHA, dtype=np.float16)
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(ALPHA),
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    save_file(tensors, path, header)


def check(source: Path, result: Path, kind: str, wanted: list[Module], samples: int = 12) -> None:
    """Compare a conversion with its source, knowing nothing of how it was made.

    `kind` is `diffusers`, `kohya-diffusers` or `peft`.  Raises `WrongOutput` where the modules are not the same
    number, or a sampled one's scaled delta (its first 16 rows) is not the source's to the last bit.
    """
    files = {"": result} if kind != "peft" else {
        c: result / c / "adapter_model.safetensors" for c in dict.fromkeys(m.component for m in wanted)
    }  # fmt: skip
    opened: dict[str, Any] = {component: safe_open(path, framework="np") for component, path in files.items()}
    down = ".lora_down.weight" if kind == "kohya-diffusers" else ".lora_A.weight"
    count = sum(key.endswith(down) for file in opened.values() for key in file.keys())  # noqa: SIM118
    if count != len(wanted):
        raise WrongOutput(f"{result}: adapts {count} modules, not the {len(wanted)} of its source")
    with safe_open(source, framework="np") as file:
        for module in wanted[:: max(1, len(wanted) // samples)]:
            before = _delta(file, f"{module.key}.lora_down.weight", f"{module.key}.lora_up.weight", ALPHA)
            if not np.array_equal(before, _converted(opened, result, kind, module)):
                raise WrongOutput(f"{result}: the delta of {module.name} is not the one of its source")


def _converted(opened: Mapping[str, Any], result: Path, kind: str, module: Module) -> np.ndarray[Any, Any]:
    if kind == "kohya-diffusers":
        file, key = opened[""], module.diffusers_key
        alpha = float(file.get_tensor(f"{key}.alpha"))
        return _delta(file, f"{key}.lora_down.weight", f"{key}.lora_up.weight", alpha)
    if kind == "peft":
        file, prefix = opened[module.component], "base_model.model."
        config = json.loads((result / module.component / "adapter_config.json").read_text())
    else:
        file, prefix = opened[""], f"{module.component}."
        text = json.loads(file.metadata()["lora_adapter_metadata"])
        config = {k.removeprefix(prefix): v for k, v in text.items() if k.startswith(prefix)}
    # Some versions of transformers' CLIP have `text_model.` in their module names, others do not.
    names = (module.name, module.name.removeprefix("text_model."))
    found = [prefix + n for n in names if f"{prefix}{n}.lora_A.weight" in file.keys()]  # noqa: SIM118
    if not found:
        raise WrongOutput(f"{result}: does not adapt {module.name}")
    if config.get("alpha_pattern") or config.get("rank_pattern") or config.get("use_rslora"):
        raise WrongOutput(f"{result}: one alpha and one rank need no patterns")
    return _delta(file, f"{found[0]}.lora_A.weight", f"{found[0]}.lora_B.weight", config["lora_alpha"])


def _delta(file: Any, down: str, up: str, alpha: float) -> np.ndarray[Any, Any]:
    """The first rows of alpha / rank · B · A."""
    a, b = file.get_tensor(down).astype(np.float64), file.get_tensor(up).astype(np.float64)
    return np.asarray(alpha / a.shape[0] * (b[:16] @ a))
