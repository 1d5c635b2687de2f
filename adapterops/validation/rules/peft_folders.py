"""What the tables of loaders that read PEFT folders ask of an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import sqrt
from typing import Any

from adapterops.validation.rules.loader_facts import first_key, of_role, peft_config, same, scale
from adapterops.validation.subject import Subject

TIED_WEIGHTS = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
"""The base's own, which peft saves beside factors on them and servers leave out."""
_MLX_ENDS = (".lora_a", ".lora_b")
_PAIR = re.compile(r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$")


def is_mlx(subject: Subject) -> bool:
    """Whether mlx-lm wrote the adapter."""
    return any(key.endswith(_MLX_ENDS) for key in subject.tensors)


def foreign(subject: Subject) -> list[str]:
    """All keys of an adapter that is no PEFT folder's."""
    known = subject.recognised is not None or is_mlx(subject)
    return list(subject.tensors) if known and subject.dialect not in ("peft", "miss") else []


def other_type(subject: Subject) -> list[str]:
    """The `peft_type` of a PEFT folder that is no LoRA's."""
    kind = peft_config(subject).get("peft_type")
    return [str(kind)] if kind not in (None, "LORA") and subject.recognised is not None else []


def lora_config(subject: Subject) -> Mapping[str, Any]:
    """The config of a PEFT folder with a LoRA; empty for everything else."""
    config = peft_config(subject)
    return config if config.get("peft_type") == "LORA" and subject.recognised is not None else {}


def flagged(name: str, subject: Subject) -> list[str]:
    """The name of a field that a LoRA's config sets."""
    return [name] if lora_config(subject).get(name) else []


def saved_modules(subject: Subject) -> list[str]:
    """What `modules_to_save` lists."""
    listed = lora_config(subject).get("modules_to_save")
    return [str(name) for name in listed] if isinstance(listed, list) else []


def other_tensors(subject: Subject) -> list[str]:
    """Tensors of a LoRA that are neither factors nor DoRA's magnitudes, which have rules of their own."""
    if not lora_config(subject):
        return []
    return [key for key in subject.tensors if not _PAIR.search(key) and "lora_magnitude_vector" not in key]


def magnitudes(subject: Subject) -> list[str]:
    """The keys of a LoRA folder's DoRA magnitudes."""
    return of_role(subject, "magnitude") if lora_config(subject) else []


def ranks(subject: Subject) -> list[int]:
    """The rank of every LoRA module."""
    return [u.tensors["A"].shape[0] for u in subject.updates if u.method == "lora" and "A" in u.tensors]


def scaled_apart(subject: Subject, rslora: bool) -> list[str]:
    """Modules whose scale is not the one that the config's `r` and `lora_alpha` make, for a loader that reads no patterns.

    `rslora`: whether it reads `use_rslora`.
    """
    config = lora_config(subject)
    alpha, rank = positive(config.get("lora_alpha")), positive(config.get("r"))
    if alpha is None or rank is None:
        return []
    one = alpha / (sqrt(rank) if rslora and config.get("use_rslora") else rank)
    known = [(u, s) for u in subject.updates if (s := scale(u)) is not None]
    return [first_key(update) for update, own in known if not same(own, one)]


def positive(value: Any) -> float | None:
    """A number of a config that is one and above zero."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else None
