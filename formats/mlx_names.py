"""What MLX-LM's model classes call the modules of Hugging Face's.

Most classes keep the names of the published checkpoints.  Where one has others, its `sanitize` renames the checkpoint's
weights, and the rows here say the same, for both ways.  So are experts: Hugging Face's checkpoints keep a module for each,
MLX-LM one `SwitchLinear` for all of them, whose factors are stacks:

    lora_a (E, rank, in), lora_b (E, out, rank): each expert's own A and B
    lora_a (E · rank, in), lora_b (E, out, rank): the same, by releases before October 2025

Sources: ml-explore/mlx-lm `mlx_lm/models/*.py` (`sanitize`, `layers`), `mlx_lm/tuner/lora.py` (`LoRASwitchLinear`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from adapterops.plugin import errors

EMBEDDINGS = frozenset(
    {"embed_tokens", "embed_tokens_per_layer", "embed_in", "wte", "wpe", "word_embeddings", "tok_embeddings"}
    | {"token_embeddings", "embeddings"}
)
"""The names that MLX-LM's classes give to embeddings, and to nothing else."""
LAYERS = frozenset(
    {"model.layers", "model.h", "transformer.h", "transformer.layers", "transformer.blocks", "backbone.layers"}
    | {"model.transformer.blocks", "language_model.model.layers"}
)
"""The lists that a class may have as its `layers`: what `num_layers` counts."""
_NUMBERED = re.compile(r"^(?P<stem>.*?)\.(?P<number>\d{1,6})\.(?P<rest>.+)$")


class Beginning(NamedTuple):
    """Names that begin otherwise in MLX-LM, where they end as listed ("" for all of them).

    `classes` are how the names of transformers' classes begin, where others have modules of the same names.
    """

    canonical: str
    spelled: str
    ends: tuple[str, ...]
    classes: tuple[str, ...] = ()


_DECODER = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "qkv", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "gate_up", "down")),
)
_GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
BEGINNINGS = (
    # GPT-BigCode's modules are named alike, and MLX-LM keeps the names of those.
    Beginning("transformer.h.", "model.h.", _GPT2, ("GPT2",)),
    Beginning("h.", "model.h.", _GPT2, ("GPT2",)),
    Beginning("transformer.wte", "model.wte", ("",), ("GPT2",)),
    Beginning("transformer.wpe", "model.wpe", ("",), ("GPT2",)),
    Beginning("gpt_neox.layers.", "model.h.", ("attention.query_key_value", "attention.dense")),
    Beginning("gpt_neox.layers.", "model.h.", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    Beginning("gpt_neox.embed_in", "model.embed_in", ("",)),
    Beginning("embed_out", "model.embed_out", ("",)),
    # Models without a head, as transformers' LlamaModel: MLX-LM's classes have one.
    Beginning("model.", "model.", ("",)),
    Beginning("layers.", "model.layers.", _DECODER),
    Beginning("embed_tokens", "model.embed_tokens", ("",)),
)


def canonical(name: str) -> str:
    """Hugging Face's name of a module of MLX-LM's."""
    row = next((r for r in BEGINNINGS if name.startswith(r.spelled) and name.endswith(r.ends)), None)
    return row.canonical + name[len(row.spelled) :] if row is not None else name


def spelled(name: str, class_name: str) -> str | None:
    """MLX-LM's name of a module, in a model of transformers' class ("" where that is not known).

    None where the class decides and is not known.
    """
    for row in BEGINNINGS:
        if not name.startswith(row.canonical) or not name.endswith(row.ends):
            continue
        if row.classes and not class_name:
            return None
        if not row.classes or class_name.startswith(row.classes):
            return row.spelled + name[len(row.canonical) :]
    return name


class Experts(NamedTuple):
    """How one family names the experts of a layer, and their projections."""

    spelled: str
    canonical: str
    projections: Mapping[str, str]
    """MLX-LM's names to the checkpoint's."""
    models: str


EXPERTS = (
    Experts(
        "block_sparse_moe.switch_mlp",
        "block_sparse_moe.experts",
        {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        "Mixtral, PhiMoE, MiniMax",
    ),
    Experts(
        "mlp.switch_mlp",
        "mlp.experts",
        {name: name for name in ("gate_proj", "down_proj", "up_proj")},
        "Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek, GLM-4-MoE",
    ),
)


def expert_names(name: str, count: int) -> tuple[list[str], Experts] | None:
    """The checkpoint's names of the modules that a layer of `count` experts is, and the row that says so."""
    for row in EXPERTS:
        for projection, own in row.projections.items():
            end = f"{row.spelled}.{projection}"
            if name == end or name.endswith("." + end):
                start = name[: len(name) - len(end)]
                return [f"{start}{row.canonical}.{number}.{own}" for number in range(count)], row
    return None


def expert_of(name: str) -> tuple[str, int] | None:
    """The layer of experts that MLX-LM has for a module, and the expert's number; None for other modules."""
    for row in EXPERTS:
        for projection, own in row.projections.items():
            match = re.fullmatch(rf"(?P<start>(?:.*\.)?){re.escape(row.canonical)}\.(?P<number>\d{{1,6}})\.{own}", name)
            if match is not None:
                return f"{match['start']}{row.spelled}.{projection}", int(match["number"])
    return None


class Chosen(NamedTuple):
    """Which modules a config names: those that end so in each of the last `count` layers, or anywhere, by full names."""

    num_layers: int
    keys: list[str]
    counted: bool
    """Whether the number of the base's layers was known, or did not matter."""


def choose(names: Iterable[str], layers: int | None) -> Chosen:
    """The `num_layers` and `keys` by which MLX-LM adapts exactly these modules of a base with so many layers.

    It adapts what `keys` names inside the last `num_layers` layers, and then what it names in the whole model
    (`mlx_lm/tuner/utils.py`, `linear_to_lora_layers`): so a module that not all of those layers have adapted, or that stands
    in none, is listed by its full name.  -1 means all layers.
    """
    numbers: dict[str, set[int]] = {}
    stems: dict[str, None] = {}
    names = list(names)
    for name in names:
        match = _NUMBERED.match(name)
        if match is not None and match["stem"] in LAYERS:
            numbers.setdefault(match["rest"], set()).add(int(match["number"]))
            stems[match["stem"]] = None
    if len(stems) != 1 or not numbers:
        return Chosen(-1, names, True)
    last = layers if layers is not None else 1 + max(max(own) for own in numbers.values())
    # Where the number of layers is not known, only all of them are sure to be the last ones.
    firsts = [min(own) for own in numbers.values() if _fills(own, min(own), last)]
    firsts = [first for first in firsts if layers is not None or first == 0]
    if not firsts:
        return Chosen(-1, names, layers is not None)
    first = max(sorted(set(firsts)), key=firsts.count)
    shared = [rest for rest, own in numbers.items() if min(own) == first and _fills(own, first, last)]
    stem = next(iter(stems))
    covered = {f"{stem}.{number}.{rest}" for rest in shared for number in range(first, last)}
    return Chosen(
        last - first if layers is not None else -1, [*shared, *(name for name in names if name not in covered)], True
    )


def _fills(own: set[int], first: int, last: int) -> bool:
    """Whether numbers, none of them below `first`, are all those up to `last`, that one aside."""
    return len(own) == last - first and max(own) < last


def covers(names: Iterable[str], num_layers: int, keys: Iterable[str] | None) -> bool:
    """Whether a config with these fields adapts all of these modules (and perhaps others)."""
    listed = None if keys is None else set(keys)
    parts = [(name, _NUMBERED.match(name)) for name in names]
    last = max((int(match["number"]) for _, match in parts if match is not None), default=-1)
    for name, match in parts:
        if listed is not None and name in listed:
            continue
        if match is None or match["stem"] not in LAYERS or 0 < num_layers <= last - int(match["number"]):
            return False
        if listed is not None and match["rest"] not in listed:
            return False
    return True


def layer_count(names: Iterable[str], stems: Iterable[str]) -> int | None:
    """How many layers a base has in the list that these names begin with."""
    wanted = set(stems)
    matches = (match for name in names if (match := _NUMBERED.match(name)) is not None)
    return max((1 + int(match["number"]) for match in matches if match["stem"] in wanted), default=None)


def stem_of(name: str) -> str:
    """The list of layers that a module stands in; "" where it stands in none."""
    match = _NUMBERED.match(name)
    return match["stem"] if match is not None else ""


def refuse_stack(where: str, shape: tuple[int, ...]) -> errors.UnsupportedFormat:
    """The error for a layer of experts that no row names."""
    known = "; ".join(f"{row.spelled} ({row.models})" for row in EXPERTS)
    return errors.UnsupportedFormat(
        f"{where}: shape {list(shape)} is a factor of a layer of experts, and how Hugging Face's checkpoint names these is "
        f"known for {known} only"
    )
