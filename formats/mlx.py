"""MLX-LM: a folder of `adapters.safetensors` (`adapters.npz` before March 2024) and `adapter_config.json`.

    model.layers.0.self_attn.q_proj.lora_a    (in, rank)
    model.layers.0.self_attn.q_proj.lora_b    (rank, out)
    model.layers.0.self_attn.q_proj.m         (out,)          DoRA
    model.embed_tokens.lora_a                 (num_embeddings, rank), lora_b (rank, dim)
    model.layers.0.mlp.switch_mlp.up_proj.lora_a   (experts, rank, in), lora_b (experts, out, rank)

ΔW = scale · (lora_a · lora_b)ᵀ for a linear layer, the same without the transpose for an embedding; both factors stand as the
transposes of PEFT's.  The scale is the config's (`mlx_config`), one for all modules, and so is the rank; names are those of
MLX-LM's classes (`mlx_names`), whether the base is quantised or not.  An `adapters.npz` has no config: `--set scale=X` says the
scale.

What one scale and one rank cannot say is made equal without loss, and said: factors are padded with zeros, and a module's
second factor is multiplied by a power of two.  The header records both, so that they are undone on the way back.  Any other
difference of scales is for `--fold-alpha`.

DoRA of an embedding has a magnitude for each token there, and for each dimension in PEFT; neither is the other.  An
embedding's update acts on the output, too, where the head is tied to it; in PEFT it does not.

Sources: ml-explore/mlx-lm `mlx_lm/tuner/lora.py`, `mlx_lm/tuner/dora.py`, `mlx_lm/tuner/utils.py`, `mlx_lm/tuner/trainer.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import frexp, isclose, isfinite
from typing import Any, ClassVar, NamedTuple

from adapterops_formats.mlx_config import ENTRY, NAME, MlxConfig, alpha_of, as_entry, from_entry, made, scale_given
from adapterops_formats.mlx_names import (
    EMBEDDINGS,
    canonical,
    choose,
    expert_names,
    expert_of,
    layer_count,
    refuse_stack,
    spelled,
    stem_of,
)
from adapterops_formats.pairs import is_handmade

from adapterops.plugin import (
    METHODS,
    Adapter,
    AlphaIn,
    Architecture,
    Carried,
    Certainty,
    Dialect,
    Format,
    Group,
    LazyTensor,
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
    columns,
    component_by_names,
    errors,
    header,
    is_zero,
    read_by_table,
    read_keys,
    same_bytes,
    stack,
    uniform,
    zeros,
)

WEIGHTS = "adapters.safetensors"
_MOST_EXPERTS = 4096
"""More than any model has; a name in a stranger's file may say any number."""
_DTYPES = ("F32", "F16", "BF16")
"""What MLX reads as floats: not float64, and float8 as bytes (ml-explore/mlx `mlx/io/safetensors.cpp`)."""
_MOST_DOUBLED = 64
"""How often the scale of one module is twice that of another, at most."""
_SUFFIXES = (
    # A key reads as a linear layer's, which stands last; embeddings are told by their names.
    *(Suffix(f".lora_{r.lower()}", "lora", r, {"kind": "embedding"}, transposed=True) for r in "AB"),
    *(Suffix(f".lora_{r.lower()}", "lora", r, transposed=True) for r in "AB"),
    Suffix(".m", "lora", "magnitude"),
)
MLX = Dialect(
    name="mlx",
    format="mlx",
    title="MLX-LM",
    places=(Place("*", "", _SUFFIXES, sure=True),),
    alpha=AlphaIn.CONFIG,
    convention="unknown",
    vectors=True,
    example="model.layers.0.self_attn.q_proj.lora_a",
)


class Mlx(Format):
    """MLX-LM's folder."""

    name = "mlx"
    title = "MLX-LM folder (adapter_config.json, adapters.safetensors)"
    rules = "adapterops_formats.mlx_rules"
    limits = (
        "More than one scale and one rank: smaller ranks are filled up with zeros, and scales that differ by a "
        "power of two go into the second factor; both are said, and undone on the way back. Any other difference "
        "is for `--fold-alpha`.",
        "Convolutions, biases, saved modules, other components than the language model.",
        "DoRA on some modules only, on experts, or on an embedding (a magnitude for each token there, for each "
        "dimension in PEFT).",
        "An update of a tied head by itself: MLX-LM applies an embedding's to the head as well.",
        "float64 and float8, which MLX does not load as floats: `--dtype float32`.",
    )
    dialects = (MLX,)
    is_folder = True
    own_fields: ClassVar[frozenset[str]] = frozenset({"scale"})

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        config = source.config or {}
        if config.get("fine_tune_type") == "full" and "peft_type" not in config:
            raise errors.NotAnAdapter(
                f"{source.config_path}: fine_tune_type is full: the weights beside it are a model's own after mlx-lm's full "
                "fine-tuning, and no adapter"
            )
        readings = super().recognise(source, dialects)
        readings = [r for r in readings if any(c.suffix.role == "A" for c in r.claims)]
        return [r for r in readings if source.config is not None or not is_handmade(r, source, turned=True)]

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        said: list[str] = []
        source, reading = _unstacked(source, reading, said)
        config = MlxConfig.parse(source.config or {}, source.config_path, request.tell)
        scale = _scale(config, request)
        carried = Carried.parse(source.metadata).spelling.get(MLX.name, {})

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            if scale is None:
                return ScaleRule()
            value, certainty, where = scale
            return ScaleRule(alpha_of(value, rank), certainty=certainty, source=where)

        def settle(groups: list[Group]) -> list[Group]:
            groups = [_meant(entry, request.architecture) for entry in groups]
            component = component_by_names(groups, request.architecture) or "model"
            place = replace(MLX.places[0], component=component)
            return [entry._replace(place=place) for entry in groups]

        def refine(updates: list[Update]) -> list[Update]:
            own = [_as_before(update, carried) for update in updates]
            _insist_on_kind(own, config, request)
            return [_with_reason(update, source) for update in own]

        asked = replace(request, alpha=None) if scale is not None and "scale" in request.fields else request
        _insist_on_rank(reading, source, config, request)
        adapter = read_by_table(reading, source, asked, rule, refine, settle)
        said = [*adapter.provenance.notes, *said, *filter(None, (config.note(),)), *_about_embeddings(adapter)]
        if any(u.alpha is not None and u.alpha.value is None for u in adapter):
            said.append("unknown: scale, which no tensor holds; --set scale=X says it")
        metadata = {k: v for k, v in adapter.metadata.items() if k not in (ENTRY, "format")}
        metadata |= as_entry(source.config) if source.config is not None else {}
        return replace(
            adapter,
            provenance=replace(adapter.provenance, notes=tuple(dict.fromkeys(said))),
            metadata=metadata,
            config=adapter.config or _common(config, adapter),
        )

    def spelling(self, adapter: Adapter, target: Target) -> dict[str, Any]:
        base = target.architecture.components if target.architecture is not None else {}
        names = {}
        for update in adapter:
            part = base.get(update.component)
            published = {own: name for name, own in part.renamed.items()} if part is not None else {}
            name = spelled(published.get(update.module, update.module), _class(adapter, target))
            if name is None:
                raise errors.UnknownFact(
                    f"{next(iter(update.tensors.values())).where}: GPT-2 and GPT-BigCode both have {update.module}, and "
                    "MLX-LM's classes name it differently; say which base it is with --base CONFIG"
                )
            if part is None and canonical(name) != update.module:
                raise errors.UnknownFact(
                    f"{next(iter(update.tensors.values())).where}: {update.module} is called so in a model without a head, and "
                    f"{name} in MLX-LM's; say that the base is one with --base CONFIG"
                )
            names[f"{update.component}.{update.module}"] = name
        return super().spelling(adapter, target) | {"names": names}

    def write(self, adapter: Adapter, target: Target) -> Output:
        other = next((u for u in adapter if u.component != "model"), None)
        if other is not None:
            raise errors.CannotRepresent(
                f"{other.name}: MLX-LM's models are language models, and their names say no component; --to peft holds it"
            )
        taken = self.own_fields if adapter.provenance.format == self.name else frozenset[str]()
        unknown = next((name for name in target.fields if name in self.own_fields and name not in taken), None)
        if unknown is not None:
            raise errors.UsageError(
                f"--set {unknown}: MLX-LM's config is made from the tensors and their alphas; it can be said of a source that "
                "is MLX-LM's"
            )
        held, dropped = _held(adapter, target)
        even = _Even.of(held)
        wrote = self.spell(even.adapter, target)
        written = wrote.adapter
        tensors = _restacked(wrote.tensors)
        names = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
        part = target.architecture.components.get("model") if target.architecture is not None else None
        layers = layer_count(part.modules, {stem_of(u.module) for u in written}) if part is not None else None
        chosen = choose(names, layers)
        common = adapter.config.get("model", {})
        config = made(
            from_entry(adapter.metadata),
            common,
            kind="dora" if any("magnitude" in u.tensors for u in written) else "lora",
            rank=even.rank,
            scale=even.scale,
            names=names,
            chosen=(chosen.num_layers, chosen.keys),
        )
        notes = [*wrote.notes, *even.notes(), *_about_embeddings(written)]
        if not chosen.counted and config["lora_parameters"].get("keys") == chosen.keys:
            notes.append(
                "num_layers counts from the last layer, and how many the base has is not known: modules are listed by their "
                "full names (--base CONFIG gives the usual short form)"
            )
        metadata = {k: v for k, v in header(even.recorded(written)).items() if k != ENTRY} | {"format": "mlx"}
        kept = {u.key for u in wrote.kept}
        return Output(
            (
                OutputFile(WEIGHTS, tensors, metadata),
                OutputFile(NAME, text=json.dumps(config, indent=4, sort_keys=True) + "\n"),
            ),
            tuple(u for u in adapter if u.key in kept),
            (*dropped, *wrote.dropped),
            tuple(dict.fromkeys(notes)),
        )


# Reading


def _unstacked(source: Source, reading: Reading, said: list[str]) -> tuple[Source, Reading]:
    """The source with the factors of layers of experts as those of a module for each expert; no byte is read."""
    tensors: dict[str, LazyTensor] = {}
    stacks = {c.name for c in reading.claims if len(source.tensors[c.key].shape) == 3}
    if not stacks:
        return source, reading
    claims = {claim.key: claim for claim in reading.claims}
    for key, tensor in source.tensors.items():
        claim = claims.get(key)
        if claim is None or claim.name not in stacks:
            tensors[key] = tensor
            continue
        if len(tensor.shape) not in (2, 3):
            raise refuse_stack(tensor.where, tensor.shape)
        twin = source.tensors.get(f"{claim.stem}.lora_b")
        count = twin.shape[0] if twin is not None and len(twin.shape) == 3 else tensor.shape[0]
        found = expert_names(claim.name, count)
        if found is None or claim.suffix.role == "magnitude":
            raise refuse_stack(tensor.where, tensor.shape)
        if not count or tensor.shape[0] % count or (len(tensor.shape) == 3 and tensor.shape[0] != count):
            raise errors.BrokenAdapter(f"{tensor.where}: shape {list(tensor.shape)} is no factor of {count} experts")
        said.append(f"experts are named as in the checkpoints of {found[1].models} ({found[1].canonical}.N)")
        size = tensor.shape[0] // count
        for number, name in enumerate(found[0]):
            own = tensor.rows([(number * size, (number + 1) * size)])
            own = own.reshape(tuple(own.shape[1:])) if len(own.shape) == 3 else own
            tensors[name + claim.suffix.text] = own.transposed()
    return replace(source, tensors=tensors), read_keys(MLX, tensors)


def _meant(entry: Group, base: Architecture | None) -> Group:
    """The group under Hugging Face's name for its module; an embedding's as one."""
    name = canonical(entry.name)
    parts = base.components.values() if base is not None else ()
    spec = next((found for part in parts if (found := part.spec(name)) is not None), None)
    named = name.rpartition(".")[2] in EMBEDDINGS
    embedding = spec.kind == "embedding" if spec is not None else named
    if embedding and "magnitude" in entry.tensors:
        tensor = entry.tensors["magnitude"]
        raise errors.UnsupportedFormat(
            f"{tensor.where}: DoRA of an embedding: MLX-LM keeps a magnitude for each token, and no other format does; this "
            "version does not convert it"
        )
    options = {**entry.options, "kind": "embedding"} if embedding else entry.options
    if not embedding:
        options.pop("kind", None)
    return entry._replace(name=name, stated=entry.name if name != entry.name else "", options=options)


def _scale(config: MlxConfig, request: Request) -> tuple[float, Certainty, str] | None:
    """The scale, how it is known, and where it stands."""
    if "scale" in request.fields:
        return scale_given(request.fields["scale"])
    try:
        value = config.scale()
    except errors.Conflict as error:
        request.wrong(error)
        value = config.inner.get("scale")
    return (value, Certainty.READ, f"{config.where}: lora_parameters.scale") if value is not None else None


def _insist_on_rank(reading: Reading, source: Source, config: MlxConfig, request: Request) -> None:
    """Tell of tensors of another rank than the config's, which MLX-LM refuses to load."""
    rank = config.inner.get("rank")
    if rank is None or request.repair:
        return
    for claim in reading.claims:
        tensor = source.tensors[claim.key]
        if claim.suffix.role == "A" and len(tensor.shape) == 2 and tensor.shape[1] != rank:
            request.wrong(
                errors.Conflict(
                    f"{tensor.where}: shape {list(tensor.shape)} has rank {tensor.shape[1]}, but {config.where} says rank "
                    f"{rank}, and mlx-lm does not load it; --repair believes the tensors"
                ),
                (claim.key,),
            )
            return


def _insist_on_kind(updates: Iterable[Update], config: MlxConfig, request: Request) -> None:
    """Tell of magnitudes without DoRA, and of DoRA without magnitudes."""
    if "fine_tune_type" not in config.fields or request.repair:
        return
    odd = next((u for u in updates if ("magnitude" in u.tensors) != (config.kind == "dora")), None)
    if odd is not None:
        tensor = next(iter(odd.tensors.values()))
        has = "has a magnitude" if "magnitude" in odd.tensors else "has no magnitude (m)"
        request.wrong(
            errors.Conflict(
                f"{tensor.where}: {odd.module} {has}, but {config.where} says fine_tune_type {config.kind}; --repair believes "
                "the tensors"
            ),
            [t.key for t in odd.tensors.values()],
        )


def _as_before(update: Update, carried: Mapping[str, Any]) -> Update:
    """The update as it was before a conversion to MLX-LM's made all ranks and scales equal, where the header says so.

    What the header says is a stranger's word: only zeros are cut off, and only powers of two are moved.
    """
    rank, factor = carried.get("padded", {}).get(update.module), carried.get("stretched", {}).get(update.module)
    a, b = update.tensors["A"], update.tensors["B"]
    alpha = update.alpha
    if rank is not None and rank < b.shape[1] and _is_padding(a, b, rank):
        whole = b.shape[1]
        a, b = a.rows([(0, rank)]), columns(b, 0, rank)
        if alpha is not None and alpha.value is not None:
            alpha = replace(alpha, value=alpha.value / whole * rank)
    if factor and alpha is not None and alpha.value is not None and _is_power(factor) and _holds(b, 1 / factor):
        b, alpha = b.mapped(factor=1 / factor), replace(alpha, value=alpha.value * factor)
    return replace(update, tensors={**update.tensors, "A": a, "B": b}, alpha=alpha)


def _is_padding(a: LazyTensor, b: LazyTensor, rank: int) -> bool:
    """Whether the rows of A (r, in) and the columns of B (out, r) from `rank` on are zeros."""
    return is_zero(a.rows([(rank, a.shape[0])])) and is_zero(b.transposed().rows([(rank, b.shape[1])]))


def _is_power(factor: float) -> bool:
    """Whether a number is a power of two, and none beyond what any scales differ by."""
    return (
        isfinite(factor) and abs(frexp(factor)[0]) == 0.5 and 2.0**-_MOST_DOUBLED <= abs(factor) <= 2.0**_MOST_DOUBLED
    )


def _holds(b: LazyTensor, factor: float) -> bool:
    """Whether a tensor's type holds every number times a power of two: the smallest lose bits when they are halved."""
    if b.dtype not in ("F16", "BF16", "F32", "F64"):
        return False
    return same_bytes(b.mapped(factor=factor).mapped("F64"), b.mapped("F64", factor))


def _with_reason(update: Update, source: Source) -> Update:
    """The update; where its alpha is unknown, with the reason that holds here."""
    if update.alpha is None or update.alpha.value is not None:
        return update
    where = f"{source.config_path} says none" if source.config is not None else f"no {NAME} is beside them"
    reason = (
        f"MLX-LM stores no scale among the tensors, and {where}; --set scale=X says the scale of the training, which is alpha "
        "over rank (mlx-lm takes 20 where it is not told another)"
    )
    return replace(update, alpha=replace(update.alpha, source=reason))


def _common(config: MlxConfig, adapter: Adapter) -> dict[str, dict[str, Any]]:
    """What the config says that a PEFT config has fields for."""
    model, dropout = config.fields.get("model"), config.inner.get("dropout")
    out: dict[str, Any] = {}
    if isinstance(model, str) and model:
        out["base_model_name_or_path"] = model
    if dropout is not None:
        out["lora_dropout"] = dropout
    if any(spelled(u.module, "GPT2") != spelled(u.module, "other") for u in adapter):
        out["fan_in_fan_out"] = True  # transformers' GPT-2 stores its weights as (in, out)
    experts = {u.module for u in adapter if expert_of(u.module) is not None}
    stated = {(u.tensors["B"].shape[1], u.alpha.value) for u in adapter if u.alpha is not None}
    if experts and len(stated) == 1 and (rank_alpha := stated.pop())[1] is not None:
        # transformers 5 joins the experts, and peft finds those of an adapter that has them apart by a list of endings, not
        # by a pattern of full names (peft utils/transformers_weight_conversion.py).  Such a list needs the rest of a config.
        out["r"], out["lora_alpha"] = rank_alpha
        endings = {".".join(module.rsplit(".", 3)[1:]) for module in experts}
        out["target_modules"] = sorted({*(u.module for u in adapter if u.module not in experts), *endings})
    return {adapter.components[0]: out} if out and adapter.components else {}


def _about_embeddings(adapter: Adapter) -> list[str]:
    """A note where an embedding is adapted."""
    first = next((u for u in adapter if u.options.get("kind") == "embedding"), None)
    if first is None:
        return []
    return [
        f"{first.module} is adapted: where the output head is tied to it, mlx-lm applies the update there, too, and peft to "
        "the input alone"
    ]


# Writing


def _class(adapter: Adapter, target: Target) -> str:
    """The name of transformers' class of the base; GPT-2's where the adapter is for its kind of layer; "" if unknown."""
    part = target.architecture.components.get("model") if target.architecture is not None else None
    if part is not None:
        return part.class_name.rpartition(".")[2]
    return "GPT2" if adapter.config.get("model", {}).get("fan_in_fan_out") is True else ""


def _held(adapter: Adapter, target: Target) -> tuple[Adapter, list[str]]:
    """The updates that MLX-LM's layers can hold, and what is left out under `--allow-drop`.

    Raises `CannotRepresent`.
    """
    dora = Counter("magnitude" in u.tensors for u in adapter if u.method == "lora")
    out, dropped = [], []
    for update in adapter:
        why = _refusal(update, target) or (dora[True] and _without_magnitude(update)) or ""
        if not why:
            out.append(update)
            continue
        message = f"{next(iter(update.tensors.values())).where}: {why}"
        if not target.allow_drop:
            raise errors.CannotRepresent(message)
        dropped.append(message)
    return adapter.with_updates(out), dropped


def _without_magnitude(update: Update) -> str:
    if update.method != "lora" or "magnitude" in update.tensors:
        return ""
    return (
        f"{update.module} has no DoRA magnitude and other modules have one; MLX-LM adapts all of them with DoRA or none: "
        "split the adapter into two, or --to peft"
    )


def _refusal(update: Update, target: Target) -> str:
    """Why MLX-LM has no layer for an update; "" where it has one, or the table says it."""
    if update.method == "lora_parameters":
        return (
            f"{update.module} is a parameter of experts as transformers 5 joins them, gate and up in one, and MLX-LM has a "
            "layer for each projection; --to peft holds it"
        )
    if update.method != "lora":
        return ""
    odd = next((t for t in update.tensors.values() if t.dtype not in _DTYPES), None)
    if odd is not None:
        return f"{odd.key!r} is {odd.dtype}, which MLX does not load as floats; give --dtype float32"
    wide = next((t for t in update.tensors.values() if len(t.shape) > 2), None)
    if wide is not None:
        return f"{wide.key!r} {list(wide.shape)} has a kernel, and MLX-LM adapts no convolutions; --to peft holds it"
    if "magnitude" in update.tensors and update.options.get("kind") == "embedding":
        return (
            f"{update.module} has a DoRA magnitude for each dimension of the embedding, and MLX-LM one for each token; --to "
            "peft holds it"
        )
    if "magnitude" in update.tensors and expert_of(update.module) is not None:
        return (
            f"{update.module} is an expert with a DoRA magnitude, and MLX-LM has no DoRA of experts; --to peft holds it"
        )
    part = target.architecture.components.get(update.component) if target.architecture is not None else None
    spec = part.spec(update.module) if part is not None else None
    if part is None or spec is None:
        return ""
    if spec.tied_to:
        return f"{update.module} shares the weight of {spec.tied_to} in this base, and MLX-LM's model has no such module then"
    if any(other.tied_to == update.module for other in part.modules.values()):
        return (
            f"the output head of this base is tied to {update.module}, and MLX-LM would apply the update there, too; --to "
            "peft holds it"
        )
    return ""


class _Even(NamedTuple):
    """An adapter at one rank and one scale, and what was done to which module: `padded` has the ranks that were smaller,
    `stretched` what B was multiplied by."""

    adapter: Adapter
    rank: int
    scale: float
    padded: Mapping[str, int]
    stretched: Mapping[str, float]

    @classmethod
    def of(cls, adapter: Adapter) -> _Even:
        """The adapter at the largest of its ranks and the commonest of its scales.

        Raises `CannotRepresent` where that would round a factor.
        """
        made = uniform(list(adapter), "one scale for all modules", rslora=False)
        padded, stretched = {}, {}
        for update in adapter:
            own = METHODS["lora"].scale(update) if update.method == "lora" else None
            if own is None:
                continue
            b, factor = update.tensors["B"], own / made.scale if made.scale else 1.0
            if b.shape[1] < made.rank:
                padded[update.module] = b.shape[1]
            if isclose(factor, 1.0, rel_tol=1e-12):
                continue
            if factor and not _is_power(factor):
                raise errors.CannotRepresent(
                    f"{b.where}: the scale of {update.module} is {own:g} and that of others {made.scale:g}; MLX-LM has one for "
                    "all modules, and the quotient is no power of two, by which a factor could be multiplied without rounding: "
                    "--fold-alpha bakes every scale into the factors"
                )
            if factor and not _holds(b, factor):
                raise errors.CannotRepresent(
                    f"{b.where}: the scale of {update.module} is {own:g} and that of others {made.scale:g}; MLX-LM has one for "
                    f"all modules, and some numbers times {factor:g} are none of {b.dtype}: --dtype float32 holds them, and "
                    "--fold-alpha bakes every scale into the factors"
                )
            stretched[update.module] = factor
        return cls(adapter.with_updates(made.updates), made.rank, made.scale, padded, stretched)

    def notes(self) -> list[str]:
        """What was done."""
        out = []
        if self.padded:
            out.append(
                f"{len(self.padded)} modules of a smaller rank are padded with zeros to rank {self.rank}, since MLX-LM has one "
                "rank for all; their deltas stay the same"
            )
        doubled = sum(1 for factor in self.stretched.values() if factor)
        if doubled:
            out.append(
                f"the scales differ, and MLX-LM has one for all: {self.scale:g} is written, and lora_b of "
                f"{doubled} modules is multiplied by a power of two, which rounds nothing"
            )
        if idle := len(self.stretched) - doubled:
            out.append(
                f"{idle} modules have scale 0, and MLX-LM has one scale, {self.scale:g}, for all: their lora_b is zeros"
            )
        return out

    def recorded(self, adapter: Adapter) -> Adapter:
        """The adapter with what was done in what its header carries."""
        own = {"padded": dict(self.padded), "stretched": {m: f for m, f in self.stretched.items() if f}}
        carried = adapter.provenance.carried
        spelling = {**carried.spelling, MLX.name: {name: table for name, table in own.items() if table}}
        return replace(adapter, provenance=replace(adapter.provenance, carried=carried._replace(spelling=spelling)))


def _restacked(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors with the factors of experts in stacks, one for each layer and projection; absent experts get zeros.

    Raises `CannotRepresent` where the factors of a layer's experts differ in shape or dtype.
    """
    out: dict[str, LazyTensor] = {}
    stacks: dict[str, dict[int, LazyTensor]] = {}
    for key, tensor in tensors.items():
        name, _, role = key.rpartition(".")
        expert = expert_of(name)
        if expert is None:
            out[key] = tensor
        else:
            stacks.setdefault(f"{expert[0]}.{role}", {})[expert[1]] = tensor.transposed()
    for key, own in stacks.items():
        first = next(iter(own.values()))
        if max(own) >= _MOST_EXPERTS:
            raise errors.CannotRepresent(f"{first.where}: a layer of {max(own) + 1} experts is more than any model has")
        odd = next((t for t in own.values() if (t.shape, t.dtype) != (first.shape, first.dtype)), None)
        if odd is not None:
            raise errors.CannotRepresent(
                f"{odd.where}: {odd.dtype} {list(odd.shape)}, but {first.key!r} is {first.dtype} {list(first.shape)}, and "
                "MLX-LM keeps all experts of a layer in one tensor; --to peft holds them"
            )
        parts = [own.get(number) or zeros(first, first.shape) for number in range(max(own) + 1)]
        out[key] = stack([part.reshape((1, *part.shape)) for part in parts])
    return out


FORMAT = Mlx()
