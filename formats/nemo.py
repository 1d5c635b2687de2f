"""LoRA of NeMo 2 and Megatron-Bridge in Megatron's own names, as a state dict of whole tensors.

    decoder.layers.0.self_attention.linear_proj.adapter.linear_in.weight   (r, in_features)
    decoder.layers.0.self_attention.linear_proj.adapter.linear_out.weight  (out_features, r)
    decoder.layers.0.self_attention.linear_qkv.adapter.…                   q, k and v in one
    decoder.layers.0.mlp.linear_fc1.adapter.…                              gate and up in one
    decoder.layers.0.self_attention.linear_qkv.adapter.adapter_q.…         "canonical" LoRA: each by itself

The scale is alpha/r; alpha stands in the training's config and has to be said.

Megatron keeps the rows of q, k and v by groups of heads: for each head of the keys its queries, then the key, then the value.
`--base CONFIG` says the heads; the rows of `linear_out` (and of `weight_magnitude`, DoRA's) are taken apart exactly, and the
parts share `linear_in`.  `linear_fc1` is gate above up.  A checkpoint in pieces, as several devices save it (`torch_dist`),
is not read: gather it first, or export it with Megatron-Bridge.

Sources: https://github.com/NVIDIA-NeMo/Megatron-Bridge `src/megatron/bridge/models/conversion/peft_bridge.py`
(`MEGATRON_TO_HF_LORA_SUFFIX`, `ADAPTER_NAME_MAP`), `models/conversion/param_mapping.py` (`split_qkv_weights`,
`GatedMLPMapping`), `models/llama/llama_bridge.py`, `models/mistral/mistral_bridge.py`, `models/qwen/qwen2_bridge.py`,
`models/qwen/qwen3_bridge.py`, `models/gemma/gemma_bridge.py`, `models/gemma/gemma2_bridge.py` (`mapping_registry`),
`peft/lora_layers.py` (scale), `peft/dora_layers.py`, `peft/canonical_lora.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from adapterops_formats.torch_native import Heads, ReadOnly, decoder, family, heads, of_transformers, rows_of, taken

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Component,
    Dialect,
    Group,
    LazyTensor,
    Place,
    Reading,
    Request,
    Source,
    Suffix,
    errors,
    read_by_table,
)

_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
_QKV, _FC1 = ".self_attn.qkv", ".mlp.gate_up"
"""Names of ours for what Megatron has in one: they are taken apart before anything is looked up."""
_ROWS = ("B", "magnitude")


def _suffixes(between: str) -> tuple[Suffix, ...]:
    return (
        Suffix(f"{between}.linear_in.weight", "lora", "A"),
        Suffix(f"{between}.linear_out.weight", "lora", "B"),
        Suffix(f"{between}.weight_magnitude", "lora", "magnitude"),
    )


_WHOLE = (
    (".self_attn.o_proj", ".self_attention.linear_proj"),
    (".mlp.down_proj", ".mlp.linear_fc2"),
    (_QKV, ".self_attention.linear_qkv"),
    (_FC1, ".mlp.linear_fc1"),
)
_PARTS = (
    *((f".self_attn.{x}_proj", f".self_attention.linear_qkv.adapter.adapter_{x}") for x in "qkv"),
    *((f".mlp.{x}_proj", f".mlp.linear_fc1.adapter.adapter_{x}") for x in ("gate", "up")),
)
NEMO = Dialect(
    name="nemo",
    format="nemo",
    title="NeMo and Megatron-Bridge",
    places=(
        Place("model", "decoder.", _suffixes(".adapter"), tails=_WHOLE, sure=True),
        Place("model", "decoder.", _suffixes(""), tails=_PARTS, sure=True),
        Place("model", "", _suffixes(".adapter"), tails=(("lm_head", "output_layer"),), sure=True),
    ),
    alpha=AlphaIn.NOWHERE,
    convention="unknown",
    vectors=True,
    exact_shapes=True,
    written=False,
    example="decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight",
)


def qkv_rows(of: Heads) -> dict[str, list[tuple[int, int]]]:
    """Where the rows of q, k and v stand in Megatron's one weight (out_features, …), in transformers' order."""
    each, size = of.queries // of.keys, of.size
    step = (each + 2) * size
    starts = range(0, of.keys * step, step)
    return {
        "q": [(start, start + each * size) for start in starts],
        "k": [(start + each * size, start + (each + 1) * size) for start in starts],
        "v": [(start + (each + 1) * size, start + step) for start in starts],
    }


class Nemo(ReadOnly):
    """Megatron's names for LoRA."""

    name = "nemo"
    title = "NeMo and Megatron-Bridge (linear_in, linear_out)"
    limits = ("It is read and not written: the program loads checkpoints in pieces (`torch_dist`).",)
    dialects = (NEMO,)
    file_name = "adapter.safetensors"
    why_not_written = "NeMo and Megatron load adapters from checkpoints in pieces of their own; --to peft holds it"
    variants: ClassVar = {"decoder.": ("module.decoder.", "module.module.decoder.", "model.decoder.")}
    foreign: ClassVar = {
        r"\.experts\..*\.adapter\.": "is of experts, whose layout in Megatron depends on the devices; "
        "this version does not convert it",
        r"\.adapter_layer\.": "is NeMo 1's spelling (adapter_layer); this version does not convert it",
        r"\.(in_proj|linear_q_(down|up)_proj|linear_kv_(down|up)_proj|router)\.adapter\.": "is of a module that this "
        "version does not convert (a state space, latent attention or a router)",
    }

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        def settle(groups: list[Group]) -> list[Group]:
            return [part for entry in groups for part in self._settled(of_transformers(entry), request)]

        return read_by_table(reading, source, request, component_of=settle)

    def _settled(self, entry: Group, request: Request) -> list[Group]:
        """The group, or its parts; told of, where they cannot be had."""
        component = decoder(request)
        try:
            if component is not None:
                family(component, _KNOWN, self.title)
            return list(_parts(entry, component))
        except errors.AdapterOpsError as error:
            request.wrong(error, (tensor.key for tensor in entry.tensors.values()))
            return []


def _parts(entry: Group, component: Component | None) -> Iterator[Group]:
    for end, names in ((_QKV, "q, k and v"), (_FC1, "gate and up")):
        if not entry.name.endswith(end):
            continue
        if component is None:
            tensors = {role: _unknown(t, names) if role in _ROWS else t for role, t in entry.tensors.items()}
            yield entry._replace(tensors=tensors)
            return
        stem = entry.name.removesuffix(end)
        split = _attention(component, stem) if end == _QKV else _gated(component, stem)
        rows = sum(high - low for pieces in split.values() for low, high in pieces)
        for module, pieces in split.items():
            yield entry._replace(name=module, tensors=_rows_of(entry, pieces, rows, module))
        return
    yield entry


def _unknown(tensor: LazyTensor, names: str) -> LazyTensor:
    from adapterops_formats.gguf_rows import of_unknown_rows

    return of_unknown_rows(
        tensor,
        f"{tensor.where}: Megatron keeps {names} in one weight, whose rows depend on the model and its heads; give the base's "
        "config with --base CONFIG",
    )


def _rows_of(entry: Group, pieces: list[tuple[int, int]], rows: int, module: str) -> dict[str, LazyTensor]:
    what = f"what holds {module}"
    return {role: taken(t, pieces, rows, what) if role in _ROWS else t for role, t in entry.tensors.items()}


def _attention(component: Component, stem: str) -> dict[str, list[tuple[int, int]]]:
    return {f"{stem}.self_attn.{x}_proj": pieces for x, pieces in qkv_rows(heads(component)).items()}


def _gated(component: Component, stem: str) -> dict[str, list[tuple[int, int]]]:
    size = rows_of(component, ".mlp.gate_proj")
    if not size:
        raise errors.UnknownFact(f"the base ({component.class_name}) has no gate_proj; is it the right --base?")
    return {f"{stem}.mlp.gate_proj": [(0, size)], f"{stem}.mlp.up_proj": [(size, 2 * size)]}


FORMAT = Nemo()
