"""PEFT folders: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), one folder a component.

Keys are `base_model.model.` + the module's own name + the method's suffix; saved modules keep their plain names.
Alpha, the scale rule and the targets stand in the config, not among the tensors.  Source: huggingface/peft 0.21.2
`utils/save_and_load.py`, `tuners/lora/model.py`, `utils/other.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from adapterops_formats.peft_config import (
    DERIVED,
    NARROWING,
    REFUSED,
    LoraConfig,
    check_given,
    describes,
    from_updates,
    shuts_out,
    with_parents,
)
from adapterops_formats.peft_names import LORA

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
    *LORA,
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

_DEFAULTS: Mapping[str, Any] = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
}
"""What a config that is written anew says where nothing is known: fields that every peft since 0.3 has."""

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
        r"\.ia3_l|\.multi_lora_[ab]$": f"is (IA)³; {_LATER}",
        r"\.hada_w\d": f"is LoHa in peft's spelling; {_LATER}",
        r"\.lokr_w\d": f"is LoKr in peft's spelling; {_LATER}",
        r"\.lora_E|\.ranknum": f"is AdaLoRA; {_LATER}",
        r"\.lora_diag": f"is KaSA; {_LATER}",
        r"\.lora_monteclora_sampler": f"is MonteCLoRA; {_LATER}",
        rf"\.({_OTHERS})_": f"is a method of peft other than LoRA; {_LATER}",
        r"finegates_": f"is FineGates, a method of a peft fork; {_LATER}",
        r"^prompt_embeddings$|\.prompt_embeddings$": f"is a soft prompt (prompt, prefix or P-tuning); {_LATER}",
        r"^w_[ab]_\d+$": f"is Sam_LoRA's spelling (no module names); {_LATER}",
        r"\.adapter\.linear_(in|out)\.": f"is NeMo's or Megatron's spelling; {_LATER}",
    }

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        config = source.config
        kind = str(config.get("peft_type", "")).upper() if config is not None else ""
        if config is not None and kind and kind != "LORA":
            raise errors.UnsupportedFormat(
                f"{source.config_path}: peft_type is {kind[:40]}; this version converts LORA only"
            )
        readings = [_unwrapped(reading) for reading in super().recognise(source, dialects)]
        if config is None:
            # Without a prefix and a config nothing tells a saved module's key from any other writer's.
            bare = [r for r in readings if r.prefix == "" and any(c.suffix.method == "saved" for c in r.claims)]
            readings = [r for r in readings if r not in bare]
        return readings

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        check_given(request.fields)
        config = _config_of(source, request)
        carried = Carried.parse(source.metadata).spelling.get(PEFT.name, {})
        component = source.component or _component(source.config) or carried.get("component", "")

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            return config.rule(module) if config is not None else ScaleRule()

        def settle(groups: list[Group]) -> list[Group]:
            name = component or component_by_names(groups, request.architecture) or "model"
            return [replace(g, place=replace(g.place, component=name)) for g in _one_place(groups)]

        def refine(updates: list[Update]) -> list[Update]:
            indices = config.fields.get("trainable_token_indices") if config is not None else None
            updates = [_with_indices(u, indices) if u.method == "trainable_tokens" else u for u in updates]
            return [_say_why_unknown(u, source) for u in updates]

        adapter = read_by_table(reading, source, request, rule, refine, settle)
        if config is None:
            return adapter
        name = adapter.components[0] if adapter.components else "model"
        if source.config is not None:
            describes(config.fields, config.where, adapter.as_stated(), _conflict)
        notes = list(adapter.provenance.notes)
        if config.mutated_init:
            notes.append(
                f"was trained from {config.mutated_init}, which changed the base weights: it is right on that changed base only"
            )
        provenance = replace(adapter.provenance, notes=tuple(notes))
        own = {name: dict(config.fields)}
        return replace(adapter, config=own, provenance=provenance, mutated_init=config.mutated_init)

    def write(self, adapter: Adapter, target: Target) -> Output:
        components = adapter.components
        files: list[OutputFile] = []
        kept: list[Update] = []
        dropped: list[str] = []
        notes: list[str] = []
        for component in components:
            part = adapter.with_updates(adapter.of(component))
            folder = f"{component}/" if len(components) > 1 else ""
            spelled = self.spell(part, target)
            dropped += spelled.dropped
            if not any(u.method != "saved" for u in spelled.kept):
                dropped += [f"{u.name}: nothing but saved parameters was left beside it" for u in spelled.kept]
                continue
            part = part.with_updates(spelled.kept)
            config, said = write_config(part, component, target)
            notes += said
            notes += _lost_prefix(part, component, target)
            kept += spelled.kept
            files.append(OutputFile(folder + WEIGHTS, spelled.tensors, _header(part, component)))
            files.append(OutputFile(folder + CONFIG, text=json.dumps(config, indent=2, sort_keys=True) + "\n"))
        return Output(tuple(files), tuple(kept), tuple(dropped), tuple(dict.fromkeys(notes)))


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


def _conflict(sentence: str) -> None:
    raise errors.Conflict(sentence)


def _config_of(source: Source, request: Request) -> LoraConfig | None:
    """The config beside the weights with the user's fields over it; the user's alone; or None."""
    if source.config is not None:
        return LoraConfig.parse({**source.config, **request.fields}, source.config_path)
    if request.fields:
        # `--alpha` is the `lora_alpha` beside which an `alpha_pattern` is given.
        alpha = {"lora_alpha": request.alpha} if isinstance(request.alpha, float) else {}
        return replace(LoraConfig.parse({**alpha, **request.fields}, "--set"), certainty=Certainty.GIVEN)
    return None


def _say_why_unknown(update: Update, source: Source) -> Update:
    """The update; where its alpha is unknown, with the reason that holds for PEFT."""
    if update.alpha is None or update.alpha.value is not None:
        return update
    where = f"{source.config_path} says no lora_alpha" if source.config is not None else f"no {CONFIG} is beside them"
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


def write_config(adapter: Adapter, component: str, target: Target) -> tuple[dict[str, Any], list[str]]:
    """The `adapter_config.json` for the updates of one component, and notes.

    A config that came with the adapter keeps every field that the tensors do not contradict; what no source holds
    is derived from them.

    Raises `UnknownFact` for what neither holds, `CannotRepresent` where peft's matching by name would take in a
    module that the adapter does not have.
    """
    updates = list(adapter)
    base = target.architecture.components.get(component) if target.architecture else None
    check_given(target.fields)
    names = set(base.modules) | base.bare if base is not None else None
    optional = base.optional_prefix if base is not None else ""
    derived = from_updates(updates, names, optional)
    saved, notes = _saved_fields(updates, base)
    derived |= saved
    own = dict(adapter.config.get(component, {}))
    if own and _still_true(own, updates):
        # The config's own words hold, but for lists of names that would take in more, or that say nothing.
        config = {**_DEFAULTS, **derived, **own}
        more = names is not None and _takes_more(own, updates, names)
        if more or own.get("target_modules") is None:
            config |= {"target_modules": derived["target_modules"], **dict.fromkeys(NARROWING)}
        if more:
            notes.append("target_modules is made anew: the one in the config would adapt more modules of the base")
        if base is not None and _bystander(own.get("modules_to_save") or (), _saved_modules(updates), base.modules):
            config["modules_to_save"] = derived.get("modules_to_save")
            notes.append("modules_to_save is made anew: the one in the config names modules that the file lacks")
    else:
        kept = {k: v for k, v in own.items() if k not in (*DERIVED, *NARROWING, *REFUSED, "peft_type")}
        config = {**_DEFAULTS, **kept, **derived}
        if own:
            notes.append("config fields that do not fit the tensors or the names of their modules are derived anew")
    if base is not None and any(u.method == "lora" and _transposed(base, u.module) for u in updates):
        config["fan_in_fan_out"] = True
    config.update({k: v for k, v in target.fields.items() if not _answered(k, v, config)})
    _agrees(config, updates, names, target.fields)
    absent = [m for m in config.get("modules_to_save") or () if not _is_saved(m, updates)]
    if absent:
        notes.append(
            f"modules_to_save lists {', '.join(dict.fromkeys(absent))}, of which the file holds nothing: peft cannot load "
            "it into a base that has such a module"
        )
    return config, notes


def _agrees(config: Mapping[str, Any], updates: list[Update], names: set[str] | None, given: Mapping[str, Any]) -> None:
    """Raise `Conflict` where the finished config, the user's fields in it, does not say what the tensors are."""
    where = f"the config to be written (--set {', '.join(given)})" if given else "the config to be written"
    describes(config, where, updates, _conflict)
    view = LoraConfig.parse(config, where)
    for update in (u for u in updates if u.method == "lora"):
        rule = view.rule(update.module)
        if update.alpha is not None and (rule.alpha != update.alpha.value or rule.rslora != update.rslora):
            raise errors.Conflict(
                f"{update.tensors['A'].where}: {where} says lora_alpha {rule.alpha}, use_rslora {rule.rslora} for "
                f"{update.name}, but the adapter has {update.alpha}, use_rslora {update.rslora}"
            )
    if names is not None and "target_modules" in given and _takes_more(config, updates, names):
        raise errors.Conflict(f"{where}: its target_modules would adapt modules of the base that the file lacks")
    absent = [m for m in given.get("modules_to_save") or () if not _is_saved(m, updates)]
    if absent:
        raise errors.Conflict(f"{where}: modules_to_save names {absent[0]}, of which the file holds no tensor")


def _is_saved(entry: str, updates: list[Update]) -> bool:
    """Whether a saved module of the file is one that peft would find by an entry of `modules_to_save`."""
    return any(path.endswith(entry) for u in updates if u.method == "saved" for path in with_parents([u.module]))


def _answered(name: str, value: Any, config: Mapping[str, Any]) -> bool:
    """Whether a field that the user gave only asked for what stands in the config now, or says the same in short."""
    if name in DERIVED and value is None:
        return True
    return name == "trainable_token_indices" and list((config.get(name) or {}).values()) == [value]


def _transposed(base: Any, module: str) -> bool:
    spec = base.modules.get(module)
    return spec is not None and spec.transposed


def _still_true(config: Mapping[str, Any], updates: list[Update]) -> bool:
    """Whether a config that came along says of these updates what they are."""
    problems: list[str] = []
    try:
        describes(config, "config", updates, problems.append)
        view = LoraConfig.parse(config, "config")
    except errors.AdapterOpsError:
        return False
    if problems or not view.states_alpha:
        return False
    for update in updates:
        if update.method != "lora":
            continue
        rule = view.rule(update.module)
        if update.alpha is None or rule.alpha != update.alpha.value or rule.rslora != update.rslora:
            return False
    return True


def _takes_more(config: Mapping[str, Any], updates: list[Update], names: set[str]) -> bool:
    view = LoraConfig.parse(config, "config")
    if not isinstance(config.get("target_modules"), (str, list)):
        return False
    adapted = {u.module for u in updates if u.method == "lora"}
    return any(view.targets(name) for name in with_parents(names) - adapted)


def _saved_modules(updates: list[Update]) -> set[str]:
    """The modules that are saved whole, by their own names or those of modules inside them."""
    whole = [u for u in updates if u.method == "saved" and u.options.get("kind") != "wrapped"]
    return {u.module for u in whole if set(u.tensors) != {"bias"}}


def _saved_fields(updates: list[Update], base: Any) -> tuple[dict[str, Any], list[str]]:
    """`modules_to_save`, `bias` and `trainable_token_indices`, and notes."""
    adapted = {u.module for u in updates if u.method == "lora"}
    biases = [u for u in updates if u.method == "saved" and set(u.tensors) == {"bias"}]
    saved = _saved_modules(updates)
    fields: dict[str, Any] = {}
    notes: list[str] = []
    if biases:
        fields["bias"] = "lora_only" if all(u.module in adapted for u in biases) else "all"
    if saved:
        # peft would look for a wrapper inside a wrapper, so only the outermost are named.
        fields["modules_to_save"] = sorted(m for m in saved if with_parents([m]).isdisjoint(saved - {m}))
    tokens = {u.module: _indices(u) for u in updates if u.method == "trainable_tokens"}
    if tokens:
        fields["trainable_token_indices"] = tokens
    walk = with_parents(adapted | (set(base.modules) if base is not None else set()))
    for field, inside in (("modules_to_save", saved), ("trainable_token_indices", set(tokens))):
        clash = _bystander(fields.get(field, ()), inside, walk)
        if clash is not None:
            raise errors.CannotRepresent(
                f"{clash[0]} is saved, but peft matches {field} by the bare end of a name, so it would also take "
                f"{clash[1]}, of which the adapter saves nothing; rename the module in the base, or take the saved one "
                "out of the file"
            )
    shut = next((m for m in sorted(adapted) if shuts_out(fields.get("modules_to_save", ()), m)), None)
    if shut is not None:
        raise errors.CannotRepresent(
            f"{shut} is adapted, but its name holds that of a saved module ({', '.join(fields['modules_to_save'])}), "
            "and peft adapts nothing under such a name; rename one of them in the base, or take the saved one out of "
            "the file"
        )
    for name in sorted(saved):
        spec = base.modules.get(name) if base is not None else None
        if spec is not None and spec.tied_to:
            notes.append(f"{name} is saved, and the base ties it to {spec.tied_to}: peft unties them")
    return fields, notes


def _indices(update: Update) -> list[int]:
    delta, indices = update.tensors["delta"], update.options.get("indices")
    if indices is None:
        raise errors.UnknownFact(
            f"{delta.where}: which {delta.shape[0]} tokens these rows are for is not among the tensors; say it with "
            "--set trainable_token_indices='[…]'"
        )
    return list(indices)


def _bystander(entries: Iterable[str], inside: set[str], walk: Iterable[str]) -> tuple[str, str] | None:
    """An entry that peft matches by the bare end of a name, and a module outside `inside` that it takes too."""
    mine = with_parents(inside)
    for name in sorted(walk):
        entry = next((e for e in entries if name.endswith(e)), None)
        if entry is not None and name not in mine and with_parents([name]).isdisjoint(inside):
            return entry, name
    return None


FORMAT = Peft()
