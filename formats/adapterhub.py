"""AdapterHub's library `adapters`: a folder of `pytorch_adapter.bin` (or `adapter.safetensors`) and a config of its own.

    model.layers.0.self_attn.q_proj.loras.NAME.lora_A     (r, in_features)
    model.layers.0.self_attn.q_proj.loras.NAME.lora_B     (out_features, r)
    encoder.layer.0.intermediate.dense.loras.NAME.lora_B  (out_features, 1)      (IA)³: no lora_A, and "composition_mode": "scale"

Names are transformers' own.  `adapter_config.json` is another one than PEFT's: its `config` says `r`, `alpha` and
`attn_matrices`, and the scale is alpha / r; files of `adapters` below 1.1 were trained with scale 1 whatever alpha says, which
that library sets right when it loads them, and so does this reader.  Where q, k and v are one module (GPT-2's `c_attn`,
DeBERTa's `in_proj`), the factors are loralib's MergedLinear, for the thirds that `attn_matrices` names.  (IA)³ multiplies a
layer's output, its bias included.

What else that library trains is no change of a module's weights (bottlenecks, Compacter, prefixes, prompts, ReFT), depends on
the input (gates), or is computed as in no other program: its DoRA divides by the norm of the weight and the *unscaled* product
and multiplies the bias too, its VeRA has full square matrices.  A prediction head stands in a file of its own.

Sources: adapter-hub/adapters 1.3 `src/adapters/loading.py` (`filter_func`, `_fix_backward_compat`), `methods/lora.py` (`LoRA`,
`IA3`, `LoRALinear`, `LoRAMergedLinear`, `compute_dora_deltaw`), `configuration/adapter_config.py`, `utils.py` (file names)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from adapterops_formats.torch_native import ReadOnly

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Certainty,
    Dialect,
    Group,
    Place,
    Reading,
    Request,
    ScaleRule,
    Source,
    Suffix,
    component_by_names,
    errors,
    is_number,
    read_by_table,
)

ADAPTERHUB = Dialect(
    name="adapterhub",
    format="adapterhub",
    title="AdapterHub",
    places=(Place("*", "", tuple(Suffix(f".loras{{adapter}}.lora_{role}", "lora", role) for role in "AB"), sure=True),),
    alpha=AlphaIn.CONFIG,
    convention="unknown",
    written=False,
    example="model.layers.0.self_attn.q_proj.loras.task.lora_A",
)
_MERGED = (".c_attn", ".in_proj")
"""Modules that are q, k and v in one, all of the same size."""
_FIXED = (1, 1, 0)
"""The release whose LoRA has the scale that its config says."""
_NO_DELTA = "which is no change of a module's weights, and no other format holds it"


def is_hub_config(config: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is AdapterHub's."""
    inner = config.get("config")
    own = isinstance(inner, (Mapping, str)) or ("config" in config and inner is None)
    return own and "peft_type" not in config and ("model_class" in config or "model_type" in config)


class AdapterHub(ReadOnly):
    """AdapterHub's folder."""

    name = "adapterhub"
    title = "AdapterHub folder (pytorch_adapter.bin, adapter_config.json)"
    limits = (
        "It is read and not written: LoRA and (IA)³ are what PEFT has too.",
        "Bottleneck adapters, Compacter, prefix tuning, prompt tuning and ReFT are refused by name, so are gates, DoRA and VeRA.",
    )
    dialects = (ADAPTERHUB,)
    file_name = "adapter.safetensors"
    why_not_written = "its config names the model's class and sizes, which adapters do not say; --to peft holds it"
    foreign: ClassVar = {
        r"(^|\.)(\w+_)?adapters\.[^.]+\.(adapter_(down|up)|adapter_norm|gate)\b": "is a bottleneck adapter of AdapterHub "
        f"(a small network behind a layer), {_NO_DELTA}",
        r"(^|\.)invertible_adapters\.": f"is an invertible adapter of AdapterHub, {_NO_DELTA}",
        r"(^|\.)prefix_(tunings|gates)\.": "is AdapterHub's prefix tuning, which has vectors for each layer before they are "
        "joined; this version does not convert it",
        r"(^|\.)prompt_tunings\.": "is AdapterHub's prompt tuning; this version does not convert it",
        r"(^|\.)refts\.": f"is AdapterHub's ReFT (an intervention on hidden states), {_NO_DELTA}",
        r"\.loras\.[^.]+\.gate\.": "is a gate of AdapterHub, which weighs the LoRA by each input; no other format holds it",
        r"\.loras\.[^.]+\.m\.weight$": "is AdapterHub's DoRA, which divides by another norm than DoRA elsewhere and multiplies "
        "the bias too; merge it into the base with that library (merge_adapter)",
        r"\.loras\.[^.]+\.vera_[BD]$": "is AdapterHub's VeRA, whose vectors became square matrices; merge it into the base with "
        "that library (merge_adapter)",
        r"\.loras\.[^.]+\.(task_specific|weights)\b": "is AdapterHub's LoRA for several tasks (MTL-LoRA), which no other "
        "format holds",
    }

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        other = source.config is not None and not is_hub_config(source.config)
        if other:
            return []
        # The name stands in every key by rights.
        return [reading._replace(adapter_name="") for reading in super().recognise(source, dialects)]

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        config = _config(source)

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            alpha = _alpha(source, config)
            return ScaleRule(alpha, certainty=Certainty.READ, source=source.config_path)

        def settle(groups: list[Group]) -> list[Group]:
            component = component_by_names(groups, request.architecture) or "model"
            place = replace(ADAPTERHUB.places[0], component=component)
            return [self._settled(entry, config, source, request)._replace(place=place) for entry in groups]

        adapter = read_by_table(reading, source, request, rule, None, settle)
        notes = [*adapter.provenance.notes, *_note(source, config)]
        return replace(adapter, provenance=replace(adapter.provenance, notes=tuple(notes)))

    def _settled(self, entry: Group, config: Mapping[str, Any], source: Source, request: Request) -> Group:
        """The group as what its layer is; told of, where it cannot be."""
        try:
            return _meant(entry, config, source)
        except errors.AdapterOpsError as error:
            request.wrong(error, (tensor.key for tensor in entry.tensors.values()))
            return entry


def _config(source: Source) -> Mapping[str, Any]:
    """What the config says of the method; empty where there is none."""
    inner = source.config.get("config") if source.config is not None else None
    return inner if isinstance(inner, Mapping) else {}


def _alpha(source: Source, config: Mapping[str, Any]) -> float | None:
    """Raises `UnreadableFile` for what is no number."""
    name = "r" if _is_early(source) else "alpha"
    value = config.get(name)
    if value is None:
        return None
    if not is_number(value):
        raise errors.UnreadableFile(
            f"{source.config_path}: {name} is {str(value)[:60]!r}, not a number", fault="config-type"
        )
    return float(value)


def _is_early(source: Source) -> bool:
    """Whether the file is of a release whose LoRA had scale 1."""
    version = source.config.get("version") if source.config is not None else None
    found = re.match(r"adapters\.(\d+)\.(\d+)(?:\.(\d+))?", version) if isinstance(version, str) else None
    return found is not None and tuple(int(part or 0) for part in found.groups()) < _FIXED


def _note(source: Source, config: Mapping[str, Any]) -> list[str]:
    if (
        not _is_early(source)
        or config.get("alpha") in (None, config.get("r"))
        or config.get("composition_mode") == "scale"
    ):
        return []
    return [
        f"the config says alpha {config['alpha']}, and adapters below 1.1 trained with scale 1 whatever it said: alpha is read "
        f"as r ({config['r']}), as that library reads it"
    ]


def _meant(entry: Group, config: Mapping[str, Any], source: Source) -> Group:
    """The group under the method that it is.

    Raises `UnsupportedFormat` for (IA)³ on a part of a module and with a scale, `UnknownFact` where a config is missing.
    """
    a, b = entry.tensors.get("A"), entry.tensors.get("B")
    merged = entry.name.endswith(_MERGED)
    listed = config.get("attn_matrices")
    flags = [part in listed for part in "qkv"] if isinstance(listed, list) else None
    if a is None and b is not None and config.get("composition_mode", "scale") == "scale":
        if config.get("alpha", 1) != 1 or (merged and flags is not None and not all(flags)):
            what = f"alpha {config['alpha']}" if config.get("alpha", 1) != 1 else f"attn_matrices {listed}"
            raise errors.UnsupportedFormat(
                f"{b.where}: is (IA)³ with {what}; only vectors on whole modules with alpha 1 are read"
            )
        return entry._replace(method="ia3", tensors={"vector": b}, options={"initial": 1, "on_input": False})
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        return entry
    if not merged and a.shape[0] == b.shape[1]:
        return entry
    if flags is None:
        raise errors.UnknownFact(
            f"{b.where}: {entry.name} holds q, k and v, and which of them are adapted stands in adapter_config.json "
            "(attn_matrices); put it beside pytorch_adapter.bin and name the folder"
        )
    return entry._replace(method="lora_merged", options={**entry.options, "enable_lora": flags})


FORMAT = AdapterHub()
