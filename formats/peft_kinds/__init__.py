"""The types of PEFT (`peft_type`), a row each; a row's module is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterops_formats.peft_kinds.row import PeftMethod

_ROWS = {
    "LORA": ("lora:LORA", ("lora", "kasa", "bdlora", "qalora", "alora", "arrow", "lora_merged", "lora_parameters")),
    "ADALORA": ("adalora:ADALORA", ("adalora",)),
    "LOHA": ("lycoris:LOHA", ("loha",)),
    "LOKR": ("lycoris:LOKR", ("lokr",)),
    "IA3": ("ia3:IA3", ("ia3",)),
    "OFT": ("orthogonal:OFT", ("oft",)),
    "BOFT": ("orthogonal:BOFT", ("boft",)),
    "HRA": ("orthogonal:HRA", ("hra",)),
    "ROAD": ("orthogonal:ROAD", ("road",)),
    "PSOFT": ("orthogonal:PSOFT", ("psoft",)),
    "GLORA": ("orthogonal:GLORA", ("glora",)),
    "MISS": ("blocks:MISS", ("miss",)),
    "BONE": ("blocks:BONE", ()),
    "GRALORA": ("blocks:GRALORA", ("gralora",)),
    "C3A": ("blocks:C3A", ("c3a",)),
    "SHIRA": ("sparse:SHIRA", ("shira",)),
    "DELORA": ("sparse:DELORA", ("delora",)),
    "HIRA": ("sparse:HIRA", ("hira",)),
    "VERA": ("shared:VERA", ("vera",)),
    "PVERA": ("shared:PVERA", ("pvera",)),
    "RANDLORA": ("shared:RANDLORA", ("randlora",)),
    "VBLORA": ("shared:VBLORA", ("vblora",)),
    "TINYLORA": ("shared:TINYLORA", ("tinylora",)),
    "FROD": ("shared:FROD", ("frod",)),
    "UNILORA": ("seeded:UNILORA", ("unilora",)),
    "FOURIERFT": ("seeded:FOURIERFT", ("fourierft",)),
    "WAVEFT": ("seeded:WAVEFT", ("waveft",)),
    "DEFT": ("odd:DEFT", ("deft",)),
    "SUPERTUNING": ("odd:SUPERTUNING", ("supertuning",)),
    "BEFT": ("odd:BEFT", ("beft",)),
    "LN_TUNING": ("odd:LN_TUNING", ("ln_tuning",)),
    "ADAMSS": ("odd:ADAMSS", ("adamss",)),
    "OSF": ("odd:OSF", ("osf",)),
    "PEANUT": ("odd:PEANUT", ("peanut",)),
    "TRAINABLE_TOKENS": ("odd:TRAINABLE_TOKENS", ("trainable_tokens",)),
    "PROMPT_TUNING": ("prompts:PROMPT_TUNING", ("prompt_tuning",)),
    "P_TUNING": ("prompts:P_TUNING", ("p_tuning",)),
    "PREFIX_TUNING": ("prompts:PREFIX_TUNING", ("prefix_tuning",)),
    "CARTRIDGE": ("prompts:CARTRIDGE", ("cartridge",)),
    "CPT": ("prompts:CPT", ("cpt",)),
    "MULTITASK_PROMPT_TUNING": ("prompts:MULTITASK_PROMPT_TUNING", ("multitask_prompt_tuning",)),
    "ADAPTION_PROMPT": ("prompts:ADAPTION_PROMPT", ("adaption_prompt",)),
    "LILY": ("routed:LILY", ("lily",)),
    "POLY": ("routed:POLY", ("poly",)),
    "XLORA": ("routed:XLORA", ("xlora",)),
    "SHADOW": ("routed:SHADOW", ("shadow",)),
}
"""By `peft_type`: where the row stands, and the methods whose updates it is for."""


class _Kinds(Mapping[str, "PeftMethod"]):
    """Rows by `peft_type`."""

    def __init__(self) -> None:
        self._made: dict[str, PeftMethod] = {}

    def __getitem__(self, kind: str) -> PeftMethod:
        row = self._made.get(kind)
        if row is None:
            module, _, name = _ROWS[kind][0].partition(":")
            row = self._made[kind] = getattr(import_module(f"adapterops_formats.peft_kinds.{module}"), name)
        return row

    def __contains__(self, kind: object) -> bool:
        return kind in _ROWS

    def __iter__(self) -> Iterator[str]:
        return iter(_ROWS)

    def __len__(self) -> int:
        return len(_ROWS)


KINDS: Mapping[str, PeftMethod] = _Kinds()
"""By `peft_type`."""
KIND_OF: Mapping[str, str] = {method: kind for kind, (_, methods) in _ROWS.items() for method in methods}
"""The `peft_type` of a method of updates."""


def row_of(method: str) -> PeftMethod:
    """The row of a method of updates.  Raises `KeyError` where PEFT has none."""
    return KINDS[KIND_OF[method]]
