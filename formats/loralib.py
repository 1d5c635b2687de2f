"""loralib: the state dict of a model whose layers are microsoft/LoRA's, or those of AdaLoRA's authors.

    bert.encoder.layer.0.attention.self.query.lora_A        (r, in)
    bert.encoder.layer.0.attention.self.query.lora_B        (out, r)
    transformer.h.0.attn.c_attn.lora_A                      MergedLinear: (r · e, in), and lora_B (rows, r)
    layers.0.q_proj.lora_E, layers.0.q_proj.ranknum         AdaLoRA

Names are the model's own, without a prefix; biases that were trained stand beside the factors under theirs.  Neither alpha
nor `enable_lora` is in such a file: the program that trained it builds its layers with them.  What is written here holds both in
the header's entry `loralib`, and they are read from there.

`--alpha` says the one, `--set enable_lora='[true, false, true]'` the other: where e > 1 the shapes show e, and with a base
how many parts the module has, but only where all of them are adapted do they show which.  With e = 1 the factors look as those
of a module of so many outputs, and only a base shows that the module has more.

An embedding's factors are spelled as a linear layer's; the base tells, or the header.  A convolution's share the rank out over
the kernel, and only a kernel of one is read and written.

Sources: microsoft/LoRA `loralib/layers.py`, `loralib/utils.py` (`lora_state_dict`); QingruZhang/AdaLoRA
`loralib/loralib/adalora.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from adapterops_formats.pairs import is_handmade
from adapterops_formats.peft_lora import unknown_parts

from adapterops.plugin import (
    METHODS,
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
    is_number,
    read_by_table,
    scalar,
)

ENTRY = "loralib"
"""The header's entry for what no key says."""
_PEFT = "base_model."
"""What PEFT's keys begin with: its folders keep this spelling under their own names."""
_SUFFIXES = (
    # A key reads as plain LoRA's, which stands last; embeddings, groups and triplets are told by what is beside it.
    *(Suffix(f".lora_{role}", "lora", role, {"kind": "embedding"}) for role in "AB"),
    *(Suffix(f".lora_{role}", method, role) for method in ("lora_merged", "adalora", "lora") for role in "AB"),
    Suffix(".lora_E", "adalora", "E"),
    Suffix(".ranknum", "adalora", "ranknum"),
)
LORALIB = Dialect(
    name="loralib",
    format="loralib",
    title="loralib",
    places=(Place("*", "", _SUFFIXES, saved=True, sure=True),),
    alpha=AlphaIn.CONFIG,
    convention="unknown",
    example="bert.encoder.layer.0.attention.self.query.lora_A",
)


class Loralib(Format):
    """loralib's state dict."""

    name = "loralib"
    for_lora = "peft"
    title = "loralib (microsoft/LoRA, AdaLoRA's authors)"
    limits = ("DoRA; rank-stabilised scales; biases of the factors; convolutions with a kernel above one.",)
    dialects = (LORALIB,)
    file_name = "lora.safetensors"

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        if source.config is not None:
            return []  # a PEFT folder, whose own format knows this spelling
        readings = super().recognise(source, dialects)
        readings = [r for r in readings if not any(c.name.startswith(_PEFT) for c in r.claims)]
        return [_with_triplets(r) for r in readings if not is_handmade(r, source)]

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        said = _Said.of(source)
        enabled = _enabled(request.fields)

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            alpha = said.alpha(module)
            return ScaleRule(alpha, certainty=Certainty.READ, source=f"{source.path}: header entry {ENTRY}")

        def settle(groups: list[Group]) -> list[Group]:
            factors = {g.name for g in groups if g.method != "saved"}
            for entry in groups:
                if entry.method == "saved" and entry.name in factors:
                    entry.options["kind"] = "wrapped"  # the layer's own parameter, beside its factors
            groups = [_meant(g, request.architecture, enabled, said) for g in groups]
            component = said.component or component_by_names(groups, request.architecture) or "model"
            places: dict[Place, Place] = {}
            for entry in groups:
                places.setdefault(entry.place, replace(entry.place, component=component))
            return [g._replace(place=places[g.place]) for g in groups]

        def refine(updates: list[Update]) -> list[Update]:
            return [_with_reason(u) for u in updates]

        adapter = read_by_table(reading, source, request, rule, refine, settle)
        adapter = replace(
            adapter, provenance=replace(adapter.provenance, notes=(*adapter.provenance.notes, *_unknown(adapter)))
        )
        return replace(adapter, metadata={k: v for k, v in adapter.metadata.items() if k != ENTRY})

    def write(self, adapter: Adapter, target: Target) -> Output:
        first = next((u for u in adapter if u.component != adapter.components[0]), None)
        if first is not None:
            raise errors.CannotRepresent(
                f"{first.name}: loralib's names say no component, and the adapter has {' and '.join(adapter.components)}; "
                "split it into a file each"
            )
        updates: list[Update] = []
        dropped: list[str] = []
        for update in adapter:
            try:
                _refuse_embedding(update, target.architecture)
                updates.append(_as_layer(update))
            except errors.CannotRepresent as error:
                if not target.allow_drop:
                    raise
                dropped.append(str(error))
        spelled = self.spell(adapter.with_updates(updates), target)
        metadata = header(spelled.adapter) | {ENTRY: _entry(spelled.adapter)}
        notes = [*spelled.notes, _told(spelled.kept)]
        file = OutputFile("", spelled.tensors, metadata)
        return Output((file,), tuple(spelled.kept), (*dropped, *spelled.dropped), tuple(n for n in notes if n))


class _Said:
    """The header's entry: `lora_alpha` and `enable_lora` as one value or as a table by module, `embeddings`, `component`."""

    def __init__(self, value: Mapping[str, Any]) -> None:
        self._value = value
        component = value.get("component")
        self.component = component if isinstance(component, str) else ""

    @classmethod
    def of(cls, source: Source) -> _Said:
        """Raises `InvalidHeader` for an entry that nobody wrote so."""
        try:
            value = json.loads(source.metadata.get(ENTRY, "{}"))
        except (ValueError, RecursionError) as error:
            raise errors.InvalidHeader(f"{source.path}: the header's entry {ENTRY} is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise errors.InvalidHeader(f"{source.path}: the header's entry {ENTRY} is not a table")
        said = cls(value)
        for name, sound, wanted in (
            ("lora_alpha", _is_alpha, "a number"),
            ("enable_lora", _is_flags, "a list of true and false"),
        ):
            wrong = [v for v in _values(value.get(name)) if not sound(v)]
            if wrong:
                raise errors.InvalidHeader(
                    f"{source.path}: {name} in the header's entry {ENTRY} is {wrong[0]!r:.60}, not {wanted}"
                )
        return said

    def alpha(self, module: str) -> float | None:
        """The alpha of a module."""
        value = self._value.get("lora_alpha")
        value = value.get(module) if isinstance(value, Mapping) else value
        return None if value is None else float(value)

    def enabled(self, module: str) -> list[bool] | None:
        """Which parts of a module are adapted."""
        value = self._value.get("enable_lora")
        return value.get(module) if isinstance(value, Mapping) else value

    def is_embedding(self, module: str) -> bool:
        """Whether the module is an embedding."""
        value = self._value.get("embeddings")
        return isinstance(value, list) and module in value


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else [] if value is None else [value]


def _is_alpha(value: Any) -> bool:
    return is_number(value)


def _is_flags(value: Any) -> bool:
    return isinstance(value, list) and any(v is True for v in value) and all(type(v) is bool for v in value)


def _enabled(fields: Mapping[str, Any]) -> list[bool] | None:
    """`--set enable_lora`.  Raises `UsageError` for anything but a list of true and false."""
    value = fields.get("enable_lora")
    if value is not None and not _is_flags(value):
        raise errors.UsageError(
            f"--set enable_lora={json.dumps(value)[:60]}: as many true and false as the outputs have parts, such as "
            "'[true, false, true]'"
        )
    return value


def _with_triplets(reading: Reading) -> Reading:
    """The reading with the factors of AdaLoRA, which are spelled as LoRA's, as parts of it."""
    triplets = {c.name for c in reading.claims if c.suffix.role == "E"}
    own = {s.role: s for s in _SUFFIXES if s.method == "adalora"}
    claims = tuple(
        c._replace(suffix=own[c.suffix.role]) if c.name in triplets and c.suffix.method == "lora" else c
        for c in reading.claims
    )
    return reading._replace(claims=claims)


def _meant(entry: Group, architecture: Architecture | None, enabled: list[bool] | None, said: _Said) -> Group:
    """The group under the method that its shapes, the base or the user make of it."""
    a, b = entry.tensors.get("A"), entry.tensors.get("B")
    if entry.method == "adalora":
        if "ranknum" not in entry.tensors and a is not None:
            entry.options["init_r"] = a.shape[0]  # loralib masks triplets and keeps them
        return entry
    if entry.method != "lora" or a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        return entry
    parts = architecture.components.values() if architecture is not None else ()
    spec = next((found for part in parts if (found := part.spec(entry.name)) is not None), None)
    if said.is_embedding(entry.name) or (spec is not None and spec.kind == "embedding"):
        entry.options["kind"] = "embedding"
        return entry
    flags = enabled if enabled is not None else said.enabled(entry.name)
    grouped = b.shape[1] < a.shape[0]
    some = spec is not None and len(spec.shape) == 2 and b.shape[0] < spec.shape[0] and a.shape[1] == spec.shape[1]
    if not grouped and not some and (flags is None or sum(flags) > 1 or (spec is not None and not some)):
        return entry
    if some and flags is None:
        assert spec is not None
        groups = max(1, a.shape[0] // max(1, b.shape[1]))
        raise errors.UnknownFact(
            f"{b.where}: shape {list(b.shape)} adapts {groups} of the {spec.shape[0] * groups // b.shape[0]} equal parts of "
            f"{entry.name}, which has {spec.shape[0]} outputs, and nothing in the file says which; say it with "
            "--set enable_lora='[true, false, …]'"
        )
    if flags is not None:
        groups = a.shape[0] // max(1, b.shape[1])
        if groups != sum(flags):
            raise errors.BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} beside {a.key!r} {list(a.shape)} is of {groups} parts, and enable_lora "
                f"{json.dumps(flags)} turns {sum(flags)} on"
            )
        entry.options["enable_lora"] = list(flags)
    return entry._replace(method="lora_merged")


def _with_reason(update: Update) -> Update:
    """The update; where its alpha is unknown, with the reason that holds here."""
    if update.alpha is None or update.alpha.value is not None:
        return update
    reason = "loralib stores no alpha: it is the lora_alpha that the layers were built with"
    return replace(update, alpha=replace(update.alpha, source=reason))


def _unknown(adapter: Adapter) -> list[str]:
    """A note on each fact that no file of loralib's has and that nothing has said."""
    out = []
    if any(u.alpha is not None and u.alpha.value is None for u in adapter):
        out.append("unknown: lora_alpha, which no tensor holds; --alpha X says it")
    parts = [u for u in adapter if u.method == "lora_merged" and "enable_lora" not in u.options]
    for update in parts[:1]:
        more = f" (so in {len(parts)} modules)" if len(parts) > 1 else ""
        out.append(f"unknown: enable_lora{more}: tensor {update.tensors['B'].key!r} {unknown_parts(update)}")
    return out


def _refuse_embedding(update: Update, architecture: Architecture | None) -> None:
    """Raise `CannotRepresent` for factors of a layer on what the base says is an embedding: they would be read as its own."""
    part = architecture.components.get(update.component) if architecture is not None else None
    spec = part.spec(update.module) if part is not None else None
    if spec is None or spec.kind != "embedding" or update.method not in ("lora", "lora_merged"):
        return
    if update.options.get("kind") != "embedding":
        raise errors.CannotRepresent(
            f"{next(iter(update.tensors.values())).where}: {update.module} is an embedding of the base, and the "
            "update is one of a linear layer; loralib spells both alike, so it would be read as the embedding's: is it the "
            "right --base?"
        )


def _as_layer(update: Update) -> Update:
    """The update with the tensors that loralib's layer has.

    Raises `CannotRepresent` where it has no such layer, `UnknownFact` where nothing says AdaLoRA's first rank.
    """
    if update.method == "adalora":
        if "ranknum" in update.tensors:
            return update
        count = update.options.get("init_r")
        if count is None:
            raise errors.UnknownFact(
                f"{update.tensors['E'].where}: how many triplets {update.module} began with (init_r), by which alpha is "
                "divided, is not in the tensors; say it with --set init_r=N"
            )
        factor = update.tensors["A"]
        dtype = factor.dtype if factor.dtype in ("F64", "F32") else "F32"
        number = scalar(f"{update.module}.ranknum", dtype, float(count), (1,))
        return replace(update, tensors={**update.tensors, "ranknum": number})
    if update.method == "lora_merged":
        return _as_grouped(update)
    if update.method != "lora" or update.options.get("kind") == "embedding" or not update.tensors.keys() >= {"A", "B"}:
        return update
    tensors = dict(update.tensors)
    for role in "AB":
        tensor = tensors[role]
        if len(tensor.shape) > 2 and prod(tensor.shape[2:]) != 1:
            raise errors.CannotRepresent(
                f"{update.name}: tensor {tensor.key!r} {list(tensor.shape)} has a kernel, and loralib's convolutions share the "
                "rank out over it, which is another update; --to peft or --to kohya holds it"
            )
        tensors[role] = tensor.reshape(tensor.shape[:2])
    return replace(update, tensors=tensors)


def _as_grouped(update: Update) -> Update:
    """The update with the factors of loralib's MergedLinear, whose B is a matrix and whose groups are the adapted parts.

    Raises `CannotRepresent` where the groups are others: peft 0.1 and 0.2 had two, however many parts were adapted.
    """
    flags, a, b = update.options.get("enable_lora"), update.tensors["A"], update.tensors["B"]
    groups = a.shape[0] // b.shape[1]
    if flags is not None and sum(flags) != groups:
        raise errors.CannotRepresent(
            f"{update.name}: its factors have {groups} groups for {sum(flags)} adapted parts (enable_lora "
            f"{[bool(f) for f in flags]}), as peft 0.2 made them, and loralib's layer has a group a part; "
            "adapterops to-lora makes a LoRA of it"
        )
    return replace(update, tensors={**update.tensors, "B": b.reshape(b.shape[:2])})


def _entry(adapter: Adapter) -> str:
    """What the layers must be built with, as JSON."""
    value: dict[str, Any] = {}
    alphas = {u.module: alpha for u in adapter if (alpha := _alpha(u)) is not None}
    flags = {u.module: list(u.options["enable_lora"]) for u in adapter if "enable_lora" in u.options}
    embeddings = sorted(u.module for u in adapter if u.options.get("kind") == "embedding")
    if alphas:
        value["lora_alpha"] = _short(alphas)
    if flags:
        value["enable_lora"] = flags
    if embeddings:
        value["embeddings"] = embeddings
    if adapter.components and adapter.components != ("model",):
        value["component"] = adapter.components[0]
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _alpha(update: Update) -> float | None:
    """The alpha that loralib's layer needs: it knows no rule but alpha / r."""
    if update.alpha is None or update.alpha.value is None:
        return None
    if not update.rslora or update.method == "adalora":
        return update.alpha.value
    method = METHODS[update.method]
    return (method.scale(update) or 0.0) * (method.rank(update) or 1)


def _short(values: Mapping[str, float]) -> Any:
    """One number where all modules have the same, else a table."""
    first = next(iter(values.values()))
    same = all(value == first for value in values.values())
    plain = {name: int(v) if v == int(v) else v for name, v in values.items()}
    return next(iter(plain.values())) if same else plain


def _told(updates: Sequence[Update]) -> str:
    """What the user must build the layers with."""
    alphas = {alpha for u in updates if (alpha := _alpha(u)) is not None}
    if not alphas:
        return ""
    said = f"lora_alpha={min(alphas):g}" if len(alphas) == 1 else "a lora_alpha of its own for each module"
    return f"loralib stores no alpha: build the layers with {said} (it stands in the header's entry {ENTRY})"


FORMAT = Loralib()
