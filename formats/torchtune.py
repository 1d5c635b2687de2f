"""torchtune's adapters in its own names: `adapter_model.pt`, or `adapter_N.pt` of earlier releases.

    layers.0.attn.q_proj.lora_a.weight  (r, in_features)
    layers.0.attn.q_proj.lora_b.weight  (out_features, r)
    layers.0.attn.q_proj.magnitude      (out_features,), of DoRA

The scale is alpha/r; alpha stands in the recipe (`lora_alpha`) and in an `adapter_config.json` beside, and has to be said.

Of Llama, Mistral and Gemma torchtune keeps q's and k's rows in the order of its rotary embedding: the two halves of a head
alternate.  `--base CONFIG` says the heads, and the rows of `lora_b` (and of magnitudes) are put back exactly.  Qwen's stay.

torchtune writes a PEFT folder beside, by `tune_to_peft_adapter_weights`.  That reorders q and k of every model, of Qwen2 and
Qwen3 too, whose weights it did not reorder, and leaves DoRA's magnitudes in its own order; there the `.pt` is right.

Sources: https://github.com/pytorch/torchtune `torchtune/models/convert_weights.py` (`_FROM_HF`, `hf_to_tune`,
`tune_to_peft_adapter_weights`), `models/gemma2/_convert_weights.py`, `models/qwen2/_convert_weights.py`,
`models/qwen3/_convert_weights.py`, `modules/peft/lora.py`, `modules/peft/dora.py`,
`training/checkpointing/_checkpointer.py` (`FullModelHFCheckpointer`: which model is converted how).
"""

from __future__ import annotations

from typing import ClassVar

from adapterops_formats.torch_native import ReadOnly, decoder, family, halved, heads, of_transformers, of_unknown_order

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Dialect,
    Group,
    Place,
    Reading,
    Request,
    Source,
    Suffix,
    errors,
    read_by_table,
)

_TURNED = frozenset({"llama", "mistral", "gemma", "gemma2"})
"""Models whose q and k torchtune reorders for its rotary embedding."""
_AS_THEY_ARE = frozenset({"qwen2", "qwen3"})
_ROTATED = {".self_attn.q_proj": "queries", ".self_attn.k_proj": "keys"}

TORCHTUNE = Dialect(
    name="torchtune",
    format="torchtune",
    title="torchtune",
    places=(
        Place(
            "model",
            "",
            (
                Suffix(".lora_a.weight", "lora", "A"),
                Suffix(".lora_b.weight", "lora", "B"),
                Suffix(".magnitude", "lora", "magnitude"),
            ),
            tails=(
                (".self_attn.q_proj", ".attn.q_proj"),
                (".self_attn.k_proj", ".attn.k_proj"),
                (".self_attn.v_proj", ".attn.v_proj"),
                (".self_attn.o_proj", ".attn.output_proj"),
                (".mlp.gate_proj", ".mlp.w1"),
                (".mlp.down_proj", ".mlp.w2"),
                (".mlp.up_proj", ".mlp.w3"),
                ("lm_head", "output"),
            ),
            sure=True,
        ),
    ),
    alpha=AlphaIn.NOWHERE,
    convention="unknown",
    vectors=True,
    exact_shapes=True,
    written=False,
    example="layers.0.attn.q_proj.lora_a.weight",
)


class Torchtune(ReadOnly):
    """torchtune's state dicts."""

    name = "torchtune"
    title = "torchtune (adapter_model.pt, native names)"
    limits = ("It is read and not written: the program loads pickles.",)
    dialects = (TORCHTUNE,)
    file_name = "adapter_model.safetensors"
    why_not_written = "torchtune loads adapters from its own .pt files, which are pickles; --to peft holds it"
    foreign: ClassVar = {
        r"\.(fusion_layer|layer)\.attn\..*\.lora_[ab]\.weight$": "is of torchtune's Llama 3.2 Vision or another fused model; "
        "this version does not convert it",
    }

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        def settle(groups: list[Group]) -> list[Group]:
            return [self._settled(of_transformers(entry), request) for entry in groups]

        return read_by_table(reading, source, request, component_of=settle)

    def _settled(self, entry: Group, request: Request) -> Group:
        """The group with its rows in transformers' order; told of, where they cannot be."""
        which = next((which for end, which in _ROTATED.items() if entry.name.endswith(end)), None)
        component = decoder(request)
        try:
            if component is None:
                why = (
                    f"torchtune keeps the rows of {entry.name} in an order that depends on the model and its heads, and nothing "
                    "in the file says them"
                )
                tensors = {r: of_unknown_order(t, why) if which and r != "A" else t for r, t in entry.tensors.items()}
                return entry if request.tell is not None else entry._replace(tensors=tensors)
            kind = family(component, [*_TURNED, *_AS_THEY_ARE], "torchtune")
            if which is None or kind in _AS_THEY_ARE:
                return entry
            size = heads(component).size
            turned = {r: t if r == "A" else halved(t, size, entry.name) for r, t in entry.tensors.items()}
            return entry._replace(tensors=turned)
        except errors.AdapterOpsError as error:
            request.wrong(error, (tensor.key for tensor in entry.tensors.values()))
            return entry


FORMAT = Torchtune()
