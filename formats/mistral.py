"""LoRA in the names of Mistral's own programs: mistral-finetune's `lora.safetensors`, which mistral-inference loads.

    layers.0.attention.wq.lora_A.weight                (r, in_features); wk, wv, wo
    layers.0.attention.wq.lora_B.weight                (out_features, r)
    layers.0.feed_forward.w1.lora_A.weight             gate_proj; w2 down_proj, w3 up_proj
    layers.0.feed_forward.experts.0.w1.lora_A.weight   of Mixtral's experts

There is no alpha: the product is multiplied by `scaling`, which stands in `params.json` beside the file as
`{"lora": {"rank": 64, "scaling": 2.0}}`; alpha is scaling · r.  mistral-inference reads no file for it and applies 2 unless its
caller says otherwise.

Mistral's programs rotate neighbouring numbers of a head where transformers rotates those of its two halves, so the rows of wq
and wk stand in another order.  `n_heads`, `n_kv_heads` and `head_dim` of `params.json`, or `--base CONFIG`, say the heads, and
the rows of `lora_B` are put in transformers' order exactly.

Sources: mistralai/mistral-finetune `model/lora.py`, `model/args.py`, `finetune/checkpointing.py` (`retrieve_save_states`,
`write_params_info`); mistralai/mistral-inference `src/mistral_inference/lora.py` (`load_lora`), `rope.py`
(`apply_rotary_emb`); transformers `models/mistral/convert_mistral_weights_to_hf.py` (`permute_for_rope`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from adapterops_formats.torch_native import Heads, ReadOnly, decoder, family, halved, heads, of_unknown_order

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Certainty,
    Dialect,
    Group,
    Place,
    Reading,
    Request,
    ScaleRule,
    Source,
    Suffix,
    errors,
    is_number,
    read_by_table,
    read_json,
)

_KNOWN = ("mistral", "mixtral")
_PARAMS = "params.json"
_ROTATED = (".self_attn.q_proj", ".self_attn.k_proj")
_ATTENTION = re.compile(r"layers\.\d+\.attention\.w[qkvo]\.lora_[AB]\.weight$")
_EXPERTS = ".block_sparse_moe.experts."
MISTRAL = Dialect(
    name="mistral",
    format="mistral",
    title="mistral-finetune",
    places=(
        Place(
            "model",
            "layers.",
            tuple(Suffix(f".lora_{role}.weight", "lora", role) for role in "AB"),
            tails=(
                *((f".self_attn.{part}_proj", f".attention.w{part}") for part in "qkvo"),
                (".mlp.gate_proj", ".feed_forward.w1"),
                (".mlp.down_proj", ".feed_forward.w2"),
                (".mlp.up_proj", ".feed_forward.w3"),
                *((f".w{at}", f".w{at}") for at in (1, 2, 3)),
            ),
            sure=True,
        ),
    ),
    alpha=AlphaIn.CONFIG,
    convention="unknown",
    exact_shapes=True,
    written=False,
    example="layers.0.attention.wq.lora_A.weight",
)


class Mistral(ReadOnly):
    """The files of mistral-finetune."""

    name = "mistral"
    title = "mistral-finetune (lora.safetensors)"
    limits = ("It is read and not written yet; --to peft holds it.",)
    dialects = (MISTRAL,)
    file_name = "lora.safetensors"
    why_not_written = "mistral-inference knows one scale for all modules and its own order of rows; --to peft holds it"

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        """Files with attention's matrices, all of which mistral-finetune adapts: others' models call a feed-forward's the same
        (Z-Image, Lumina 2).  None of a folder with peft's config, which says that the names are the model's own."""
        own = not source.config_path and any(map(_ATTENTION.match, source.tensors))
        return super().recognise(source, dialects) if own else []

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        said, where = _params(source)
        scaling, own = _scaling(said, where), _heads(said, where)

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            if scaling is None:
                return ScaleRule(absent=f"its {_PARAMS} beside would say it, and mistral-inference applies 2 · rank")
            return ScaleRule(scaling * rank, certainty=Certainty.READ, source=f"{where}: lora.scaling")

        def settle(groups: list[Group]) -> list[Group]:
            return [_settled(entry, own, where, request) for entry in groups]

        return read_by_table(reading, source, request, rule, component_of=settle)


def _params(source: Source) -> tuple[Mapping[str, Any], str]:
    """What `params.json` beside the weights says, and where that is.  Raises `UnreadableFile` for one that is none."""
    with source.settings(_PARAMS) as found:
        return (read_json(found[0]), found[1]) if found is not None else ({}, "")


def _scaling(said: Mapping[str, Any], where: str) -> float | None:
    """What the product is multiplied by; None where `params.json` does not say it.

    Raises `UnreadableFile` for what is no number.
    """
    lora = said.get("lora")
    value = lora.get("scaling") if isinstance(lora, dict) else None
    if value is not None and not is_number(value):
        raise errors.UnreadableFile(f"{where}: lora.scaling is {value!r:.60}, not a number", fault="config-type")
    return None if value is None else float(value)


def _heads(said: Mapping[str, Any], where: str) -> Heads | None:
    """The heads that `params.json` says; None where it leaves one out.  Raises `UnreadableFile` for no counts."""
    names = ("n_heads", "n_kv_heads", "head_dim")
    values = [said.get(name) for name in names]
    if any(value is None for value in values):
        return None
    counts = [value for value in values if type(value) is int and value > 0]
    if len(counts) != len(names):
        raise errors.UnreadableFile(
            f"{where}: {', '.join(names)} are {values!r:.60}, not three counts", fault="config-type"
        )
    return Heads(*counts)


def _settled(entry: Group, own: Heads | None, where: str, request: Request) -> Group:
    """The group under transformers' names, with its rows in transformers' order; told of, where they cannot be."""
    entry = entry._replace(name=f"model.layers.{entry.name.replace('.feed_forward.experts.', _EXPERTS)}")
    component = decoder(request)
    try:
        of = own
        if component is not None:
            family(component, _KNOWN, "Mistral's code")
            of = heads(component)
            if own is not None and own != of:
                raise errors.Conflict(
                    f"{where}: {own.queries} heads of {own.size} and {own.keys} of keys, but --base has {of.queries} of "
                    f"{of.size} and {of.keys}; is it the right --base?"
                )
        tensor = entry.tensors.get("B")
        if tensor is None or not entry.name.endswith(_ROTATED):
            return entry
        if of is None:
            if request.tell is not None:
                return entry
            why = f"the order of the rows of {entry.name} depends on the model's heads, which its {_PARAMS} beside would say"
            return entry._replace(tensors={**entry.tensors, "B": of_unknown_order(tensor, why)})
        count = of.queries if entry.name.endswith(_ROTATED[0]) else of.keys
        turned = halved(tensor, of.size, entry.name, count, where if component is None else "--base")
        return entry._replace(tensors={**entry.tensors, "B": turned})
    except errors.AdapterOpsError as error:
        request.wrong(error, (tensor.key for tensor in entry.tensors.values()))
        return entry


FORMAT = Mistral()
