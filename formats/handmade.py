"""LoRA that people write themselves, as books and tutorials teach it: raw pairs, in a module of the model or around it.

    trf_blocks.0.att.W_query.lora.A           (in_features, r)     x @ A @ B
    trf_blocks.0.att.W_query.lora.B           (r, out_features)
    trf_blocks.0.att.W_query.linear.weight    the layer itself, where the whole model was saved
    layers.0.attn.q.parametrizations.weight.0.lora_A    (r, in_features), a parametrization of the weight: W + B @ A

No reader but the code that wrote them knows these keys, so this format is tried last, when no other reads a file, and is
never written.  Which way round the factors stand is in their shapes: the dimension that they share is the rank.  Where a
layer has as many inputs as outputs they share two, and the smaller one is the rank, as everywhere; the adapter says which
way round it was read.

The segment that the pair stands in (`lora`, `lora_layer`, `parametrizations.weight.0`) is taken out of the module's name,
so is the one that the layer itself was put under (`linear`, `original` …).  There is no alpha: some multiply by alpha,
others by alpha / r, so that `--set scale=X` or `--alpha X` has to say it.

mlx-vlm's own layers were such pairs until May 2026 (`language_model.model.layers.0.self_attn.q_proj.A`, x·A·B), beside an
`adapter_config.json` of `rank`, `alpha` and `dropout`; what that alpha means changed in April 2026, so it is asked about, too.

Sources: rasbt/LLMs-from-scratch `appendix-E/01_main-chapter-code/appendix-E.ipynb` (`LoRALayer`, `LinearWithLoRA`);
cccntu/minLoRA `minlora/model.py` (`LoRAParametrization`); hkproj/pytorch-lora `lora.ipynb`; pytorch/torchtune docs
`tutorials/lora_finetune.rst` (`LoRALinear`, whose names people copy into their own models); Blaizzy/mlx-vlm
`mlx_vlm/trainer/lora.py` (`LoRaLayer`, commit 6b0ad8f of 2026-04-18), `mlx_vlm/trainer/utils.py` (`save_adapter`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from adapterops_formats.mlx_config import alpha_of, scale_given
from adapterops_formats.pairs import shapes, stand
from adapterops_formats.torch_native import ReadOnly

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Dialect,
    Group,
    Place,
    Reading,
    Request,
    ScaleRule,
    Source,
    Suffix,
    Update,
    component_by_names,
    errors,
    read_by_table,
)

_PAIRS = (
    (".lora.A", ".lora.B"),
    (".lora_layer.A", ".lora_layer.B"),
    (".lora.lora_A", ".lora.lora_B"),
    (".lora.lora_a", ".lora.lora_b"),
    (".lora.lora_A.weight", ".lora.lora_B.weight"),
    (".lora.lora_a.weight", ".lora.lora_b.weight"),
    (".lora.A.weight", ".lora.B.weight"),
    (".parametrizations.weight.0.lora_A", ".parametrizations.weight.0.lora_B"),
    (".lora_a.weight", ".lora_b.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A", ".lora_B"),
    (".lora_a", ".lora_b"),
    (".A", ".B"),
)
"""How the factors' keys end."""
_UNSURE = (".A", ".B")
"""Of these the endings that other things have too (a state space's matrices): pairs where nothing else is in the file."""
_ORIGINAL = ".parametrizations.weight.original"
"""Where torch keeps a weight that has a parametrization."""
_INSIDE = frozenset({"linear", "original", "original_layer", "orig", "base", "base_layer", "layer", "weight"})
"""What the layer itself is called inside of what was put around it."""


def _dialect(name: str, title: str, turned: bool) -> Dialect:
    pairs = ((role, text) for pair in _PAIRS for role, text in zip("AB", pair, strict=True))
    # A layer's own weight stands one way.
    factors = (
        Suffix(t, "lora", role, transposed=turned) for role, t in pairs if not (turned and t.endswith(".weight"))
    )
    suffixes = (*factors, Suffix(_ORIGINAL, "saved", "weight"))
    return Dialect(
        name=name,
        format="handmade",
        title=title,
        places=(Place("*", "", suffixes, saved=True, sure=True),),
        alpha=AlphaIn.NOWHERE,
        convention="unknown",
        last=True,
        written=False,
        example="trf_blocks.0.att.W_query.lora.A",
    )


STRAIGHT = _dialect("handmade-straight", "LoRA of one's own (A, B as in W + B·A)", turned=False)
TURNED = _dialect("handmade-turned", "LoRA of one's own (A, B as in x·A·B)", turned=True)


class Handmade(ReadOnly):
    """Pairs under names of one's own."""

    name = "handmade"
    title = "LoRA of one's own making (from scratch)"
    limits = ("It is read and not written: the code that wrote such a file is the only one that reads it.",)
    dialects = (STRAIGHT, TURNED)
    file_name = "lora.safetensors"
    own_fields: ClassVar[frozenset[str]] = frozenset({"scale"})
    why_not_written = "the code that wrote such a file is the only one that reads it; --to peft holds it"

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        if source.config is not None and not _is_mlx_vlm(source.config):
            return []
        found = []
        for reading in super().recognise(source, dialects):
            how = stand(shapes(reading, source))
            if (how.turned if reading.dialect is TURNED else how.straight) and _is_sure(reading):
                found.append(reading)
        if len(found) > 1:
            first = found[0].claims[0]
            raise errors.AmbiguousFormat(
                f"{source.path}: tensor {first.key!r} {list(source.tensors[first.key].shape)}: the factors have as many rows as "
                f"columns, so that nothing says which way round they stand; say --from {STRAIGHT.name} for W + B·A, or --from "
                f"{TURNED.name} for x·A·B"
            )
        return found

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        scale = scale_given(request.fields["scale"]) if "scale" in request.fields else None

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            if scale is None:
                return ScaleRule()
            value, certainty, where = scale
            return ScaleRule(alpha_of(value, rank), certainty=certainty, source=where)

        def settle(groups: list[Group]) -> list[Group]:
            groups = list(_within(groups))
            component = component_by_names(groups, request.architecture) or "model"
            place = replace(reading.dialect.places[0], component=component)
            return [entry._replace(place=place) for entry in groups]

        def refine(updates: list[Update]) -> list[Update]:
            return [_with_reason(update, source) for update in updates]

        asked = replace(request, alpha=None) if scale is not None else request
        adapter = read_by_table(reading, source, asked, rule, refine, settle)
        notes = [*adapter.provenance.notes, *_said(adapter, reading, source)]
        return replace(adapter, provenance=replace(adapter.provenance, notes=tuple(notes)))


def _is_mlx_vlm(config: Mapping[str, Any]) -> bool:
    """Whether a config is mlx-vlm's for its own layers, of before May 2026: of `rank`, `alpha` and `dropout`."""
    return {"rank", "alpha"} <= config.keys() <= {"rank", "alpha", "dropout"}


def _is_sure(reading: Reading) -> bool:
    """Whether the file is pairs and a model's own parameters, and nothing else but pairs where these end as other things do.

    What no factor's module has of what is not understood is the model's too, under a name of its own.
    """
    factors = [claim for claim in reading.claims if claim.suffix.role in ("A", "B")]
    names = {claim.name for claim in factors}
    for key in reading.unclaimed:
        parts = key.split(".")
        if len(parts) < 2 or any(".".join(parts[:n]) in names for n in range(1, len(parts))):
            return False  # it may say a scale, or be a part of an update
    alone = len(factors) == len(reading.claims) and not reading.unclaimed
    return alone or not any(c.suffix.text in _UNSURE for c in factors)


def _within(groups: list[Group]) -> Iterator[Group]:
    """The groups, with the layers' own parameters under the names of what was put around them."""
    factors = {entry.name for entry in groups if entry.method != "saved"}
    for entry in groups:
        name, dot, inner = entry.name.rpartition(".")
        if entry.method == "saved" and dot and name in factors and inner not in _INSIDE:
            tensor = next(iter(entry.tensors.values()))
            raise errors.UnsupportedFormat(
                f"{tensor.where}: stands beside the factors of {name} and may be a part of what they do (a magnitude, a gate); "
                "nobody's format has it, so it cannot be read"
            )
        if entry.method != "saved":
            yield entry
        elif entry.name in factors or (dot and name in factors and inner in _INSIDE):
            yield entry._replace(
                name=entry.name if entry.name in factors else name, options={**entry.options, "kind": "wrapped"}
            )
        else:
            yield entry


def _with_reason(update: Update, source: Source) -> Update:
    """The update; where its alpha is unknown, with the reason that holds here."""
    if update.alpha is None or update.alpha.value is not None:
        return update
    reason = (
        "no tensor of a LoRA of one's own says it, and some multiply by alpha, others by alpha / r: --set scale=X says what the "
        "product of the factors was multiplied by"
    )
    rank, alpha = ((source.config or {}).get(name) for name in ("rank", "alpha"))
    if isinstance(rank, int) and isinstance(alpha, (int, float)) and rank > 0:
        reason = (
            f"{source.config_path} says alpha {alpha:g} and rank {rank}: mlx-vlm before 0.5 (April 2026) multiplied by alpha, "
            f"{alpha:g}, and since then by alpha / rank, {alpha / rank:g}: --set scale=X says which of them it was trained with"
        )
    return replace(update, alpha=replace(update.alpha, source=reason))


def _said(adapter: Adapter, reading: Reading, source: Source) -> list[str]:
    sides = (
        ("in_features, r", "r, out_features") if reading.dialect is TURNED else ("r, in_features", "out_features, r")
    )
    how = stand(shapes(reading, source))
    said = [f"A is read as ({sides[0]}), B as ({sides[1]})"]
    if how.square:
        said = [
            f"{said[0]}: every module has as many inputs as outputs, so the smaller dimension is taken for the rank"
        ]
    if any(u.alpha is not None and u.alpha.value is None for u in adapter):
        said.append(
            "unknown: scale, which no tensor holds; --set scale=X says it (or --alpha X, where it was divided by the rank)"
        )
    return said


FORMAT = Handmade()
