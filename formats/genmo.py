"""genmo: what the trainer of Mochi 1's authors saves.

    blocks.0.attn.qkv_x.lora_A      (r, in_features)
    blocks.0.attn.qkv_x.lora_B      (out_features, r)

Queries, keys and values of a block are in one layer, and its four layers of attention are all that can have factors.  Ranks
and alphas stand in the header's entry `kwargs`, one of each for what leads into the attention and for what leads out of it; the
scale is alpha/r.  Comfy reads such a file, too, and applies scale 1 (`comfy/lora.py`, `model_lora_keys_unet`;
`comfy/weight_adapter/lora.py`).  A `.pt` that the pipeline loads holds the same entry beside the state dict; those
that the trainer saves so have none, and `--alpha` says it.

Source: genmoai/mochi `demos/fine_tuner/train.py`, `src/genmo/mochi_preview/pipelines.py` (`DitModelFactory`),
`dit/joint_model/lora.py`, `dit/joint_model/asymm_models_joint.py` (`AsymmetricAttention`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from adapterops.plugin import (
    METHODS,
    Adapter,
    AlphaIn,
    Certainty,
    Dialect,
    Format,
    Output,
    OutputFile,
    Place,
    Reading,
    Request,
    ScaleRule,
    Source,
    Suffix,
    Target,
    errors,
    header,
    is_number,
    read_by_table,
)

ENTRY = "kwargs"
"""The header's entry: what the model is built with besides its sizes."""
_LAYERS = (".attn.qkv_x", ".attn.qkv_y", ".attn.proj_x", ".attn.proj_y")
GENMO = Dialect(
    name="genmo",
    format="genmo",
    title="genmo (Mochi 1's own trainer)",
    places=(
        Place(
            "transformer",
            "",
            (Suffix(".lora_A", "lora", "A"), Suffix(".lora_B", "lora", "B")),
            names="original",
            tails=tuple((layer, layer) for layer in _LAYERS),
            only=frozenset({"mochi"}),
        ),
    ),
    alpha=AlphaIn.CONFIG,
    convention="unknown",
    exact_shapes=True,
    example="blocks.0.attn.qkv_x.lora_A",
)


class Genmo(Format):
    """genmo's state dict."""

    name = "genmo"
    title = "genmo (Mochi 1's own trainer)"
    limits = (
        "Other modules than the attention's; other methods than LoRA; several ranks or scales among what leads into the "
        "attention, or out of it.",
    )
    dialects = (GENMO,)
    file_name = "model.lora.safetensors"

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        said = _said(source)

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            stem = _stem(module)
            if stem + "rank" in said and said[stem + "rank"] != rank:
                request.wrong(
                    errors.Conflict(
                        f"{source.path}: {stem}rank in the header's entry {ENTRY} is {said[stem + 'rank']}, and the factors of "
                        f"{module} have rank {rank}"
                    )
                )
            where = f"{source.path}: {stem}alpha in the header's entry {ENTRY}"
            return ScaleRule(said.get(stem + "alpha"), certainty=Certainty.READ, source=where)

        adapter = read_by_table(reading, source, request, rule)
        # Ranks and alphas are those of what is written.
        return replace(adapter, metadata={k: v for k, v in adapter.metadata.items() if k != ENTRY})

    def write(self, adapter: Adapter, target: Target) -> Output:
        spelled = self.spell(adapter, target)
        metadata = header(spelled.adapter) | {ENTRY: _entry(spelled.adapter)}
        file = OutputFile("", spelled.tensors, metadata)
        return Output((file,), tuple(spelled.kept), tuple(spelled.dropped), tuple(spelled.notes))


def _stem(module: str) -> str:
    """How the header begins what it says of a layer: queries, keys and values are in one."""
    return "qkv_proj_lora_" if module.endswith("qkv") else "out_proj_lora_"


def _said(source: Source) -> Mapping[str, float]:
    """The numbers of the entry, in the header or beside a checkpoint's state dict.

    Raises `InvalidHeader` for an entry that is no table, or has something else there.
    """
    try:
        value = json.loads(source.metadata[ENTRY]) if ENTRY in source.metadata else source.beside.get(ENTRY, {})
    except (ValueError, RecursionError) as error:
        raise errors.InvalidHeader(f"{source.path}: the header's entry {ENTRY} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise errors.InvalidHeader(f"{source.path}: the header's entry {ENTRY} is not a table")
    said = {name: own for name, own in value.items() if name.endswith(("_lora_rank", "_lora_alpha"))}
    for name, own in said.items():
        if not is_number(own):
            raise errors.InvalidHeader(
                f"{source.path}: {name} in the header's entry {ENTRY} is {own!r:.60}, not a number"
            )
    return said


def _entry(adapter: Adapter) -> str:
    """What the model is to be built with, as JSON.

    Raises `CannotRepresent` where the layers that share a number need several, `UnknownFact` for an unknown alpha.
    """
    values: dict[str, float] = {}
    for update in adapter:
        scale, rank = METHODS["lora"].scale(update), METHODS["lora"].rank(update) or 0
        if scale is None:
            raise errors.UnknownFact(f"{update.name}: its alpha is not known; say it with --alpha")
        for name, own in (("rank", rank), ("alpha", scale * rank)):
            key = _stem(update.module) + name
            if values.setdefault(key, own) != own:
                raise errors.CannotRepresent(
                    f"{update.name}: has {name} {own:g}, and others that share {key} have {values[key]:g}; genmo's model is "
                    "built with one: adapterops to-lora --rank R gives all modules one rank, and --fold-alpha one scale"
                )
    return json.dumps({name: int(own) if own == int(own) else own for name, own in sorted(values.items())})


FORMAT = Genmo()
