"""What LightX2V calls a difference of a block's modulation: the block's own name and `.diff_m`.

    diffusion_model.blocks.0.diff_m    for the parameter `blocks.0.modulation` (1, 6, width) of Wan
    diffusion_model.head.diff_m        for `head.modulation` (1, 2, width)

Its distillations of Wan have such tensors beside their factors.  Comfy adds a difference to a bare
parameter, too, but under the parameter's name and `.diff`.  Sources: ModelTC/LightX2V `lightx2v/utils/lora_loader.py`
(`extract_lora_diffs`); Comfy-Org/ComfyUI `comfy/lora.py` (`model_lora_keys_unet`, "generic lora format for not .weight").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adapterops.plugin import Adapter, Claim, Output, OutputFile, Reading, Suffix

_END, _PARAMETER, _USUAL = ".diff_m", ".modulation", ".modulation.diff"
MODULATION = Suffix(_END, "diff", "weight")
_CHOICE = "ends"
"""The choice of spelling that is recorded: what ends keys in place of what usually does."""


def of_parameters(reading: Reading) -> Reading:
    """The reading with such claims under the name of the parameter itself, as its architecture's table has it."""
    if not any(claim.suffix is MODULATION for claim in reading.claims):
        return reading
    return reading._replace(claims=tuple(map(_of_parameter, reading.claims)))


def _of_parameter(claim: Claim) -> Claim:
    return claim._replace(name=claim.name + _PARAMETER) if claim.suffix is MODULATION else claim


def recorded(adapter: Adapter, reading: Reading) -> Adapter:
    """The adapter with the spelling noted, where its file had it."""
    if not any(claim.suffix is MODULATION for claim in reading.claims):
        return adapter
    told, dialect = adapter.provenance, reading.dialect.name
    spelling = {**told.spelling, _CHOICE: {_USUAL: _END}}
    carried = told.carried._replace(spelling={**told.carried.spelling, dialect: spelling})
    return replace(adapter, provenance=replace(told, spelling=spelling, carried=carried))


def choice(adapter: Adapter, *dialects: str) -> Mapping[str, Any]:
    """The noted spelling of the first of `dialects` that the adapter has been in; empty where it has none."""
    own: Mapping[str, Any] = adapter.provenance.carried.spelling
    found: Mapping[str, Any] = next((own[name] for name in dialects if name in own), {})
    return {_CHOICE: found[_CHOICE]} if _CHOICE in found else {}


def of_blocks(out: Output, spelling: Mapping[str, Any]) -> Output:
    """The output with keys as LightX2V has them, where its source was so, and a note on who reads them."""
    if spelling.get(_CHOICE) != {_USUAL: _END} or not any(k.endswith(_USUAL) for f in out.files for k in f.tensors):
        return out
    note = f"what ends in {_END} LightX2V reads, and Comfy passes over (`lora key not loaded`); it reads {_USUAL}"
    return out._replace(files=tuple(map(_of_blocks, out.files)), notes=(*out.notes, note))


def _of_blocks(file: OutputFile) -> OutputFile:
    own = {key: key.removesuffix(_USUAL) for key in file.tensors}
    return file._replace(tensors={key if name == key else name + _END: file.tensors[key] for key, name in own.items()})
