"""What llama.cpp makes of the base models that it runs: a row for each class, for LoRA's sake.

A row lists the modules on which llama.cpp applies an adapter (its graph multiplies with them through `build_lora_mm`, or
`build_lora_mm_id` for experts, or looks tokens up in them); it accepts pairs on others, and never looks at them.  How they
are called in GGUF says the gguf package (`get_tensor_name_map`); which rows of a weight stand elsewhere, and which experts are
taken apart, says the row, with the class of llama.cpp's converter that it follows.

Sources: https://github.com/ggml-org/llama.cpp `conversion/*.py` (`modify_tensors`), `src/llama-graph.cpp`
(`build_lora_mm`, `build_lora_mm_id`, `build_inp_embd`), `src/llama-adapter.cpp`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from adapterops.plugin import Component, errors
from adapterops.plugin import gguf_package as package

Order = Sequence[int]
"""For each row of the weight in GGUF: which row of transformers' weight it is."""


class Heads(NamedTuple):
    """The heads of an attention: of the queries, and of the keys and values."""

    queries: int
    keys: int


def rope(rows: int, heads: int) -> Order:
    """The rows of each head, halves turned into pairs: (heads, 2, d/2) to (heads, d/2, 2).

    llama.cpp rotates neighbouring numbers where transformers rotates those of two halves (`LlamaModel.permute`).

    Raises `ValueError` for rows that are no heads of an even size.
    """
    if heads < 1 or rows % (2 * heads):
        raise ValueError(f"{rows} rows are no {heads} heads of an even size")
    half = rows // heads // 2
    return [h * 2 * half + part * half + at for h in range(heads) for at in range(half) for part in range(2)]


def queries(rows: int, heads: Heads) -> Order:
    """`rope` of the queries' rows."""
    return rope(rows, heads.queries)


def keys(rows: int, heads: Heads) -> Order:
    """`rope` of the keys' rows."""
    return rope(rows, heads.keys)


def grouped(rows: int, heads: Heads) -> Order:
    """Falcon's fused projection, (groups, queries of a group + key + value, d), as all queries, all keys, all values.

    Raises `ValueError` for rows that are no such groups.
    """
    count, groups = heads
    if groups < 1 or count % groups or rows % (count + 2 * groups):
        raise ValueError(f"{rows} rows are no {count} heads in {groups} groups")
    size, each = rows // (count + 2 * groups), count // groups + 2
    parts = (range(each - 2), (each - 2,), (each - 1,))
    return [
        (g * each + member) * size + at
        for members in parts
        for g in range(groups)
        for member in members
        for at in range(size)
    ]


@dataclass(frozen=True, eq=False)
class Row:
    """A class of base models.

    `name` is `general.architecture`; `classes` are transformers', with what the names of theirs begin with in the place of
    `begin`; `modules` are transformers' names of what an adapter may act on, `{}` standing for the layer; `follows` the class
    of llama.cpp.  `orders` says which modules' rows stand in another order, by the ends of their names; `experts` which
    parameters hold experts, and the names of the stacks that they are taken apart into, rows in their order.
    `strip` is what the converter takes from names before it looks them up.
    """

    name: str
    classes: Mapping[str, str]
    begin: str
    modules: tuple[str, ...]
    follows: str
    orders: Mapping[str, Any] = field(default_factory=dict)
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    strip: str = ""

    def order(self, module: str) -> Any:
        """How the rows of a module are ordered; None where they stand as they are."""
        return next((order for end, order in self.orders.items() if module.endswith(end)), None)


_LAYER = "model.layers.{}."
_ATTENTION = tuple(f"{_LAYER}self_attn.{name}_proj" for name in "qkvo")
_MLP = tuple(f"{_LAYER}mlp.{name}_proj" for name in ("gate", "up", "down"))
_ENDS = ("model.embed_tokens", "lm_head")
_LLAMA = (*_ENDS, *_ATTENTION, *_MLP)
_HEADLESS = (_ENDS[0], *_ATTENTION, *_MLP)  # the converter leaves the output's weight out: it is the embedding's
_SHARED = tuple(f"{_LAYER}mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down"))
_ROUTER = f"{_LAYER}mlp.gate"
_ROPE = {".self_attn.q_proj": queries, ".self_attn.k_proj": keys}
_EXPERTS = {
    "mlp.experts.gate_up_proj": ("mlp.experts.gate_proj", "mlp.experts.up_proj"),
    "mlp.experts.down_proj": ("mlp.experts.down_proj",),
}
_FALCON = tuple(
    f"transformer.h.{{}}.{name}"
    for name in ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
)


def _as(name: str) -> dict[str, str]:
    """A language model, and the same without a head."""
    return {f"{name}ForCausalLM": "model.", f"{name}Model": ""}


ROWS = (
    Row("llama", _as("Llama"), "model.", _LLAMA, "LlamaModel", _ROPE),
    Row("llama", {"MistralForCausalLM": "model."}, "model.", _LLAMA, "LlamaModel", _ROPE),
    Row(
        "llama",
        {"MixtralForCausalLM": "model."},
        "model.",
        (*_ENDS, *_ATTENTION, _ROUTER),
        "LlamaModel",
        _ROPE,
        _EXPERTS,
    ),
    Row("qwen2", _as("Qwen2"), "model.", _LLAMA, "Qwen2Model"),
    Row(
        "qwen2moe",
        {"Qwen2MoeForCausalLM": "model."},
        "model.",
        (*_ENDS, *_ATTENTION, _ROUTER, *_SHARED),
        "Qwen2MoeModel",
        experts=_EXPERTS,
    ),
    Row("qwen3", _as("Qwen3"), "model.", _LLAMA, "Qwen3Model"),
    Row(
        "qwen3moe",
        {"Qwen3MoeForCausalLM": "model."},
        "model.",
        (*_ENDS, *_ATTENTION, _ROUTER),
        "Qwen3MoeModel",
        experts=_EXPERTS,
    ),
    Row("gemma", {"GemmaForCausalLM": "model."}, "model.", _HEADLESS, "GemmaModel"),
    Row("gemma2", {"Gemma2ForCausalLM": "model."}, "model.", _HEADLESS, "Gemma2Model"),
    Row(
        "gemma3",
        {"Gemma3ForCausalLM": "model.", "Gemma3ForConditionalGeneration": "model.language_model."},
        "model.",
        _HEADLESS,
        "Gemma3Model",
    ),
    Row(
        "phi3",
        {"Phi3ForCausalLM": "model."},
        "model.",
        (
            *_ENDS,
            *(
                f"{_LAYER}{name}"
                for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
            ),
        ),
        "Phi3MiniModel",
    ),
    Row(
        "gpt2",
        {"GPT2LMHeadModel": "transformer."},
        "transformer.",
        (
            "transformer.wte",
            "lm_head",
            *(f"transformer.h.{{}}.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
        ),
        "GPT2Model",
    ),
    Row(
        "falcon",
        {"FalconForCausalLM": "transformer."},
        "transformer.",
        ("transformer.word_embeddings", "lm_head", *_FALCON),
        "FalconModel",
        {".query_key_value": grouped},
    ),
    Row(
        "bloom",
        {"BloomForCausalLM": "transformer.", "BloomModel": ""},
        "transformer.",
        ("transformer.word_embeddings", "lm_head", *_FALCON),
        "BloomModel",
        # (heads, 3, d) to (3, heads, d): Falcon's order with one query a key.
        {".query_key_value": grouped},
        strip="transformer.",
    ),
)
"""A file names the architecture, not the class: of several with one name, the first whose names a file has is meant."""


def of_class(component: Component | None) -> Row | None:
    """The row of a base model's class; None where there is none."""
    name = component.class_name.rpartition(".")[2] if component is not None else ""
    return next((row for row in ROWS if name in row.classes), None)


def of_file(architecture: str) -> list[Row]:
    """The rows that a file may be of."""
    return [row for row in ROWS if row.name == architecture]


def known() -> str:
    """The classes, for messages."""
    return ", ".join(name for row in ROWS for name in row.classes)


_NUMBER = re.compile(r"(?<=\.)\d{1,6}(?=\.)")


def pattern(name: str) -> tuple[str, str]:
    """A name with `{}` in the place of its layer's number, and that number ("" without one)."""
    found = _NUMBER.search(name)
    return (name, "") if found is None else (f"{name[: found.start()]}{{}}{name[found.end() :]}", found[0])


@cache
def names(row: Row) -> Mapping[str, str]:
    """transformers' name to GGUF's for all that an adapter may act on, `{}` standing for the layer."""
    gguf = package()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == row.name)
    spelled = gguf.get_tensor_name_map(architecture, 1)
    stacks = [f"{_LAYER}{stack}" for parts in row.experts.values() for stack in parts]
    out = {}
    for module in (*row.modules, *stacks):
        name = spelled.get_name(module.format(0).removeprefix(row.strip))
        assert name is not None, f"the gguf package has no name for {module} of {row.name}"
        out[module] = pattern(name)[0] if "{}" in module else name
    return out


def heads_of(row: Row, component: Component) -> Heads | None:
    """The heads of a base model, by its config and its shapes; None where the config does not say how many there are.

    A config may leave out what its class's default is, so the groups are told by the rows of the keys.
    """
    if not row.orders:
        return None
    config = component.config.get("text_config", component.config)
    count = None
    for name in ("num_attention_heads", "n_head"):
        value = config.get(name) if isinstance(config, Mapping) else None
        count = value if count is None and type(value) is int and value > 0 else count
    if count is None:
        return None
    rows = {
        end: next((spec.shape for name, spec in component.modules.items() if name.endswith(end)), None)
        for end in row.orders
    }
    if ".query_key_value" in rows:
        shape = rows[".query_key_value"]
        size = shape[1] // count if shape is not None else 0
        return Heads(count, (shape[0] // size - count) // 2) if shape is not None and size else None
    query, key = (rows[end] for end in _ROPE)
    size = query[0] // count if query is not None else 0
    return Heads(count, key[0] // size) if key is not None and size else None


def begins(row: Row, class_name: str) -> str:
    """What the names of a class begin with in the place of `row.begin`."""
    return row.classes.get(class_name, row.begin)


def as_row(row: Row, class_name: str, module: str) -> str:
    """A module of the base as the row calls it."""
    own = begins(row, class_name)
    if own == row.begin or not module.startswith(own) or (module in row.modules and not own):
        return module
    return row.begin + module.removeprefix(own)


def as_base(row: Row, class_name: str, module: str) -> str:
    """What the row calls a module, as the base does."""
    own = begins(row, class_name)
    return own + module.removeprefix(row.begin) if module.startswith(row.begin) else module


def insist_known(architecture: str, path: str) -> list[Row]:
    """The rows of an architecture.  Raises `UnsupportedFormat` where there is none."""
    rows = of_file(architecture)
    if not rows:
        every = ", ".join(dict.fromkeys(row.name for row in ROWS))
        raise errors.UnsupportedFormat(
            f"{path}: is an adapter for llama.cpp's architecture {architecture!r}; how its weights are laid out is known for "
            f"{every}"
        )
    return rows
