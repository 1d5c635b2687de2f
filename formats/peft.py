"""PEFT folders: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), one folder a component.

Keys are `base_model.model.` + the module's own name + the method's suffix; saved modules keep their plain names.
Alpha, the scale rule and the targets stand in the config, not among the tensors.  What a model of diffusers saves of itself
(`save_lora_adapter`) is peft's too: bare names, and the config in the header (`lora_adapter_metadata`).  Source: huggingface/peft
0.21.2 `utils/save_and_load.py`, `tuners/lora/model.py`, `utils/other.py`; huggingface/diffusers `loaders/peft.py`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from adapterops_formats.adapterhub import is_hub_config
from adapterops_formats.lycoris_names import is_in_pefts_folder
from adapterops_formats.pairs import is_handmade
from adapterops_formats.peft_config import (
    PeftConfig,
    check_given,
    describes,
    in_short,
    kind_named,
    method_of,
    number,
    refuse_unknown,
    rescaled,
)
from adapterops_formats.peft_conv import as_peft
from adapterops_formats.peft_groups import arranged, chosen
from adapterops_formats.peft_header import with_own_config
from adapterops_formats.peft_ia3 import refuse_other_start
from adapterops_formats.peft_kinds import KIND_OF, KINDS
from adapterops_formats.peft_kinds.lora import LORA
from adapterops_formats.peft_kinds.row import PeftMethod, same_tensor
from adapterops_formats.peft_lora import loralib_names
from adapterops_formats.peft_names import MODULES, ONCE, TOP
from adapterops_formats.peft_parameters import METHOD as PARAMETERS
from adapterops_formats.peft_parameters import key_name
from adapterops_formats.peft_patterns import Base
from adapterops_formats.peft_serving import READERS, fitted, listed_targets
from adapterops_formats.peft_trainers import as_published, without_wrappers, wrapped_note
from adapterops_formats.peft_whole import insist_on_consent, left_out, of_whole_model
from adapterops_formats.peft_write import write_config

from adapterops.plugin import (
    METHODS,
    Adapter,
    AlphaIn,
    Carried,
    Certainty,
    Dialect,
    Fitted,
    Format,
    Group,
    Output,
    OutputFile,
    Place,
    Reading,
    Request,
    Rounding,
    ScaleRule,
    Source,
    Suffix,
    Target,
    TypeRow,
    Update,
    component_by_names,
    errors,
    header,
    maths,
    read_by_table,
)

_PREFIX = "base_model.model."
_SUFFIXES = (
    *MODULES,
    Suffix(".token_adapter.trainable_tokens_delta{adapter}", "trainable_tokens", "delta"),
    # A parameter of the wrapped layer itself: a resized embedding, a trained bias.
    Suffix(".base_layer.weight", "saved", "weight", {"kind": "wrapped"}),
    Suffix(".base_layer.bias", "saved", "bias", {"kind": "wrapped"}),
)
PEFT = Dialect(
    name="peft",
    format="peft",
    title="PEFT",
    places=(
        Place("*", _PREFIX, _SUFFIXES, saved=True),
        Place("*", "base_model.", ONCE, free=True, whole=True),
        Place("*", "", TOP, free=True, whole=True),
    ),
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

_HEAD = re.compile(r"(?:.*\.)?lm_head")
_LATER = "this version does not convert it"
# huggingface/peft v0.17.1 `utils/save_and_load.py` (`get_peft_model_state_dict`): takes ".lora" out wherever it stands in a key.
_CALLED_LORA = (
    "was saved by an earlier peft of an adapter that was called lora, a word that it took out of every key: "
    r"--rename '(?<!\.lora)(_(embedding_)?[AB]|_magnitude_vector)(?=\.|$)=.lora\1' puts it back"
)


class Peft(Format):
    """The PEFT folder."""

    name = "peft"
    title = "PEFT folder (adapter_config.json, adapter_model.safetensors)"
    limits = (
        "A DoRA magnitude per input: peft normalises per output.",
        "Two methods, or two scale rules (alpha / r and alpha / √r), in one component.",
        "DoRA, biases of the factors or aLoRA on some modules only: a config says them for all.",
        "A module to save whose name ends as one that is not to be saved: peft matches endings.",
    )
    dialects = (PEFT,)
    is_folder = True
    tells_init = True
    takes_fields = True
    readers = READERS
    rules = "adapterops_formats.peft_rules"
    variants: ClassVar = {
        _PREFIX: (_PREFIX + _PREFIX, "base_model.", "module." + _PREFIX, "_orig_mod." + _PREFIX, ""),
    }
    foreign: ClassVar = {
        r"finegates_": f"is FineGates, a method of a peft fork; {_LATER}",
        r"^base_model\.model\..*(?<!\.lora)_(embedding_)?[AB](\.weight|\.bias)?$": _CALLED_LORA,
    }

    def types(self) -> Sequence[TypeRow]:
        from adapterops_formats.peft_table import rows

        return rows()

    def completed(self, adapter: Adapter) -> Adapter:
        parts = [adapter.of(component) for component in adapter.components]
        return adapter.with_updates(u for part in parts for u in method_of(part).complete(part))

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        beside = source.config is not None
        source = with_own_config(source)
        config = source.config
        if config is not None and (is_hub_config(config) or is_in_pefts_folder(source)):
            return []
        found = [without_wrappers(reading) for reading in super().recognise(source, dialects)]
        readings = [loralib_names(_unwrapped(reading)) for reading in found]
        kind = config.get("peft_type") if config is not None else None
        # Of a header's config alone only a file with PEFT's names is.
        if kind and (beside or readings) and not any(_shown_kinds(r) and not r.unclaimed for r in readings):
            # Of tensors that PEFT knows, what the user says may still make a type of PEFT.
            kind_named(kind, source.config_path, _only_kind(readings))
        if config is None:
            # Without a prefix and a config nothing tells a saved module's key from any other writer's, and factors that stand
            # the other way round are somebody's own.
            readings = list(map(of_whole_model, readings))
            bare = [r for r in readings if r.prefix == ""]
            others = [r for r in bare if any(c.suffix.method == "saved" for c in r.claims) or is_handmade(r, source)]
            readings = [r for r in readings if r not in others]
        return readings

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        source = with_own_config(source)
        method = _method(reading, request.fields)
        ignored: list[str] = []
        config = _config_of(source, request, method, reading, ignored)
        # Where the config says every alpha, `--alpha` speaks in a repair of those that a wrong rank makes doubtful.
        resized = request.repair and source.config is not None and config is not None and config.states_alpha
        asked = replace(request, alpha=None) if resized and isinstance(request.alpha, float) else request
        carried = Carried.parse(source.metadata).spelling.get(PEFT.name, {})
        component = source.component or _component(source.config) or carried.get("component", "")

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            return config.rule(module) if config is not None else ScaleRule()

        said: list[str] = []

        def settle(groups: list[Group]) -> list[Group]:
            groups = as_published(chosen(groups, method, config), request, said)
            if request.tell is not None:
                groups = [entry for entry in groups if _is_of_kind(entry, config, request)]
            for entry in groups:
                _insist_on_kind(entry, config)
            if config is not None and request.tell is None:
                refuse_unknown(config)
            about = _about(request, component)
            groups += _unlisted(groups, config, method, about)
            groups = arranged(groups, method, config, about, said)
            name = component or component_by_names(groups, request.architecture) or "model"
            return _placed(groups, name)

        def refine(updates: list[Update]) -> list[Update]:
            indices = config.fields.get("trainable_token_indices") if config is not None else None
            updates = [_with_indices(u, indices, request) if u.method == "trainable_tokens" else u for u in updates]
            return [_say_why_unknown(u, source, method) for u in method.complete(updates)]

        insist_on_consent(source, reading, request)
        _insist_on_one_wrapper(source, reading)
        _insist_on_one_kind(source, reading, request)
        adapter = read_by_table(reading, source, asked, rule, refine, settle)
        if request.tell is None:
            _insist_on_all(adapter, reading, config.method if config is not None else method)
        notes = [
            *adapter.provenance.notes,
            *_left_out(source, reading),
            *wrapped_note(reading),
            *ignored,
            *dict.fromkeys(said),
            *_unknown_facts(adapter, method),
        ]
        adapter = replace(adapter, provenance=replace(adapter.provenance, notes=tuple(notes)))
        if config is None:
            return adapter
        name = adapter.components[0] if adapter.components else "model"
        if resized and request.tell is None:
            adapter = rescaled(adapter, config, request)
        if source.config is not None and request.tell is None:
            said_wrong: list[str] = []
            problem = said_wrong.append if request.repair else _contradicted
            describes(config.fields, config.where, adapter.as_stated(), problem, config.method)
            if said_wrong:
                told = next(filter(None, (in_short(sentence, config.where) for sentence in said_wrong)), "")
                notes.append(
                    f"the config contradicts the tensors, which are believed{', e.g. of ' + told if told else ''}"
                )
        if config.mutated_init:
            notes.append(
                f"was trained from {config.mutated_init}, which changed the base weights: it is right on that changed base only"
            )
        provenance = replace(adapter.provenance, notes=tuple(notes))
        fields = dict(config.fields)
        if fields.get("target_modules") == "all-linear" and any(_HEAD.fullmatch(u.module) for u in adapter):
            del fields["target_modules"]  # which means all but the head
        if fields.get("peft_type") is None:
            fields.pop("peft_type", None)
        own = {name: {**fields, **({"peft_type": config.method.now} if config.method.now else {})}}
        return replace(adapter, config=own, provenance=provenance, mutated_init=config.mutated_init)

    def spelling(self, adapter: Adapter, target: Target) -> dict[str, Any]:
        names = {f"{u.component}.{u.module}": key_name(u) for u in adapter if u.method == PARAMETERS}
        return super().spelling(adapter, target) | ({"names": names} if names else {})

    def prepared(self, adapter: Adapter) -> Adapter:
        updates = (_turning_as_peft(u, adapter) for u in adapter)
        return adapter.with_updates(KINDS[KIND_OF[u.method]].fitted(u) if u.method in KIND_OF else u for u in updates)

    def fitted(self, adapter: Adapter, target: Target, rounding: Rounding) -> Fitted:
        return fitted(adapter, target, rounding)

    def write(self, adapter: Adapter, target: Target) -> Output:
        whole = adapter
        adapter, dropped = _in_shape(adapter, target)
        components = adapter.components
        files: list[OutputFile] = []
        kept: list[Update] = []
        notes: list[str] = []
        for component in components:
            part = adapter.with_updates(adapter.of(component))
            folder = f"{component}/" if len(components) > 1 else ""
            method = method_of(part.of(component))  # raises for two: a file with both needs no look at its keys
            spelled = self.spell(_collected(part, component, method), target)
            dropped += spelled.dropped
            if not any(u.method != "saved" for u in spelled.kept):
                dropped += [f"{u.name}: nothing but saved parameters was left beside it" for u in spelled.kept]
                continue
            notes += spelled.notes
            left = {u.key for u in spelled.kept}
            gone = next((u for u in whole.of(component) if u.method in method.methods and u.key not in left), None)
            if gone is not None and dropped:
                _refuse_part(whole, gone.module, method)
            own = [u for u in part if u.key in left]
            part = spelled.adapter.with_updates(_handed_out(spelled.adapter, own, method))
            config, said = write_config(part, component, target)
            if target.reader:
                parts = target.architecture.components if target.architecture else {}
                config = listed_targets(config, part, Base.of(parts.get(component)))
            notes += said
            notes += _lost_prefix(part, component, target)
            kept += own
            files.append(OutputFile(folder + WEIGHTS, spelled.tensors, _header(part, component)))
            files.append(OutputFile(folder + CONFIG, text=json.dumps(config, indent=2, sort_keys=True) + "\n"))
        return Output(tuple(files), tuple(kept), tuple(dropped), tuple(dict.fromkeys(notes)))


def _about(request: Request, component: str) -> Request:
    """The request with the base's one component that the file is for: others may have modules of the same names."""
    base = request.architecture
    if base is None or component not in base.components or len(base.components) == 1:
        return request
    return replace(request, architecture=base._replace(components={component: base.components[component]}))


def _contradicted(sentence: str) -> None:
    """Raise `Conflict`: a config that came with the tensors says something else than they do."""
    raise errors.Conflict(f"{sentence}; convert --to peft --repair believes the tensors and lists what it changes")


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
    # A model by itself is what is read where none is named; an earlier file's may have been another.
    named = {} if component == "model" else {"component": component}
    recorded = {name: value for name, value in carried.spelling.get(PEFT.name, {}).items() if name != "component"}
    spelling = {name: value for name, value in carried.spelling.items() if name != PEFT.name}
    if recorded or named:
        spelling[PEFT.name] = {**recorded, **named}
    own = {k: v for k, v in part.config.items() if k == component}
    provenance = replace(part.provenance, carried=carried._replace(spelling=spelling))
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
    `modules_to_save.NAME` and the base's as `original_module`, which is no part of the adapter.  So do the biases that
    peft itself saves with bias="all".  What stands twice is read once: as the wrapper has it, which is what it computes with.
    """
    kept: dict[tuple[Place, str, str, str], Any] = {}
    originals: list[tuple[Any, str]] = []
    for claim in reading.claims:
        parts = claim.name.split(".") if claim.suffix.method == "saved" else []
        if "original_module" in parts:
            at = parts.index("original_module")
            originals.append((claim, ".".join(parts[:at] + parts[at + 1 :])))
            continue
        wrapped = "modules_to_save" in parts[1:]
        if wrapped:
            at = parts.index("modules_to_save", 1)
            named = parts[at + 1 : at + 2] in (["default"], [reading.adapter_name])
            claim = claim._replace(name=".".join(parts[:at] + parts[at + 1 + named :]))
        place = (claim.place, claim.name, claim.suffix.role, "")
        if not parts or (place in kept and wrapped == _is_wrapped(kept[place])):
            place = (*place[:3], claim.key)  # where this stands twice it is a fault, which the reader of groups tells
        if place not in kept or wrapped:
            kept[place] = claim
    alone = [c.key for c, name in originals if (c.place, name, c.suffix.role, "") not in kept]
    return reading._replace(claims=tuple(kept.values()), unclaimed=(*reading.unclaimed, *alone))


_FEW = 256
"""Tensors that are not read, each of which is compared with the one that is."""


def _left_out(source: Source, reading: Reading) -> list[str]:
    """A note on what `_unwrapped` does not read."""
    read = {claim.key: claim for claim in reading.claims}
    unclaimed = set(reading.unclaimed)
    rest = [key for key in source.tensors if key not in read and key not in unclaimed]
    notes = left_out(rest, reading.claims)
    originals = [key for key in rest if "original_module" in key.split(".")]
    rest = [key for key in rest if "original_module" not in key.split(".")][:_FEW]
    if originals:
        many = f" and {len(originals) - 1} more are" if len(originals) > 1 else " is"
        notes.append(f"tensor {originals[0]!r}{many} the base's own, which the adapter saves anew: left out")
    for key in rest:
        prefix, _, role = key.rpartition(".")
        twin = next(
            (k for k, c in read.items() if k != key and c.name and prefix.endswith(c.name) and _is_twin(c, role)), None
        )
        if twin is not None and not same_tensor(source.tensors[key], source.tensors[twin]):
            notes.append(f"tensor {key!r} differs from {twin!r}, with which peft computes: the latter is read")
    return notes


def _is_twin(claim: Any, role: str) -> bool:
    return claim.suffix.method == "saved" and claim.suffix.role == role and _is_wrapped(claim)


def _is_wrapped(claim: Any) -> bool:
    return "modules_to_save" in claim.key.split(".")


def _insist_on_one_wrapper(source: Source, reading: Reading) -> None:
    """Raise `UnsupportedFormat` for an adapter on a module inside `modules_to_save`.

    peft before 0.13 put that wrapper around layers that it had adapted already, where a classifier's `target_modules` name its
    head (huggingface/peft v0.10.0 `src/peft/peft_model.py`: `PeftModelForSequenceClassification.__init__` lists the head after
    its layers are replaced), and saved the factors under three names.
    """
    adapted = [claim for claim in reading.claims if claim.suffix.method != "saved"]
    inside = [claim for claim in adapted if ".modules_to_save" in claim.name]
    if not inside:
        return
    head = inside[0].name.partition(".modules_to_save")[0]
    error = errors.UnsupportedFormat(
        f"{source.path}: tensor {inside[0].key!r}: {head} is adapted inside modules_to_save, as peft before 0.13 wrapped a "
        "classifier's head that target_modules names, too; a later peft drops these factors, or fails. What was trained is the "
        f"weight that is saved + scale · lora_B · lora_A: save this sum as {head}.weight in place of {head}'s tensors, and take "
        "the head out of target_modules",
        fault="wrapped-twice",
    )
    error.keys = tuple(
        claim.key for claim in adapted if {"modules_to_save", "original_module"} & set(claim.name.split("."))
    )
    raise error


def _insist_on_one_kind(source: Source, reading: Reading, request: Request) -> None:
    """Raise `UnsupportedFormat` for two types without a config, of which one has tensors or facts for all its modules."""
    kinds = [KINDS[kind] for kind in _shown_kinds(reading)]
    common = any(kind.settings for kind in kinds) or any(c.place.whole for c in reading.claims)
    if source.config is None and not request.fields.get("peft_type") and len(kinds) > 1 and common:
        names = " and ".join(kind.title for kind in kinds)
        count = {2: "two", 3: "three"}.get(len(kinds), str(len(kinds)))
        request.wrong(
            errors.UnsupportedFormat(
                f"{source.path}: holds {count} types of adapter ({names}), and a PEFT config is for one; split it into a file "
                "each",
                fault="peft-type",
            )
        )


def _insist_on_all(adapter: Adapter, reading: Reading, method: PeftMethod) -> None:
    """Raise `CannotRepresent` where a module was dropped without which the others compute something else."""
    dropped = set(adapter.provenance.dropped)
    gone = next((c for c in reading.claims if c.key in dropped and c.suffix.method in method.methods), None)
    if gone is not None:
        _refuse_part(adapter, gone.name, method)


def _refuse_part(adapter: Adapter, gone: str, method: PeftMethod) -> None:
    why = method.together([u for u in adapter if u.method in method.methods])
    if why:
        raise errors.CannotRepresent(
            f"{adapter.provenance.path}: {gone} cannot be dropped: of {method.title} in this file {why}, so the modules that "
            "are left would compute something else"
        )


def _method(reading: Reading, given: Mapping[str, Any]) -> PeftMethod:
    """The method that the user names, or whose tensors the file has; LoRA's where it has several (each is checked against
    its config)."""
    if given.get("peft_type"):
        return kind_named(given["peft_type"], "--set", _only_kind([reading]))
    return _only_kind([reading]) or LORA


def _shown_kinds(reading: Reading) -> list[str]:
    """The types whose tensors the file has, without the tokens that are trained beside another."""
    found = dict.fromkeys(KIND_OF[c.suffix.method] for c in reading.claims if c.suffix.method in KIND_OF)
    if len(found) > 1:
        found.pop("TRAINABLE_TOKENS", None)
    return list(found)


def _only_kind(readings: Sequence[Reading]) -> PeftMethod | None:
    """The one type that the tensors show; None where they show none, or several."""
    reading = next((r for r in readings if len(_shown_kinds(r)) == 1), None)
    if reading is None:
        return None
    method = KINDS[_shown_kinds(reading)[0]]
    roles = {claim.suffix.role for claim in reading.claims} if method.shown else set()
    return next((KINDS[kind] for role, kind in method.shown if role in roles), method)


def _insist_on_kind(entry: Group, config: PeftConfig | None) -> None:
    """Raise `Conflict` where the config is for another method than the tensors are of."""
    if config is None or entry.method not in KIND_OF or entry.method in config.method.methods:
        return
    method = KINDS[KIND_OF[entry.method]]
    if method.kind == "TRAINABLE_TOKENS" and config.method.tokens:
        return
    raise errors.Conflict(
        f"{next(iter(entry.tensors.values())).where}: is a tensor of {method.title}, but {config.where} says peft_type "
        f"{config.method.kind}; if the config is another adapter's, take it away; --set peft_type={method.kind} overrides it",
        fault="peft-type",
    )


def _is_of_kind(entry: Group, config: PeftConfig | None, request: Request) -> bool:
    """Whether a group is of the config's type; told of, where it is not."""
    try:
        _insist_on_kind(entry, config)
    except errors.Conflict as error:
        request.wrong(error, (tensor.key for tensor in entry.tensors.values()))
        return False
    return True


def _understood(source: Source, own: Mapping[str, Any], reading: Reading, request: Request) -> PeftConfig:
    """What can be understood of the config beside the weights: its faults are told, and what the tensors show of the type
    is believed."""
    shown = _only_kind([reading])
    try:
        kind = kind_named(own.get("peft_type") or (shown or LORA).kind, source.config_path, shown)
    except errors.UnsupportedFormat as error:
        request.wrong(error)
        kind = shown or LORA
    fields = dict(own)
    if shown is not None and _is_other(shown, kind, reading):
        keys = [c.key for c in reading.claims if c.suffix.method in KIND_OF]
        request.wrong(
            errors.Conflict(
                f"{source.config_path}: peft_type is {kind.kind}, but the tensors are those of {shown.title} "
                f"({keys[0]!r}): peft finds none of its own and leaves the adapter as it was before training",
                fault="peft-type",
            ),
            keys,
        )
        kind = shown
        fields = {name: value for name, value in fields.items() if name in kind.all_fields}
    return PeftConfig.lenient({**fields, "peft_type": kind.kind}, source.config_path, kind, request.wrong)


def _is_other(shown: PeftMethod, kind: PeftMethod, reading: Reading) -> bool:
    """Whether tensors of one type cannot be those of a config of another."""
    if not set(shown.methods).isdisjoint(kind.methods) or (shown.kind == "TRAINABLE_TOKENS" and kind.tokens):
        return False
    own = [c for c in reading.claims if c.suffix.method in KIND_OF]
    return kind.targeted or not all(c.place.whole for c in own)


def _turning_as_peft(update: Update, adapter: Adapter) -> Update:
    """OneTrainer's OFT as peft's; other updates as they are.  Raises `CannotRepresent` where peft's does not do the same."""
    if update.method != "onetrainer_oft":
        return update
    component = adapter.base.components.get(update.component) if adapter.base is not None else None
    spec = component.spec(update.module) if component is not None else None
    turned: Update = maths("onetrainer_oft").as_peft(update, spec.shape if spec is not None else None)
    return turned


def _collected(part: Adapter, component: str, method: PeftMethod) -> Adapter:
    """The adapter with what the file holds once as an update of its own."""
    own = [u for u in part if u.method in method.methods]
    rest = [u for u in part if u.method not in method.methods]
    updates, shared = method.collect(own)
    if not shared:
        return part.with_updates([*updates, *rest])
    # An update for the whole component (no module of its own was listed) has nothing beside what is kept once.
    whole = next((u for u in updates if not u.module), Update(component, "", method.method, {}))
    return part.with_updates([*(u for u in updates if u.module), *rest, replace(whole, tensors=shared)])


def _handed_out(spelled: Adapter, own: list[Update], method: PeftMethod) -> list[Update]:
    """The updates as they are written, each with what the file holds once."""
    whole = {u.key: u for u in own}
    out = []
    for update in spelled:
        if not update.module and update.key not in whole:
            continue
        before = whole.get(update.key)
        shared = {r: t for r, t in before.tensors.items() if r not in update.tensors} if before is not None else {}
        once = update.method in method.methods and bool(shared)
        out.append(replace(update, tensors={**update.tensors, **shared}) if once else update)
    return out


def _config_of(
    source: Source, request: Request, method: PeftMethod, reading: Reading, said: list[str]
) -> PeftConfig | None:
    """The config beside the weights with the user's fields over it; the user's alone; or None.

    Where the user names the type, what a config of another type says besides is left out; that goes to `said`.
    """
    own = source.config
    _one_alpha(request, method)
    if own is None:
        check_given(request.fields, method)
    elif request.tell is not None:
        return _understood(source, own, reading, request)
    else:
        stated = request.fields.get("peft_type") or own.get("peft_type") or method.kind
        kind = kind_named(stated, source.config_path, _only_kind([reading]))
        foreign = [name for name in own if name not in kind.all_fields]
        check_given(request.fields, kind, foreign)
        removed = {name for name in foreign if name in request.fields}
        if "peft_type" in request.fields and str(own.get("peft_type")).upper() != kind.kind:
            removed |= set(foreign)
            lost = sorted(name for name in foreign if own[name] not in (None, False, "", [], {}))
            said += (
                [f"--set peft_type={kind.kind}: fields that its config lacks are ignored: {', '.join(lost)}"]
                if lost
                else []
            )
        fields = {**own, **request.fields}
        return PeftConfig.parse({n: v for n, v in fields.items() if n not in removed}, source.config_path, kind)
    if request.fields:
        # `--alpha` is the alpha beside which an `alpha_pattern` is given.
        given = request.alpha
        alpha = {method.alpha: number(given)} if method.alpha and isinstance(given, float) else {}
        return replace(PeftConfig.parse({**alpha, **request.fields}, "--set", method), certainty=Certainty.GIVEN)
    return None


def _one_alpha(request: Request, method: PeftMethod) -> None:
    """Raise `UsageError` where `--alpha` and `--set` say two alphas."""
    said = request.fields.get(method.alpha) if method.alpha else None
    if isinstance(request.alpha, float) and said is not None and said != request.alpha:
        raise errors.UsageError(
            f"--alpha {request.alpha:g} and --set {method.alpha}={said}: two alphas for the same modules; leave one out"
        )


def _unknown_facts(adapter: Adapter, method: PeftMethod) -> list[str]:
    """A note on each fact that nothing has said yet and that only the user knows."""
    out = []
    scaled = [u for u in adapter if u.alpha is not None and METHODS[u.method].rank(u) is not None]
    if any(u.alpha is not None and u.alpha.value is None for u in scaled):
        out.append(f"unknown: {method.alpha or 'alpha'} of {method.title}, which no tensor holds; --alpha X says it")
    for update in adapter:
        if update.method == "trainable_tokens" and "indices" not in update.options:
            name = "token_indices" if update.options.get("kind") == "alone" else "trainable_token_indices"
            count = update.tensors["delta"].shape[0]
            out.append(
                f"unknown: {name}, the {count} tokens that the rows of {update.module} are for; --set {name}='[…]' says it"
            )
    return out


def _say_why_unknown(update: Update, source: Source, method: PeftMethod) -> Update:
    """The update; where its alpha is unknown, with the reason that holds for PEFT."""
    if update.alpha is None or update.alpha.value is not None:
        return update
    where = f"no {CONFIG} is beside them"
    if source.config is not None:
        where = f"{source.config_path} says no {method.alpha}"
    elif os.path.isfile(os.path.join(os.path.dirname(source.path), CONFIG)):
        where = (
            f"the {CONFIG} beside them is of an adapter_model.safetensors: if it is theirs, call the file so and give the "
            "folder"
        )
    reason = f"PEFT stores no alpha among the tensors, and {where}"
    first = update.tensors.get("A")
    if source.config is None and first is not None and first.key == f"{update.module}{_LEFT_IN}":
        reason += (
            f" (keys with {_LEFT_IN} and no prefix are DiffSynth-Studio's, whose scale is 1: --alpha {first.shape[0]})"
        )
    return replace(update, alpha=replace(update.alpha, source=reason))


_LEFT_IN = ".lora_A.default.weight"
"""How modelscope/DiffSynth-Studio `diffsynth/diffusion/training_module.py` leaves an adapter's name in what it saves."""


def _component(config: Mapping[str, Any] | None) -> str:
    mapping = (config or {}).get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    if not isinstance(name, str):
        return ""
    return next((component for pattern, component in _CLASS_COMPONENTS if re.search(pattern, name)), "")


def _unlisted(groups: list[Group], config: PeftConfig | None, method: PeftMethod, request: Request) -> list[Group]:
    """Groups for the modules of which the file, whose tensors stand once for all, has none."""
    method = config.method if config is not None else method
    if any(not g.place.whole for g in groups if g.method in method.methods):
        return []
    names = method.unlisted(config, request.architecture)
    return [Group(PEFT.places[0], name, method.method, _PREFIX + name, {}, {}) for name in names]


def _placed(groups: list[Group], component: str) -> list[Group]:
    """The groups in the component's places; groups of one place stay in one."""
    places: dict[Place, Place] = {}
    for entry in groups:
        if entry.place not in places:
            places[entry.place] = replace(entry.place, component=component)
    return [g._replace(place=places[g.place]) for g in groups]


def _with_indices(update: Update, stated: Any, request: Request) -> Update:
    """The update with the token indices that the config gives for its embedding; what are none is wrong."""
    indices = stated
    if isinstance(stated, Mapping):
        name = next((k for k in stated if update.module == k or update.module.endswith("." + k)), None)
        indices = stated[name] if name is not None else None
    if indices is None:
        return update
    if not isinstance(indices, Sequence) or not all(type(i) is int and i >= 0 for i in indices):
        wrong = f"{update.name}: trainable_token_indices must be a list of token numbers"
        request.wrong(errors.UnreadableFile(wrong, fault="config-type"))
        return update
    return replace(update, options={**update.options, "indices": list(indices)})


FORMAT = Peft()
