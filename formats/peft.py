"""PEFT folders: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), one folder a component.

Keys are `base_model.model.` + the module's own name + the method's suffix; saved modules keep their plain names.
Alpha, the scale rule and the targets stand in the config, not among the tensors.  Source: huggingface/peft 0.21.2
`utils/save_and_load.py`, `tuners/lora/model.py`, `utils/other.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from adapterops_formats.peft_config import PeftConfig, check_given, describes, method_of, number
from adapterops_formats.peft_conv import as_peft, refuse_1d
from adapterops_formats.peft_ia3 import on_input, refuse_other_start
from adapterops_formats.peft_methods import BY_METHOD, CONVERTED, KINDS, LORA, PeftMethod
from adapterops_formats.peft_names import IA3, LOHA, LOKR
from adapterops_formats.peft_names import LORA as LORA_NAMES
from adapterops_formats.peft_patterns import Base
from adapterops_formats.peft_write import conflict, write_config

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Carried,
    Certainty,
    Dialect,
    Format,
    Group,
    Output,
    OutputFile,
    Place,
    Reading,
    Request,
    ScaleRule,
    Source,
    Suffix,
    Target,
    Update,
    component_by_names,
    errors,
    header,
    read_by_table,
)

_PREFIX = "base_model.model."
_SUFFIXES = (
    *LORA_NAMES,
    *LOHA,
    *LOKR,
    *IA3,
    Suffix(".token_adapter.trainable_tokens_delta{adapter}", "trainable_tokens", "delta"),
    # A parameter of the wrapped layer itself: a resized embedding, a trained bias.
    Suffix(".base_layer.weight", "saved", "weight", {"kind": "wrapped"}),
    Suffix(".base_layer.bias", "saved", "bias", {"kind": "wrapped"}),
)
PEFT = Dialect(
    name="peft",
    format="peft",
    title="PEFT",
    places=(Place("*", _PREFIX, _SUFFIXES, saved=True),),
    alpha=AlphaIn.CONFIG,
    convention="unknown",
    vectors=True,
    exact_shapes=True,
    widens=True,
    example="base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
)
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_CLASS_COMPONENTS = (
    (r"^UNet\w*Model$", "unet"),
    (r"Transformer\w*Model$", "transformer"),
    (r"^CLIPTextModelWithProjection$", "text_encoder_2"),
    (r"^CLIPTextModel$", "text_encoder"),
)
"""The class that a config's `auto_mapping` names, and the pipeline component it is."""

_LATER = "this version does not convert it"
_OTHERS = "oft|boft|hra|vera|randlora|vblora|miss|bone|c3a|shira|road|hira|delora|gralora|glora|psoft"


class Peft(Format):
    """The PEFT folder."""

    name = "peft"
    title = "PEFT folder (adapter_config.json, adapter_model.safetensors)"
    dialects = (PEFT,)
    is_folder = True
    tells_init = True
    variants: ClassVar = {
        _PREFIX: (_PREFIX + _PREFIX, "base_model.", "module." + _PREFIX, "_orig_mod." + _PREFIX, ""),
    }
    foreign: ClassVar = {
        r"\.lora_(a|b)$": f"is MLX's spelling (lora_a, lora_b); {_LATER}",
        r"\.lora_[ABE]$|\.ranknum$": f"is loralib's spelling (lora_A without .weight); {_LATER}",
        r"\.multi_lora_[ab]$": f"is (IA)³ as T-Few spells it; {_LATER}",
        r"\.lora_E|\.ranknum": f"is AdaLoRA; {_LATER}",
        r"\.lora_diag": f"is KaSA; {_LATER}",
        r"\.lora_monteclora_sampler": f"is MonteCLoRA; {_LATER}",
        rf"\.({_OTHERS})_": f"is a method of peft other than LoRA, LoHa, LoKr and (IA)³; {_LATER}",
        r"finegates_": f"is FineGates, a method of a peft fork; {_LATER}",
        r"^prompt_embeddings$|\.prompt_embeddings$": f"is a soft prompt (prompt, prefix or P-tuning); {_LATER}",
        r"^w_[ab]_\d+$": f"is Sam_LoRA's spelling (no module names); {_LATER}",
        r"\.adapter\.linear_(in|out)\.": f"is NeMo's or Megatron's spelling; {_LATER}",
    }

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        config = source.config
        kind = str(config.get("peft_type") or "").upper() if config is not None else ""
        if config is not None and kind and kind not in KINDS:
            raise errors.UnsupportedFormat(
                f"{source.config_path}: peft_type is {kind[:40]}; this version converts {CONVERTED} only"
            )
        readings = [_unwrapped(reading) for reading in super().recognise(source, dialects)]
        if config is None:
            # Without a prefix and a config nothing tells a saved module's key from any other writer's.
            bare = [r for r in readings if r.prefix == "" and any(c.suffix.method == "saved" for c in r.claims)]
            readings = [r for r in readings if r not in bare]
        return readings

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        method = _method(reading)
        check_given(request.fields, method)
        config = _config_of(source, request, method)
        carried = Carried.parse(source.metadata).spelling.get(PEFT.name, {})
        component = source.component or _component(source.config) or carried.get("component", "")

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            return config.rule(module) if config is not None else ScaleRule()

        def settle(groups: list[Group]) -> list[Group]:
            for entry in groups:
                _insist_on_kind(entry, config)
                entry.options.update(_options(entry, config, request))
            name = component or component_by_names(groups, request.architecture) or "model"
            return [replace(g, place=replace(g.place, component=name)) for g in _one_place(groups)]

        def refine(updates: list[Update]) -> list[Update]:
            indices = config.fields.get("trainable_token_indices") if config is not None else None
            updates = [_with_indices(u, indices) if u.method == "trainable_tokens" else u for u in updates]
            return [_say_why_unknown(u, source, method) for u in updates]

        adapter = read_by_table(reading, source, request, rule, refine, settle)
        if config is None:
            return adapter
        name = adapter.components[0] if adapter.components else "model"
        if source.config is not None:
            describes(config.fields, config.where, adapter.as_stated(), conflict, config.method)
        notes = list(adapter.provenance.notes)
        if config.mutated_init:
            notes.append(
                f"was trained from {config.mutated_init}, which changed the base weights: it is right on that changed base only"
            )
        provenance = replace(adapter.provenance, notes=tuple(notes))
        own = {name: dict(config.fields)}
        return replace(adapter, config=own, provenance=provenance, mutated_init=config.mutated_init)

    def write(self, adapter: Adapter, target: Target) -> Output:
        adapter, dropped = _in_shape(adapter, target)
        components = adapter.components
        files: list[OutputFile] = []
        kept: list[Update] = []
        notes: list[str] = []
        for component in components:
            part = adapter.with_updates(adapter.of(component))
            folder = f"{component}/" if len(components) > 1 else ""
            method_of(part.of(component))  # raises for two: a file with both needs no look at its keys
            spelled = self.spell(part, target)
            dropped += spelled.dropped
            if not any(u.method != "saved" for u in spelled.kept):
                dropped += [f"{u.name}: nothing but saved parameters was left beside it" for u in spelled.kept]
                continue
            notes += spelled.notes
            part = spelled.adapter
            config, said = write_config(part, component, target)
            notes += said
            notes += _lost_prefix(part, component, target)
            kept += spelled.kept
            files.append(OutputFile(folder + WEIGHTS, spelled.tensors, _header(part, component)))
            files.append(OutputFile(folder + CONFIG, text=json.dumps(config, indent=2, sort_keys=True) + "\n"))
        return Output(tuple(files), tuple(kept), tuple(dropped), tuple(dict.fromkeys(notes)))


def _in_shape(adapter: Adapter, target: Target) -> tuple[Adapter, list[str]]:
    """The adapter with its tensors as peft's layers have them, and what was left out under `--allow-drop`."""
    parts = target.architecture.components if target.architecture else {}
    bases = {component: Base.of(parts.get(component)) for component in adapter.components}
    updates: list[Update] = []
    dropped: list[str] = []
    for update in adapter:
        try:
            refuse_other_start(update)
            updates.append(as_peft(update, bases[update.component]))
        except errors.CannotRepresent as error:
            if not target.allow_drop:
                raise
            dropped.append(str(error))
    return adapter.with_updates(updates), dropped


def _header(part: Adapter, component: str) -> dict[str, str]:
    """The header of one component's weights; it names the component, which neither keys nor config do."""
    carried = part.provenance.carried
    spelling = {**carried.spelling, PEFT.name: {**carried.spelling.get(PEFT.name, {}), "component": component}}
    if component == "model":
        spelling = dict(carried.spelling)
    own = {k: v for k, v in part.config.items() if k == component}
    provenance = replace(part.provenance, carried=replace(carried, spelling=spelling))
    return header(replace(part, config=own, provenance=provenance))


def _lost_prefix(part: Adapter, component: str, target: Target) -> list[str]:
    """A warning where one version of the base's class has lost the beginning of its modules' names."""
    base = target.architecture.components.get(component) if target.architecture else None
    if base is None or not base.optional_prefix or not any(u.module.startswith(base.optional_prefix) for u in part):
        return []
    return [
        f"{component}: its modules are named as in the published checkpoints ({base.optional_prefix}…), which peft "
        f"finds in transformers 4; the {base.class_name.rpartition('.')[2]} of transformers 5 has lost that beginning: "
        f"for it, convert the {component} folder once more with --base CONFIG of the text encoder"
    ]


def _unwrapped(reading: Reading) -> Reading:
    """The reading with saved modules under their own names.

    In a state dict that was saved by hand, peft's wrapper is still there: it keeps the trained module as
    `modules_to_save.NAME` and the base's as `original_module`, which is no part of the adapter.
    """
    claims, unclaimed = [], list(reading.unclaimed)
    for claim in reading.claims:
        parts = claim.name.split(".") if claim.suffix.method == "saved" else []
        if "original_module" in parts:
            unclaimed.append(claim.key)
            continue
        if "modules_to_save" in parts[1:]:
            at = parts.index("modules_to_save", 1)
            named = parts[at + 1 : at + 2] in (["default"], [reading.adapter_name])
            claim = claim._replace(name=".".join(parts[:at] + parts[at + 1 + named :]))
        claims.append(claim)
    return replace(reading, claims=tuple(claims), unclaimed=tuple(unclaimed))


def _method(reading: Reading) -> PeftMethod:
    """The method whose tensors the file has; LoRA's where it has several (each is checked against its config)."""
    found = dict.fromkeys(c.suffix.method for c in reading.claims if c.suffix.method in BY_METHOD)
    return BY_METHOD[next(iter(found))] if len(found) == 1 else LORA


def _insist_on_kind(entry: Group, config: PeftConfig | None) -> None:
    """Raise `Conflict` where the config is for another method than the tensors are of."""
    if config is None or entry.method not in BY_METHOD or entry.method == config.method.method:
        return
    method = BY_METHOD[entry.method]
    raise errors.Conflict(
        f"{next(iter(entry.tensors.values())).where}: is a tensor of {method.title}, but {config.where} says peft_type "
        f"{config.method.kind}; if the config is another adapter's, take it away; --set peft_type={method.kind} overrides it"
    )


def _options(entry: Group, config: PeftConfig | None, request: Request) -> dict[str, Any]:
    """What a config, or the user, says of an update that its keys do not."""
    if entry.method == "lokr":
        return _lokr_rank(entry, config, request)
    if entry.method == "ia3" and "vector" in entry.tensors:
        stated = config.fields.get("feedforward_modules") if config is not None else None
        parts = request.architecture.components.values() if request.architecture else ()
        specs = [spec for part in parts if (spec := part.spec(entry.name)) is not None]
        weight = specs[0].shape if specs else ()
        return {"on_input": on_input(entry.tensors["vector"], entry.name, stated, weight)}
    return {}


def _lokr_rank(entry: Group, config: PeftConfig | None, request: Request) -> dict[str, Any]:
    """r of a LoKr with two whole factors, where its scale is not 1: peft applies alpha / r there too."""
    refuse_1d(entry.tensors, entry.name)
    if not {"w1", "w2"} <= entry.tensors.keys():
        return {}
    alpha = config.rule(entry.name).alpha if config is not None else None
    if alpha is None and isinstance(request.alpha, float):
        alpha = request.alpha
    if config is None or (config.certainty is Certainty.GIVEN and "r" not in config.fields):
        if alpha is None:
            return {}
        raise errors.UnknownFact(
            f"{entry.tensors['w1'].where}: peft scales by alpha / r, and with two whole factors ({entry.name}) r stands in "
            "the config only, which is not here; say it beside alpha with --set r=R"
        )
    rank = config.rank(entry.name)
    return {} if alpha == rank else {"rank": rank}


def _config_of(source: Source, request: Request, method: PeftMethod) -> PeftConfig | None:
    """The config beside the weights with the user's fields over it; the user's alone; or None."""
    if source.config is not None:
        return PeftConfig.parse({**source.config, **request.fields}, source.config_path, method)
    if request.fields:
        # `--alpha` is the alpha beside which an `alpha_pattern` is given.
        given = request.alpha
        alpha = {method.alpha: number(given)} if method.alpha and isinstance(given, float) else {}
        return replace(PeftConfig.parse({**alpha, **request.fields}, "--set", method), certainty=Certainty.GIVEN)
    return None


def _say_why_unknown(update: Update, source: Source, method: PeftMethod) -> Update:
    """The update; where its alpha is unknown, with the reason that holds for PEFT."""
    if update.alpha is None or update.alpha.value is not None:
        return update
    where = (
        f"{source.config_path} says no {method.alpha}" if source.config is not None else f"no {CONFIG} is beside them"
    )
    reason = f"PEFT stores no alpha among the tensors, and {where}"
    return replace(update, alpha=replace(update.alpha, source=reason))


def _component(config: Mapping[str, Any] | None) -> str:
    mapping = (config or {}).get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    if not isinstance(name, str):
        return ""
    return next((component for pattern, component in _CLASS_COMPONENTS if re.search(pattern, name)), "")


def _one_place(groups: list[Group]) -> list[Group]:
    """The groups under one place object, so that equal places compare equal."""
    shared = groups[0].place if groups else None
    return [replace(g, place=shared) for g in groups] if shared is not None else []


def _with_indices(update: Update, stated: Any) -> Update:
    """The update with the token indices that the config gives for its embedding."""
    indices = stated
    if isinstance(stated, Mapping):
        name = next((k for k in stated if update.module == k or update.module.endswith("." + k)), None)
        indices = stated[name] if name is not None else None
    if indices is None:
        return update
    if not isinstance(indices, Sequence) or not all(type(i) is int and i >= 0 for i in indices):
        raise errors.UnreadableFile(f"{update.name}: trainable_token_indices must be a list of token numbers")
    return replace(update, options={**update.options, "indices": list(indices)})


FORMAT = Peft()
