"""PEFT's config in the header of the weights: what a model of diffusers saves of itself, with its own module names.

Source: huggingface/diffusers `loaders/peft.py` (`PeftAdapterMixin.save_lora_adapter`; `load_lora_adapter(prefix=None)` reads it).
A pipeline's file says there a config for each component, with the component before every field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adapterops.plugin import HEADER_CONFIG, Source


def own_config(source: Source) -> Mapping[str, Any] | None:
    """The config of the one model that the file is of; None where the header says none, or those of components."""
    text = source.metadata.get(HEADER_CONFIG)
    try:
        value = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, Mapping) and isinstance(value.get("peft_type"), str) else None


def with_own_config(source: Source) -> Source:
    """The source with the config of its header, where none stands beside it."""
    config = own_config(source) if source.config is None else None
    return (
        source
        if config is None
        else replace(source, config=config, config_path=f"{source.path}: header {HEADER_CONFIG}")
    )
