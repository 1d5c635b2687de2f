"""What one format says and another has no place for, carried in the header so that the way back is exact.

The header's `adapterops` entry is JSON: for each format that the adapter has been in, the choices of spelling
that its keys leave open (`spelling`); and the config fields of a PEFT folder that belong to no tensor (`config`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, NamedTuple, TypeGuard

from adapterops.storage.dtypes import BITS

KEY = "adapterops"
HEADER_CONFIG = "lora_adapter_metadata"
"""The header entry with peft's config of a model, or of each component of a pipeline: huggingface/diffusers
`loaders/lora_base.py` (`LORA_ADAPTER_METADATA_KEY`)."""
NOT_CARRIED = ("sshs_model_hash", "sshs_legacy_hash", HEADER_CONFIG, "format", KEY)
"""Header entries that describe the source's own bytes or layout and would be false of another file."""


class Carried(NamedTuple):
    """The contents of the `adapterops` header entry."""

    spelling: Mapping[str, Mapping[str, Any]] = {}
    config: Mapping[str, Mapping[str, Any]] = {}
    architecture: str | None = None
    """The base model where it was known; it decides where modules alone fit several."""

    @classmethod
    def parse(cls, metadata: Mapping[str, str]) -> Carried:
        """The entry of a header; empty where there is none, or where someone else wrote something else there."""
        try:
            value = json.loads(metadata.get(KEY, "{}"))
        except (ValueError, RecursionError):
            return cls()
        if not isinstance(value, dict):
            return cls()
        architecture = value.get("architecture")
        return cls(
            {name: _checked(choices) for name, choices in _tables(value.get("spelling")).items()},
            _tables(value.get("config")),
            architecture if isinstance(architecture, str) else None,
        )

    @staticmethod
    def strip(metadata: Mapping[str, str]) -> dict[str, str]:
        """The header's strings that stay true of a converted file."""
        return {key: value for key, value in metadata.items() if key not in NOT_CARRIED}

    def dump(self) -> str | None:
        """The entry's text, the same for the same contents; None where there is nothing to say."""
        value: dict[str, Any] = {
            name: {k: dict(v) for k, v in part.items() if v}
            for name, part in (("config", self.config), ("spelling", self.spelling))
        }
        value["architecture"] = self.architecture
        value = {name: part for name, part in value.items() if part}
        return json.dumps(value, sort_keys=True, separators=(",", ":")) if value else None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number that a float holds: finite, and no whole one that is larger.  JSON and YAML have such."""
    return (type(value) is float and isfinite(value)) or (type(value) is int and abs(value) < 2**1023)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _is_stored(value: object) -> bool:
    """[dtype, shape]"""
    return isinstance(value, list) and len(value) == 2 and _is_text(value[0]) and _is_sizes(value[1])


def _is_blocks(value: object) -> bool:
    """[[module, rank], …]"""
    return isinstance(value, list) and all(
        isinstance(v, list) and len(v) == 2 and _is_text(v[0]) and type(v[1]) is int and v[1] >= 0 for v in value
    )


def _is_table_of(value: object, test: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(test(v) for v in value.values())


_CHOICES: dict[str, Callable[[object], bool]] = {
    "adapter_name": _is_text,
    "prefix": _is_text,
    "prefix_for": _is_text,
    "filled": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "component": _is_text,
    "prefixes": lambda value: _is_table_of(value, _is_text),
    "alpha_absent": lambda value: value == "all" or (isinstance(value, list) and all(map(_is_text, value))),
    "alpha_as": lambda value: _is_stored(value) or _is_table_of(value, _is_stored),
    "flag_as": lambda value: value in BITS,
    "idle_alpha": lambda value: _is_table_of(value, is_number),
    "padded": lambda value: _is_table_of(value, lambda rank: type(rank) is int and rank > 0),
    "stretched": lambda value: _is_table_of(value, is_number),
    "joined": lambda value: _is_table_of(value, _is_blocks),
    "targets": lambda value: _is_table_of(value, lambda names: isinstance(names, list) and all(map(_is_text, names))),
    "types": lambda value: _is_table_of(value, _is_text),
    "ends": lambda value: _is_table_of(value, _is_text),
    "shapes": lambda value: _is_table_of(value, lambda roles: _is_table_of(roles, _is_sizes)),
}
"""The choices of spelling that `dialects.read` records, and what each looks like: headers come from strangers."""


def _checked(choices: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in choices.items() if name in _CHOICES and _CHOICES[name](value)}


def _tables(value: object) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict):
        return {}
    return {str(k): v for k, v in value.items() if isinstance(v, dict)}
