"""adapterops: read, understand and convert adapter files (LoRA and its kin), with proof.

    import adapterops as ao

    adapter = ao.load("style.safetensors")
    ao.convert("style.safetensors", to="peft", output="style-peft")
    print(ao.inspect("style.safetensors").architecture)

Importing this package imports neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterops import integrations
    from adapterops.adapter import Adapter, Certainty, Fact, Update
    from adapterops.api import Result, convert, save
    from adapterops.errors import AdapterOpsError
    from adapterops.inspection import Inspection, inspect
    from adapterops.loading import load
    from adapterops.merging.merge import MergeResult, combine, merge
    from adapterops.operations.loftq import LoftqModule, LoftqProposal, LoftqResult, loftq
    from adapterops.operations.to_lora import ToLoraResult, as_lora, to_lora
    from adapterops.validation.report import Report
    from adapterops.validation.rule import Finding, Rule, Severity
    from adapterops.validation.run import validate

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter",
    "AdapterOpsError": "errors",
    "Certainty": "adapter",
    "Fact": "adapter",
    "Finding": "validation.rule",
    "Inspection": "inspection",
    "LoftqModule": "operations.loftq",
    "LoftqProposal": "operations.loftq",
    "LoftqResult": "operations.loftq",
    "MergeResult": "merging.merge",
    "Result": "api",
    "Report": "validation.report",
    "Rule": "validation.rule",
    "Severity": "validation.rule",
    "ToLoraResult": "operations.to_lora",
    "Update": "adapter",
    "as_lora": "operations.to_lora",
    "combine": "merging.merge",
    "convert": "api",
    "inspect": "inspection",
    "load": "loading",
    "loftq": "operations.loftq",
    "merge": "merging.merge",
    "save": "api",
    "to_lora": "operations.to_lora",
    "validate": "validation.run",
}

__all__ = [
    "Adapter",
    "AdapterOpsError",
    "Certainty",
    "Fact",
    "Finding",
    "Inspection",
    "LoftqModule",
    "LoftqProposal",
    "LoftqResult",
    "MergeResult",
    "Report",
    "Result",
    "Rule",
    "Severity",
    "ToLoraResult",
    "Update",
    "__version__",
    "as_lora",
    "combine",
    "convert",
    "inspect",
    "integrations",
    "load",
    "loftq",
    "merge",
    "save",
    "to_lora",
    "validate",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "integrations":
        return importlib.import_module("adapterops.integrations")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
