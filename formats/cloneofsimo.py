"""cloneofsimo/lora: the first trainer of LoRA for Stable Diffusion, whose files number the modules.

    unet:0:up, unet:0:down, text_encoder:0:up …    the factors of the n-th module that the trainer's walk meets
    <s1>                                           a textual inversion: the embedding of a new token (dim,)

The header holds, for each component, a JSON list of the classes that were walked (`unet`: `["CrossAttention",
"Attention", "GEGLU"]`), every pair's rank (`unet:0:rank`), and `<embed>` for every token.  So a number means a module
only in an order of modules: `cloneofsimo_walk` has it.  diffusers changed that order at its version 0.15 and the file
does not say which one it was, but the shapes do: a transformer block has its feed-forward's wide projection before the
cross-attention or behind it.  The published files are of the earlier; `cloneofsimo-0.15` is written for the later.

There is no alpha: readers build every layer with scale 1 (`LoraInjectedLinear(…, scale=1.0)`), and a trainer's own
scale is multiplied into `up` when it saves (`realize_as_lora`).  Convolutions are those of
`inject_trainable_lora_extended`; as the reader does, a pair of two dimensions passes convolutions over, and one of four
linear layers.

`.pt` files (`save_lora_weight`) are lists, up and down by turns, of one component without a header.  Nothing in them
says what they are, so they are read where the user does (`--from cloneofsimo-list`); the shapes of all must be those of
a walk.

Source: cloneofsimo/lora `lora_diffusion/lora.py` (`save_safeloras_with_embeds`, `parse_safeloras`, `_find_modules_v2`,
`monkeypatch_or_replace_lora_extended`, `save_lora_weight`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from adapterops_formats.cloneofsimo_walk import CLASSES, EARLY, LATE, LISTED_KEY, missing, targets_for, walk

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Claim,
    Dialect,
    Format,
    Group,
    ModuleSpec,
    Output,
    OutputFile,
    Place,
    Reading,
    Request,
    Source,
    Suffix,
    Target,
    Update,
    errors,
    header,
    no_config,
    read_by_table,
    write_by_table,
)

EMBED = "<embed>"
"""What the header says of a token."""
_PAIR = (Suffix(":up", "lora", "B"), Suffix(":down", "lora", "A"))
_PLACES = {component: Place(component, f"{component}:", _PAIR) for component in CLASSES}
_TOKENS = Place("embeddings", "", (Suffix("", "bundled", "emb_params"),), free=True, sure=True)
_KEY = re.compile(r"(unet|text_encoder):(0|[1-9]\d{0,5}):(up|down)")
_OWN = re.compile(r"(unet|text_encoder)(:\d+:rank)?")
CLONEOFSIMO = Dialect(
    name="cloneofsimo",
    format="cloneofsimo",
    title="cloneofsimo/lora",
    places=(*_PLACES.values(), _TOKENS),
    alpha=AlphaIn.NOWHERE,
    convention="rank",
    exact_shapes=True,
    example="unet:0:up",
)
LATER = replace(CLONEOFSIMO, name="cloneofsimo-0.15", title="cloneofsimo/lora on diffusers 0.15 or later")
LISTED = replace(
    CLONEOFSIMO,
    name="cloneofsimo-list",
    title="cloneofsimo/lora (a .pt list)",
    asked=True,
    written=False,
    example="[0]",
)
_BLOCKS = {CLONEOFSIMO.name: EARLY, LATER.name: LATE}


class Cloneofsimo(Format):
    """cloneofsimo's numbered modules."""

    name = "cloneofsimo"
    for_lora = "kohya"
    title = "cloneofsimo/lora (numbered modules)"
    limits = (
        "Other modules than a walk of the trainer's meets: all the layers of its target classes.",
        "A scale that is not 1 (`--fold-alpha`), DoRA, biases, other components than the U-Net and one text encoder.",
    )
    dialects = (CLONEOFSIMO, LATER, LISTED)
    file_name = "lora.safetensors"

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        found = [_listed(source) if d is LISTED else _numbered(source, d) for d in dialects]
        # The two orders read keys alike; which of them a file is in, its shapes say.
        return [r for r in found if any(c.suffix.method == "lora" for c in r.claims)][:1]

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        from adapterops_formats.cloneofsimo_match import Found, named  # other files have no positions

        said = _targets_said(source, request)
        found = Found()

        def settle(groups: list[Group]) -> list[Group]:
            nonlocal found
            tokens = [_flat(group) for group in groups if group.method == "bundled"]
            numbered = [group for group in groups if group.method != "bundled"]
            try:
                found = named(numbered, source, request, said)
            except errors.AdapterOpsError as error:
                request.wrong(error, (t.key for group in numbered for t in group.tensors.values()))
            return [*(group._replace(place=_PLACES[component]) for component, group in found.groups), *tokens]

        adapter = read_by_table(reading, source, request, no_config, None, settle)
        spoken = CLONEOFSIMO if found.block == EARLY else LATER
        own = {key: value for key, value in adapter.metadata.items() if not _OWN.fullmatch(key) and value != EMBED}
        provenance = adapter.provenance
        spelling = {**provenance.spelling, **({"targets": found.targets} if said else {})}
        carried = {n: v for n, v in provenance.carried.spelling.items() if n != reading.dialect.name}
        provenance = replace(
            provenance,
            dialect=spoken.name,
            spelling=spelling,
            notes=(*provenance.notes, *found.notes),
            carried=provenance.carried._replace(spelling={**carried, spoken.name: spelling}),
        )
        return replace(adapter, metadata=own, provenance=provenance)

    def prepared(self, adapter: Adapter) -> Adapter:
        return adapter.with_updates(_as_token(u) for u in adapter)

    def spelling(self, adapter: Adapter, target: Target) -> dict[str, Any]:
        recorded = adapter.provenance.carried.spelling
        own = next((recorded[d.name] for d in (target.dialect, *self.dialects) if d.name in recorded), {})
        return super().spelling(adapter, target) | ({"targets": own["targets"]} if "targets" in own else {})

    def write(self, adapter: Adapter, target: Target) -> Output:
        if target.dialect is LISTED:
            raise errors.CannotRepresent(
                f"{LISTED.title} is a pickle, which is read and never written; --to cloneofsimo"
            )
        spelling = self.spelling(adapter, target)
        recorded = spelling.pop("targets", {})
        kept, dropped = _spellable(adapter, target)
        targets: dict[str, list[str]] = {}
        names: dict[str, str] = {}
        for component in dict.fromkeys(u.component for u in kept if u.component in CLASSES):
            own = [u for u in kept if u.component == component]
            order, targets[component] = _positions(own, component, target, recorded.get(component))
            names |= {f"{component}.{module}": str(number) for number, module in enumerate(order)}
        if not names:
            raise errors.CannotRepresent(
                f"{', '.join(u.name for u in list(adapter)[:3])}: nothing here is a module that {CLONEOFSIMO.title} numbers"
            )
        kept_ones = adapter.with_updates(kept)
        spelled = write_by_table(target.dialect, kept_ones, target.architecture, {**spelling, "names": names})
        metadata = {k: v for k, v in header(spelled.adapter).items() if k != "format" or k in adapter.metadata}
        for component, classes in targets.items():
            metadata[component] = json.dumps(classes)
        tensors = dict(spelled.tensors)
        for key, tensor in spelled.tensors.items():
            match = _KEY.fullmatch(key)
            if match is None:
                metadata[key], tensors[key] = EMBED, tensor.reshape((tensor.numel,))
            elif match[3] == "down":
                metadata[f"{match[1]}:{match[2]}:rank"] = str(tensor.shape[0])
        notes = list(spelled.notes)
        if target.dialect is CLONEOFSIMO and not recorded and any(".ff." in name for name in names):
            notes.append(
                "modules are numbered in the order of diffusers up to 0.14, as in the published files; for the order "
                "of later "
                f"versions, --to {LATER.name}"
            )
        return Output((OutputFile("", tensors, metadata),), tuple(spelled.kept), tuple(dropped), tuple(notes))


def _numbered(source: Source, dialect: Dialect) -> Reading:
    claims, unclaimed = [], []
    for key in source.tensors:
        match = _KEY.fullmatch(key)
        if match is not None:
            suffix = next(s for s in _PAIR if s.text == f":{match[3]}")
            claims.append(Claim(key, _PLACES[match[1]], match[2], suffix, f"{match[1]}:{match[2]}"))
        elif source.metadata.get(key) == EMBED:
            claims.append(Claim(key, _TOKENS, key, _TOKENS.suffixes[0], key))
        else:
            unclaimed.append(key)
    return Reading(dialect, tuple(claims), tuple(unclaimed))


def _listed(source: Source) -> Reading:
    """The reading of a list; whose modules they are is settled with the base."""
    claims = []
    for key in source.tensors:
        match = LISTED_KEY.fullmatch(key)
        if match is None:
            return Reading(LISTED, (), tuple(source.tensors))
        pair, half = divmod(int(match[1]), 2)
        claims.append(Claim(key, _PLACES["unet"], str(pair), _PAIR[half], f"[{pair}]"))
    return Reading(LISTED, tuple(claims), ())


def _targets_said(source: Source, request: Request) -> dict[str, tuple[str, ...]]:
    """The target classes of each component in the header."""
    out = {}
    for component in CLASSES:
        text = source.metadata.get(component)
        if text is None:
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
            request.wrong(
                errors.InvalidHeader(
                    f"{source.path}: the header's entry {component!r} is no JSON list of classes: {text[:80]!r}"
                )
            )
            continue
        out[component] = tuple(value)
    return out


def _flat(group: Group) -> Group:
    """A token's vector (dim,) as one row, the form that bundles have."""
    vector = group.tensors["emb_params"]
    if len(vector.shape) != 1:
        raise errors.BrokenAdapter(f"{vector.where}: shape {list(vector.shape)}; a token's embedding is (dim,)")
    return group._replace(tensors={"emb_params": vector.reshape((1, vector.numel))})


def _as_token(update: Update) -> Update:
    """An embedding in the form of A1111's old files under the name that this format has."""
    if update.method != "bundled" or set(update.tensors) != {"string_to_param.*"}:
        return update
    return replace(update, tensors={"emb_params": update.tensors["string_to_param.*"]})


def _spellable(adapter: Adapter, target: Target) -> tuple[list[Update], list[str]]:
    """The updates that can stand in such a file at all, and what `--allow-drop` leaves out."""
    kept, dropped = [], []
    for update in adapter:
        reason = _unspellable(update)
        if not reason:
            kept.append(update)
        elif target.allow_drop:
            dropped.append(f"{update.name}: {reason} (left out: {', '.join(t.key for t in update.tensors.values())})")
        else:
            raise errors.CannotRepresent(
                f"{update.name}: {reason} (tensor {next(iter(update.tensors.values())).key!r}); --to kohya holds it, "
                "or leave it out "
                "with --allow-drop"
            )
    return kept, dropped


def _unspellable(update: Update) -> str:
    """Why an update cannot stand in such a file; "" where it can."""
    if update.method == "bundled":
        vector = update.tensors.get("emb_params")
        if len(update.tensors) > 1 or vector is None:
            return f"{CLONEOFSIMO.title} has embeddings of one text encoder only"
        if len(vector.shape) != 2 or vector.shape[0] != 1:
            return f"{CLONEOFSIMO.title} has one vector a token, and this has {list(vector.shape)}"
        return "its token is called as a module is" if _KEY.fullmatch(update.module) or update.module in CLASSES else ""
    if update.component not in CLASSES:
        return f"{CLONEOFSIMO.title} has no such component; it knows {', '.join(CLASSES)}"
    if update.method != "lora" or set(update.tensors) != {"A", "B"}:
        return f"{CLONEOFSIMO.title} has plain LoRA only"
    return ""


def _positions(
    updates: list[Update], component: str, target: Target, recorded: list[str] | None
) -> tuple[list[str], list[str]]:
    """The modules in the trainer's order, and the classes that lead it to them.

    Raises `CannotRepresent` where no classes lead to exactly these modules, `UnknownArchitectureOfFile` without a base.
    """
    from adapterops_formats.cloneofsimo_match import taken

    base = target.architecture.components.get(component) if target.architecture is not None else None
    if base is None:
        raise errors.UnknownArchitectureOfFile(
            f"{updates[0].name}: {CLONEOFSIMO.title} numbers the modules of a base model, and this adapter's fits none "
            "of the known "
            "ones; give --arch NAME or --base CONFIG"
        )
    specs, wanted = list(base.modules.values()), {u.module for u in updates}
    own = {spec.name: spec for spec in specs if spec.name in wanted}
    below = {spec.name for spec in walk(specs, component, CLASSES[component], EARLY)}
    strange = next((u for u in updates if u.module not in below), None)
    if strange is not None:
        raise errors.CannotRepresent(
            f"{strange.name}: {CLONEOFSIMO.title} numbers the linear layers and convolutions below the modules of some "
            "classes "
            f"({', '.join(CLASSES[component])}), and this is none of them (tensor {strange.tensors['B'].key!r}). --to "
            "kohya or --to diffusers "
            "holds it"
        )
    kinds = {spec.kind for spec in own.values()}
    for targets in ([recorded] if recorded else []) + [targets_for(specs, component, wanted, kinds)]:
        steps = walk(specs, component, targets, _BLOCKS[target.dialect.name])
        order = [spec for spec in steps if spec.name in wanted]
        # The trainer's reader asks for the next pair at every module, after the last one, too.
        ends = targets is recorded or order[-1:] == steps[-1:]
        given = taken(steps, [len(spec.shape) for spec in order])
        if ends and {spec.name for spec in order} == wanted and given == order == _every(steps, kinds):
            return [spec.name for spec in order], list(targets)
    name, lacking = missing(specs, component, wanted, kinds)
    what = (
        f"the adapter has no {lacking} beside other layers below modules of class {name}" if name else "so it is here"
    )
    raise errors.CannotRepresent(
        f"{updates[0].name}: {CLONEOFSIMO.title} numbers all layers below the modules of some classes and has no way "
        f"to leave one out: {what} "
        f"(tensor {updates[0].tensors['B'].key!r}). --to kohya or --to diffusers holds it"
    )


def _every(steps: Sequence[ModuleSpec], kinds: set[str]) -> list[ModuleSpec]:
    return [spec for spec in steps if spec.kind in kinds]


FORMAT = Cloneofsimo()
