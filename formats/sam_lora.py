"""Sam_LoRA: LoRA on the queries and values of SAM's image encoder, numbered.

    w_a_000, w_b_000    (r, dim), (dim, r): the queries of the first adapted block
    w_a_001, w_b_001                        its values
    w_a_002 …                               the queries of the next

SAM projects queries, keys and values by one `qkv`; `B(A(x))` is added to its first `dim` outputs and to its last.  So a
pair is LoRA on two of the module's three equal parts, which is what loralib's MergedLinear has with `enable_lora`
[true, false, true]: the factors of queries and values stand one below the other, bit for bit.  There is no alpha: scale
1.

Modules are called as in transformers' `SamModel` (`vision_encoder.layers.0.attn.qkv`), whose `qkv` has the authors'
rows in the authors' order.  The adapted blocks are all of the encoder's unless the trainer was told otherwise
(`lora_layer`), which no file says: 12 of width 768, 24 of 1024 and 32 of 1280 are whole encoders (ViT-B, -L, -H), a
base (`--base`) says it of any other, and `--set lora_layer='[0, 5]'` which ones they were.

`fc_768in_10out`, which the first of the two writers would save too, is a classifier that SAM has not.

Sources: MathieuNlp/Sam_LoRA `src/lora.py`; JamesQFreeman/Sam_LoRA `sam_lora.py`; transformers 5.23
`models/sam/modeling_sam.py` (`SamVisionAttention`); facebookresearch/segment-anything
`segment_anything/modeling/image_encoder.py`, `build_sam.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from adapterops.plugin import (
    METHODS,
    Adapter,
    AlphaIn,
    Architecture,
    Claim,
    Dialect,
    Format,
    Group,
    LazyTensor,
    Output,
    OutputFile,
    Place,
    Reading,
    Request,
    Source,
    Suffix,
    Target,
    Update,
    columns,
    component_by_names,
    errors,
    header,
    no_config,
    read_by_table,
    stack,
)

_KEY = re.compile(r"w_([ab])_(\d{3,5})")
_MODULE = re.compile(r"vision_encoder\.layers\.(0|[1-9]\d*)\.attn\.qkv")
_ENCODERS = {768: 12, 1024: 24, 1280: 32}
"""Width to blocks: ViT-B, ViT-L, ViT-H (`build_sam.py`)."""
_LAYERS = "sam_lora_layer"
"""The header's entry for the blocks, where they are not a whole encoder's; the trainer writes none."""
_PARTS = [True, False, True]
_SUFFIXES = (Suffix("w_a_", "lora_merged", "A"), Suffix("w_b_", "lora_merged", "B"))
SAM_LORA = Dialect(
    name="sam-lora",
    format="sam-lora",
    title="Sam_LoRA",
    places=(Place("*", "", _SUFFIXES, sure=True),),
    alpha=AlphaIn.NOWHERE,
    convention="rank",
    example="w_a_000",
)


class SamLora(Format):
    """Sam_LoRA's numbered pairs."""

    name = "sam-lora"
    for_lora = "peft"
    title = "Sam_LoRA (image encoder of Segment Anything)"
    limits = ("Anything but LoRA on the queries and values of whole blocks, with scale 1.",)
    dialects = (SAM_LORA,)
    file_name = "lora.safetensors"
    own_fields: ClassVar[frozenset[str]] = frozenset({"lora_layer"})
    foreign = {
        r"^fc_\d+in_\d+out$": "is the classifier that Sam_LoRA's loader asks for, which SAM has not; this version does "
        r"not convert it"
    }

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        claims, unclaimed = [], []
        for key in source.tensors:
            match = _KEY.fullmatch(key)
            if match is None or key != f"w_{match[1]}_{int(match[2]):03d}":
                unclaimed.append(key)
                continue
            pair = int(match[2])
            # Queries and values of a block are one update; its roles are told apart by number until they are joined.
            suffix = Suffix(f"w_{match[1]}_", "lora", f"{match[1].upper()}{'qv'[pair % 2]}")
            claims.append(Claim(key, SAM_LORA.places[0], str(pair // 2), suffix, f"block {pair // 2}"))
        found = [Reading(SAM_LORA, tuple(claims), tuple(unclaimed))]
        return [reading for reading in found if reading.claims and dialects]

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        notes: list[str] = []

        def settle(groups: list[Group]) -> list[Group]:
            try:
                return _joined(groups, source, request, notes)
            except errors.AdapterOpsError as error:
                request.wrong(error, (t.key for g in groups for t in g.tensors.values()))
                return []

        adapter = read_by_table(reading, source, request, no_config, None, settle)
        provenance = adapter.provenance
        metadata = {key: value for key, value in adapter.metadata.items() if key != _LAYERS}
        return replace(adapter, metadata=metadata, provenance=replace(provenance, notes=(*provenance.notes, *notes)))

    def prepared(self, adapter: Adapter) -> Adapter:
        return adapter.with_updates(_as_parts(u) for u in adapter)

    def write(self, adapter: Adapter, target: Target) -> Output:
        kept: dict[int, Update] = {}
        dropped: list[str] = []
        for update in adapter:
            match = _MODULE.fullmatch(update.module)
            reason = _unspellable(update) if match is not None else "is no qkv of SAM's image encoder"
            if match is not None and int(match[1]) in kept:
                reason = "is the second update of its block"
            if reason and target.allow_drop:
                dropped.append(
                    f"{update.name}: {reason} (left out: {', '.join(t.key for t in update.tensors.values())})"
                )
            elif reason:
                raise errors.CannotRepresent(
                    f"{update.name}: {reason} (tensor {next(iter(update.tensors.values())).key!r}), and Sam_LoRA "
                    "adapts the queries and "
                    "values of those alone; --to peft holds it, or leave it out with --allow-drop"
                )
            elif match is not None:
                kept[int(match[1])] = update
        blocks = sorted(kept)
        tensors: dict[str, LazyTensor] = {}
        for number, block in enumerate(blocks):
            for role, tensor in kept[block].tensors.items():
                rows = tensor.shape[0] // 2
                for part in range(2):
                    key = f"w_{role.lower()}_{2 * number + part:03d}"
                    tensors[key] = tensor.rows([(part * rows, (part + 1) * rows)])
        notes = []
        metadata = header(adapter.with_updates(kept.values()))
        if blocks and blocks != list(range(_ENCODERS.get(kept[blocks[0]].tensors["A"].shape[1], 0))):
            metadata[_LAYERS] = json.dumps(blocks)
            notes.append(
                f"Sam_LoRA stores no block numbers: build its model with lora_layer={blocks} (it stands in the "
                f"header's entry {_LAYERS})"
            )
        return Output(
            (OutputFile("", tensors, metadata),), tuple(kept[b] for b in blocks), tuple(dropped), tuple(notes)
        )


def _joined(groups: list[Group], source: Source, request: Request, notes: list[str]) -> list[Group]:
    """One group a block, under its module's name.

    Raises `BrokenAdapter` for pairs that are incomplete, `UnknownFact` where nothing says whose blocks they are.
    """
    groups = sorted(groups, key=lambda group: int(group.name))
    for number, group in enumerate(groups):
        wrong = next((role for role in ("Aq", "Bq", "Av", "Bv") if role not in group.tensors), None)
        if wrong is not None or int(group.name) != number:
            beside = next(iter(group.tensors.values()))
            lost = f"w_{(wrong or 'A')[0].lower()}_{2 * number + (wrong is not None and wrong[1] == 'v'):03d}"
            raise errors.BrokenAdapter(
                f"{beside.where}: the file has no {lost}; queries and values of every block are pairs of w_a and w_b, "
                "numbered without "
                "a gap",
                fault="missing-half",
            )
        for one, two in (("Aq", "Bq"), ("Av", "Bv")):
            probe = Update("model", f"block {number}", "lora", {"A": group.tensors[one], "B": group.tensors[two]})
            METHODS["lora"].check(probe)
        a, b = group.tensors["Aq"], group.tensors["Bq"]
        other = next(
            (t for t, like in ((group.tensors["Av"], a), (group.tensors["Bv"], b)) if t.shape != like.shape), None
        )
        if other is not None or a.shape[1] != b.shape[0]:
            raise errors.BrokenAdapter(
                f"{(other or b).where}: shape {list((other or b).shape)} beside {a.key!r} {list(a.shape)} and "
                f"{b.key!r} {list(b.shape)}: "
                "queries and values have one width and one rank",
                fault="ranks",
            )
        own = list(group.tensors.values())
        odd = next((t for t in own if t.dtype != own[0].dtype), None)
        if odd is not None:
            raise errors.BrokenAdapter(
                f"{odd.where}: is {odd.dtype} beside {own[0].key!r}, which is {own[0].dtype}; the factors of a block have "
                "one type",
                fault="dtype",
                keys=(odd.key, own[0].key),
            )
    width = groups[0].tensors["Aq"].shape[1]
    blocks = _blocks(len(groups), width, source, request, notes)
    place = SAM_LORA.places[0]
    out = []
    for block, group in zip(blocks, groups, strict=True):
        t = group.tensors
        name = f"vision_encoder.layers.{block}.attn.qkv"
        tensors = {"A": stack([t["Aq"], t["Av"]]), "B": stack([t["Bq"], t["Bv"]])}
        options: dict[str, Any] = {"enable_lora": list(_PARTS)}
        out.append(Group(place, name, "lora_merged", group.stem, tensors, options, name))
    component = component_by_names(out, request.architecture) or "model"
    return [group._replace(place=replace(place, component=component)) for group in out]


def _blocks(count: int, width: int, source: Source, request: Request, notes: list[str]) -> Sequence[int]:
    """The blocks that the file's pairs are of.  Raises `UnknownFact` or `UsageError`."""
    given = request.fields.get("lora_layer")
    if given is None and _LAYERS in source.metadata:
        try:
            given = json.loads(source.metadata[_LAYERS])
        except (ValueError, RecursionError):
            given = source.metadata[_LAYERS]
    if given is not None:
        # As the trainer does: it goes through the encoder's blocks, whatever the order of the list.
        if not _is_blocks(given) or len(set(given)) != count:
            raise errors.UsageError(
                f"{source.path}: lora_layer {json.dumps(given)[:60]}: the file has {count} pairs of queries and "
                f"values, so say {count} "
                "different numbers of blocks (--set lora_layer='[0, 1, …]')"
            )
        return sorted(given)
    known = _ENCODERS.get(width)
    there = len(list(_in_base(request.architecture))) if request.architecture is not None else known
    if there == count:
        if request.architecture is None:
            notes.append(
                f"assumed: the modules of transformers' SamModel; {count} blocks of width {width} are the whole encoder"
            )
        return range(count)
    what = (
        f"the base has {there}"
        if request.architecture is not None
        else f"SAM's encoder of width {width} has {known or 'another number'}"
    )
    raise errors.UnknownFact(
        f"{source.path}: adapts {count} blocks, and {what}; nothing in the file says which they are: say it with "
        "--set lora_layer='[0, 1, …]', or name the base with --base CONFIG"
    )


def _in_base(architecture: Architecture) -> Iterator[str]:
    for component in architecture.components.values():
        yield from (name for name in component.modules if _MODULE.fullmatch(name))


def _is_blocks(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(n) is int and 0 <= n < 10_000 for n in value)


def _as_parts(update: Update) -> Update:
    """LoRA on a whole qkv whose keys are left alone, as LoRA on its queries and values; any other update as it is.

    Where queries and values use different halves of the rank, as a conversion from here writes them, each gets its own back.
    """
    if update.method != "lora" or not _MODULE.fullmatch(update.module) or set(update.tensors) != {"A", "B"}:
        return update
    a, b = update.tensors["A"], update.tensors["B"]
    rank, width = a.shape[0], b.shape[0] // 3
    if len(a.shape) != 2 or b.shape[0] % 3:
        return update
    values = b.numpy().reshape(3, width, rank)
    if values[1].any():
        return update
    half = rank // 2
    halves = rank % 2 == 0 and half and not values[0][:, half:].any() and not values[2][:, :half].any()
    options = {**update.options, "enable_lora": list(_PARTS)}
    if not halves:
        made = {"A": stack([a, a]), "B": b.rows([(0, width), (2 * width, 3 * width)])}
        return _scaled(replace(update, method="lora_merged", tensors=made, options=options), update, rank)
    parts = [b.rows([(0, width)]), b.rows([(2 * width, 3 * width)])]
    made = {"A": a, "B": stack([columns(parts[0], 0, half), columns(parts[1], -half, half)])}
    return _scaled(replace(update, method="lora_merged", tensors=made, options=options), update, half)


def _scaled(made: Update, update: Update, rank: int) -> Update:
    """The update with the scale that it had, at its new rank."""
    scale = METHODS[update.method].scale(update)
    if update.alpha is None or scale is None:
        return made
    return replace(made, alpha=replace(update.alpha, value=scale * rank), rslora=False)


def _unspellable(update: Update) -> str:
    """Why an update on a qkv cannot stand in such a file; "" where it can."""
    if update.method != "lora_merged" or set(update.tensors) != {"A", "B"}:
        return (
            "is no LoRA that leaves the keys alone" if update.method == "lora" else f"is {METHODS[update.method].title}"
        )
    if list(update.options.get("enable_lora", ())) != _PARTS:
        return "adapts other parts than queries and values"
    a, b = update.tensors["A"], update.tensors["B"]
    if a.shape[0] != 2 * b.shape[1]:
        return "has not one pair of factors for the queries and one for the values"
    if METHODS[update.method].scale(update) != 1.0:
        return f"its scale is {METHODS[update.method].scale(update):g} and readers of Sam_LoRA apply 1 (--fold-alpha bakes it in)"
    return ""


FORMAT = SamLora()
