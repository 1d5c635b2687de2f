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
from typing import Any

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Architecture,
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
from adapterops_formats.peft_config import (
    DERIVED,
    LoraConfig,
    describes,
    from_updates,
    with_parents,
)
from adapterops_formats.peft_names import LORA

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


class Peft(Format):
    """The PEFT folder."""

    name = "peft"
    title = "PEFT folder (adapter_config.json, adapter_model.safetensors)"
    dialects = (PEFT,)
    is_folder = True
    variants = {
        _PREFIX: (_PREFIX + _PREFIX, "base_model.", "module." + _PREFIX, "_orig_mod." + _PREFIX, ""),
    }
    foreign = {
        r"\.lora_(a|b)$": f"is MLX's spelling (lora_a, lora_b); {_LATER}",
        r"\.lora_[ABE]$|\.ranknum$": f"is loralib's spelling (lora_A without .weight); {_LATER}",
        r"\.ia3_l|\.multi_lora_[ab]$": f"is (IA)³; {_LATER}",
        r"\.hada_w\d": f"is LoHa in peft's spelling; {_LATER}",
        r"\.lokr_w\d": f"is LoKr in peft's spelling; {_LATER}",
        r"\.lora_E|\.ranknum": f"is AdaLoRA; {_LATER}",
        r"\.lora_diag": f"is KaSA; {_LATER}",
        r"\.lora_monteclora_sampler": f"is MonteCLoRA; {_LATER}",
        r"\.(oft_|boft_|hra_|vera_|randlora_|vblora_|miss_|bone_|c3a_|shira_|road_|hira_|delora_|gralora_|glora_|psoft_)": (
            f"is a method of peft other than LoRA; {_LATER}"
        ),
        r"finegates_": f"is FineGates, a method of a peft fork; {_LATER}",
        r"^prompt_embeddings$|\.prompt_embeddings$": f"is a soft prompt (prompt, prefix or P-tuning); {_LATER}",
        r"^w_[ab]_\d+$": f"is Sam_LoRA's spelling (no module names); {_LATER}",
        r"\.adapter\.linear_(in|out)\.": f"is NeMo's or Megatron's spelling; {_LATER}",
    }

    def recognise(self, source: Source) -> list[Reading]:
        config = source.config
        kind = str(config.get("peft_type", "")).upper() if config is not None else ""
        if config is not None and kind and kind != "LORA":
            raise errors.UnsupportedFormat(
                f"{source.config_path}: peft_type is {kind[:40]}; this version converts LORA only"
            )
        return super().recognise(source)

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        config = _config_of(source, request)
        component = source.component or _component(source.config)

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            return config.rule(module) if config is not None else ScaleRule()

        def settle(groups: list[Group]) -> list[Group]:
            name = component or component_by_names(groups, request.architecture) or "model"
            return [replace(g, place=replace(g.place, component=name)) for g in _one_place(groups)]

        def refine(updates: list[Update]) -> list[Update]:
            indices = config.fields.get("trainable_token_indices") if config is not None else None
            return [_with_indices(u, indices) if u.method == "trainable_tokens" else u for u in updates]

        adapter = read_by_table(reading, source, request, rule, refine, settle)
        if config is None:
            return adapter
        name = adapter.components[0] if adapter.components else "model"
        if source.config is not None:
            describes(config.fields, config.where, list(adapter), _conflict)
        return replace(adapter, config={name: {k: v for k, v in config.fields.items()}})

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
            part = part.with_updates(spelled.kept)
            config, said = write_config(part, component, target)
            notes += said
            kept += spelled.kept
            dropped += spelled.dropped
            own = {k: v for k, v in adapter.config.items() if k == component}
            files.append(OutputFile(folder + WEIGHTS, spelled.tensors, header(replace(part, config=own))))
            files.append(OutputFile(folder + CONFIG, text=json.dumps(config, indent=2, sort_keys=True) + "\n"))
        return Output(tuple(files), tuple(kept), tuple(dropped), tuple(dict.fromkeys(notes)))


def _conflict(sentence: str) -> None:
    raise errors.Conflict(sentence)


def _config_of(source: Source, request: Request) -> LoraConfig | None:
    """The config beside the weights with the user's fields over it; the user's alone; or None."""
    if source.config is not None:
        return LoraConfig.parse({**source.config, **request.fields}, source.config_path)
    if request.fields:
        return replace(LoraConfig.parse(request.fields, "--set"), certainty=Certainty.GIVEN)
    return None


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
    names = set(base.modules) if base is not None else None
    optional = base.optional_prefix if base is not None else ""
    derived = from_updates(updates, names, optional)
    saved, notes = _saved_fields(updates, target.architecture, component)
    derived |= saved
    own = dict(adapter.config.get(component, {}))
    if own and _still_true(own, updates, names):
        # The config's own words hold; only a list of targets that would take in more is made anew.
        config = {**_DEFAULTS, **derived, **own}
        if names is not None and _takes_more(own, updates, names):
            config["target_modules"] = derived["target_modules"]
            notes.append("target_modules is made anew: the one in the config would adapt more modules of the base")
        if own.get("target_modules") is None:
            config["target_modules"] = derived["target_modules"]
    else:
        config = {**_DEFAULTS, **{k: v for k, v in own.items() if k not in DERIVED}, **derived}
        if own:
            notes.append("config fields that contradicted the tensors are derived from them")
    if base is not None and any(u.method == "lora" and _transposed(base, u.module) for u in updates):
        config["fan_in_fan_out"] = True
    config.update({k: v for k, v in target.fields.items() if v is not None or k not in DERIVED})
    describes(config, "the config to be written", updates, _conflict)
    return config, notes


def _transposed(base: Any, module: str) -> bool:
    spec = base.modules.get(module)
    return spec is not None and spec.transposed


def _still_true(config: Mapping[str, Any], updates: list[Update], names: set[str] | None) -> bool:
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


def _saved_fields(
    updates: list[Update], architecture: Architecture | None, component: str
) -> tuple[dict[str, Any], list[str]]:
    """`modules_to_save`, `bias` and `trainable_token_indices`."""
    adapted = {u.module for u in updates if u.method == "lora"}
    whole = [u for u in updates if u.method == "saved" and u.options.get("kind") != "wrapped"]
    biases = [u for u in updates if u.method == "saved" and set(u.tensors) == {"bias"}]
    modules = [u for u in whole if u not in biases]
    base = architecture.components.get(component) if architecture else None
    fields: dict[str, Any] = {}
    notes: list[str] = []
    if biases:
        fields["bias"] = "lora_only" if all(u.module in adapted for u in biases) else "all"
    if modules:
        fields["modules_to_save"] = sorted(u.module for u in modules)
        _no_bystanders(fields["modules_to_save"], base)
    for update in modules:
        spec = base.modules.get(update.module) if base else None
        if spec is not None and spec.tied_to:
            notes.append(f"{update.name} is saved, and the base ties it to {spec.tied_to}: peft unties them")
    tokens = [u for u in updates if u.method == "trainable_tokens"]
    for update in tokens:
        if update.options.get("indices") is None:
            raise errors.UnknownFact(
                f"{update.tensors['delta'].where}: which {update.tensors['delta'].shape[0]} tokens these rows are for "
                "is not among the tensors; say it with --set trainable_token_indices='[…]'"
            )
    if tokens:
        fields["trainable_token_indices"] = {u.module: u.options["indices"] for u in tokens}
    return fields, notes


def _no_bystanders(modules: list[str], base: Any) -> None:
    """Raise `CannotRepresent` where peft's bare-suffix matching of `modules_to_save` takes in another module."""
    if base is None:
        return
    for name in with_parents(base.modules):
        inside = any(name == m or name.startswith(m + ".") or m.startswith(name + ".") for m in modules)
        entry = next((m for m in modules if name.endswith(m)), None)
        if entry is not None and not inside:
            raise errors.CannotRepresent(
                f"{entry} is a saved module, but peft matches modules_to_save by the bare end of a name, so it would "
                f"also take {name}, which the adapter does not save; rename the module in the base, or drop the saved "
                "one with --allow-drop"
            )


FORMAT = Peft()
