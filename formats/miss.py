"""MiSS in a PEFT folder, which is also what becomes of Bone: `convert BONE --to miss`.

Bone is MiSS under its older name (peft 0.14 to 0.18): the tensors stay as they are, `bone_block` is spelled
`miss_block`, and the config's `peft_type` becomes MISS, beside the fields that MiSS has in addition.  Everything else is
the PEFT folder's; `--to peft` writes the same tensors, for whatever method there is.  Unlike peft's own script
(`scripts/convert-bone-to-miss.py`, safetensors in a local folder) it takes what every conversion takes: a single file, a
`.bin`, a source on the Hub, saved modules, a file without a config.

Sources: huggingface/peft 0.21.2 `tuners/miss/layer.py`, `scripts/convert-bone-to-miss.py`; 0.18 `tuners/bone/layer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from adapterops_formats.peft import PEFT, Peft

from adapterops.plugin import METHODS, Adapter, Dialect, Output, Reading, Source, Target, TypeRow, errors

_KEY = ".miss_block"
MISS = replace(
    PEFT,
    name="miss",
    format="miss",
    title="MiSS",
    places=tuple(
        replace(place, suffixes=tuple(s for s in place.suffixes if s.method == "saved" or s.text.startswith(_KEY)))
        for place in PEFT.places
        if not place.whole
    ),
    example="base_model.model.model.layers.0.self_attn.q_proj.miss_block",
)


class Miss(Peft):
    """The PEFT folder of MiSS."""

    name = "miss"
    for_lora = "peft"
    title = "MiSS in a PEFT folder; what Bone became"
    dialects = (MISS,)
    rules = ""  # the PEFT format's hold for it
    readers: ClassVar = {}  # servers read LoRA alone
    foreign: ClassVar = {}

    def types(self) -> Sequence[TypeRow]:
        return ()  # the PEFT format's rows hold it

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        return super().recognise(source, dialects) if any(_KEY in key for key in source.tensors) else []

    def write(self, adapter: Adapter, target: Target) -> Output:
        kept, dropped = [], []
        for update in adapter:
            if update.method in ("miss", "saved"):
                kept.append(update)
                continue
            sentence = (
                f"{update.name}: is {METHODS[update.method].title} (tensor {next(iter(update.tensors.values())).key!r}), and "
                "--to miss holds MiSS and Bone alone; --to peft holds every method of PEFT"
            )
            if not target.allow_drop:
                raise errors.CannotRepresent(sentence)
            dropped.append(sentence)
        if not any(update.method == "miss" for update in kept):
            return Output((), (), tuple(dropped))
        out = super().write(adapter.with_updates(kept), target)
        return out._replace(dropped=(*dropped, *out.dropped))


FORMAT = Miss()
