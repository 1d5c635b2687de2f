"""The methods that updates are instances of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module

from adapterops.methods.base import Method

_CLASSES = {
    "lora": "lora:Lora",
    "kasa": "kasa:Kasa",
    "bdlora": "blocks:BlockDiagonal",
    "qalora": "blocks:Pooled",
    "alora": "lora_routed:ALora",
    "arrow": "lora_routed:Arrow",
    "lora_parameters": "lora_parameters:LoraParameters",
    "lora_merged": "merged:Merged",
    "adalora": "adalora:AdaLora",
    "loha": "loha:Loha",
    "lokr": "lokr:Lokr",
    "ia3": "ia3:Ia3",
    "oft": "oft:Oft",
    "boft": "boft:Boft",
    "hra": "hra:Hra",
    "road": "road:Road",
    "psoft": "psoft:Psoft",
    "glora": "glora:Glora",
    "lycoris_oft": "lycoris_oft:LycorisOft",
    "lycoris_glora": "lycoris_glora:LycorisGlora",
    "onetrainer_oft": "onetrainer_oft:OneTrainerOft",
    "diff": "difference:Difference",
    "saved": "saved:Saved",
    "trainable_tokens": "saved:TrainableTokens",
    "bundled": "bundled:Bundled",
    "miss": "miss:Miss",
    "gralora": "gralora:Gralora",
    "c3a": "c3a:C3a",
    "shira": "shira:Shira",
    "delora": "delora:Delora",
    "hira": "hira:Hira",
    "deft": "deft:Deft",
    "supertuning": "supertuning:Supertuning",
    "beft": "beft:Beft",
    "ln_tuning": "ln_tuning:LnTuning",
    "adamss": "adamss:Adamss",
    "osf": "osf:Osf",
    "peanut": "peanut:Peanut",
    "prompt_tuning": "prompts:PromptTuning",
    "p_tuning": "prompts:PTuning",
    "cpt": "prompts:Cpt",
    "multitask_prompt_tuning": "prompts:MultitaskPromptTuning",
    "prefix_tuning": "prompts:PrefixTuning",
    "cartridge": "prompts:Cartridge",
    "adaption_prompt": "prompts:AdaptionPrompt",
    "lily": "mixtures:Lily",
    "poly": "mixtures:Poly",
    "xlora": "mixtures:Xlora",
    "shadow": "mixtures:Shadow",
    "vera": "vera:Vera",
    "pvera": "pvera:Pvera",
    "randlora": "randlora:RandLora",
    "vblora": "vblora:Vblora",
    "unilora": "unilora:Unilora",
    "tinylora": "tinylora:Tinylora",
    "frod": "frod:Frod",
    "fourierft": "fourierft:FourierFt",
    "waveft": "waveft:WaveFt",
}
"""Where each method's class stands.  A module is imported when its method is asked for."""


@cache
def _made(name: str) -> Method:
    """The one instance of a method.  Raises `KeyError` for a name that none has."""
    module, _, kind = _CLASSES[name].partition(":")
    made: Method = getattr(import_module(f"adapterops.methods.{module}"), kind)()
    return made


class _Methods(Mapping[str, Method]):
    """Every method by name."""

    __getitem__ = staticmethod(_made)

    def __contains__(self, name: object) -> bool:
        return name in _CLASSES

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


METHODS: Mapping[str, Method] = _Methods()

__all__ = ["METHODS", "Method"]
