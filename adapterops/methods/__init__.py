"""The methods that updates are instances of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from adapterops.methods.base import Method

_CLASSES = {
    "lora": "lora:Lora",
    "loha": "loha:Loha",
    "lokr": "lokr:Lokr",
    "ia3": "ia3:Ia3",
    "diff": "difference:Difference",
    "saved": "saved:Saved",
    "trainable_tokens": "saved:TrainableTokens",
    "bundled": "bundled:Bundled",
}
"""Where each method's class stands.  A module is imported when its method is asked for."""


class _Methods(Mapping[str, Method]):
    """Every method by name."""

    def __init__(self) -> None:
        self._made: dict[str, Method] = {}

    def __getitem__(self, name: str) -> Method:
        made = self._made.get(name)
        if made is None:
            module, _, kind = _CLASSES[name].partition(":")
            made = self._made[name] = getattr(import_module(f"adapterops.methods.{module}"), kind)()
        return made

    def __contains__(self, name: object) -> bool:
        return name in _CLASSES

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


METHODS: Mapping[str, Method] = _Methods()

__all__ = ["METHODS", "Method"]
