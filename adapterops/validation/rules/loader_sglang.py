"""What SGLang makes of PEFT folders, as of sglang 0.5.23."""

from __future__ import annotations

import re
from itertools import chain

from adapterops.validation.rules.loader_facts import Effect, Fact, fact, first_key
from adapterops.validation.rules.peft_folders import (
    TIED_WEIGHTS,
    flagged,
    foreign,
    lora_config,
    magnitudes,
    other_tensors,
    other_type,
    positive,
    scaled_apart,
)
from adapterops.validation.subject import Subject

_FOUND = re.compile(r"layers\.\d+\.|embed_tokens|lm_head")
_PACKED = re.compile(r"^(?:(.*)\.)?([qkv]_proj)$")
_SHORTHANDS = ("all", "all-linear")


def _pattern(subject: Subject) -> list[str]:
    """`target_modules` that is text other than the two words that SGLang knows."""
    targets = lora_config(subject).get("target_modules")
    return [targets] if isinstance(targets, str) and targets not in _SHORTHANDS else []


def _other_ranks(subject: Subject) -> list[str]:
    rank = positive(lora_config(subject).get("r"))
    if rank is None:
        return []
    pairs = [u for u in subject.updates if u.method == "lora" and "A" in u.tensors]
    return [first_key(update) for update in pairs if update.tensors["A"].shape[0] != rank]


def _apart(subject: Subject) -> list[str]:
    """Modules that SGLang does not look for."""
    if not lora_config(subject):
        return []
    apart = (u for u in subject.updates if u.method == "lora" and not _FOUND.search(u.module))
    return [tensor.key for update in apart for tensor in update.tensors.values()]


def _half_packed(subject: Subject) -> list[str]:
    """Parts of attentions whose q_proj or v_proj has no factors."""
    if not lora_config(subject):
        return []
    parts: dict[str, dict[str, str]] = {}
    for update in subject.updates:
        match = _PACKED.match(update.module) if update.method == "lora" else None
        if match is not None and _FOUND.search(update.module):
            parts.setdefault(match[1] or "", {})[match[2]] = first_key(update)
    return list(chain.from_iterable(p.values() for p in parts.values() if not {"q_proj", "v_proj"} <= p.keys()))


_CONFIG = "sglang srt/lora/lora_config.py (LoRAConfig)"
_LORA = "sglang srt/lora/lora.py (LoRAAdapter)"
_FOR = "Run adapterops convert FOLDER --to peft --for sglang"

FACTS: tuple[Fact, ...] = (
    fact(
        "L558",
        "sglang",
        "not-a-peft-folder",
        Effect.REFUSES,
        foreign,
        "SGLang reads peft's folders only; this has other names ({keys})",
        why="SGLang knows no other spelling than peft's.",
        remedy="Run adapterops convert FILE --to peft --for sglang.",
        fires="adapters.safetensors with layers.0.self_attn.q_proj.lora_a",
        passes="a folder of adapter_config.json and adapter_model.safetensors",
        source=_LORA,
    ),
    fact(
        "L559",
        "sglang",
        "other-method",
        Effect.REFUSES,
        other_type,
        "SGLang reads LoRA only, not peft_type {keys}",
        why="SGLang has no other method than LoRA.",
        remedy="Run adapterops to-lora FOLDER --energy 0.99, which makes a plain LoRA of it.",
        fires='"peft_type": "LOHA"',
        passes='"peft_type": "LORA"',
        source=_LORA,
        field="peft_type",
    ),
    fact(
        "L564",
        "sglang",
        "dora",
        Effect.REFUSES,
        lambda s: flagged("use_dora", s) or magnitudes(s),
        'SGLang refuses DoRA ({keys}): "LoRA serving currently doesn\'t support DoRA adapters"',
        why="SGLang refuses every adapter whose config has use_dora, and takes a magnitude for a factor without.",
        remedy="Merge the adapter into the base (peft: merge_and_unload) and serve the result, or train without DoRA.",
        fires='"use_dora": true',
        passes='"use_dora": false',
        source="sglang srt/lora/lora_manager.py (LoRAManager.validate_new_adapter)",
        field="use_dora",
    ),
    fact(
        "L565",
        "sglang",
        "target-pattern",
        Effect.REFUSES,
        _pattern,
        "SGLang refuses target_modules that is a pattern ({keys}): \"Only 'all' or 'all-linear' can be used as the string\"",
        why="SGLang reads target_modules as a list of names, or as one of two words, and knows no regular expression.",
        remedy=f"{_FOR}, which lists the modules.",
        fires='"target_modules": ".*self_attn.(q_proj|v_proj)"',
        passes='"target_modules": ["q_proj", "v_proj"]',
        source="sglang srt/lora/utils.py (get_normalized_target_modules)",
        field="target_modules",
    ),
    fact(
        "L566",
        "sglang",
        "scales",
        Effect.MISREADS,
        lambda s: scaled_apart(s, rslora=False),
        "SGLang applies lora_alpha/r of the config to all modules, {n module} of another scale ({keys}) included",
        why="SGLang reads r and lora_alpha and ignores use_rslora, rank_pattern and alpha_pattern.",
        remedy=f"{_FOR}, which gives all modules one scale and the same deltas.",
        fires='"use_rslora": true, or "alpha_pattern": {"q_proj": 32} beside "lora_alpha": 16',
        passes='"use_rslora": false, "alpha_pattern": {}',
        source=f"{_LORA}: scaling",
    ),
    fact(
        "L567",
        "sglang",
        "ranks",
        Effect.REFUSES,
        _other_ranks,
        'SGLang takes factors of the rank r of the config alone, and stops at {n module} of another ({keys}): "LoRA buffer '
        'shape … does not match weight shape"',
        why="SGLang ignores rank_pattern and copies every factor into a buffer of r rows.",
        remedy=f"{_FOR}, which fills smaller ranks up with zeros.",
        fires='"rank_pattern": {"q_proj": 2} beside "r": 4',
        passes='"rank_pattern": {}',
        source="sglang srt/lora/mem_pool.py (LoRAMemoryPool.load_lora_weight_to_buffer)",
    ),
    fact(
        "L568",
        "sglang",
        "attention-parts",
        Effect.REFUSES,
        _half_packed,
        "SGLang joins q_proj, k_proj and v_proj, and fails where q_proj or v_proj has no factors beside {n other} ({keys})",
        why="SGLang looks for q_proj's and v_proj's factors wherever one of the three has some; only k_proj may be absent.",
        remedy=f"{_FOR} --base CONFIG, which lets zeros stand for the absent ones.",
        fires='"target_modules": ["q_proj"]',
        passes='"target_modules": ["q_proj", "v_proj"]',
        source=f"{_LORA}: normalize_qkv_proj",
    ),
    fact(
        "L569",
        "sglang",
        "left-out",
        Effect.DROPS,
        lambda s: [*_apart(s), *(key for key in other_tensors(s) if not key.endswith(TIED_WEIGHTS))],
        "SGLang applies factors in layers.N, embed_tokens and lm_head only, and not {n tensor} besides ({keys})",
        why="SGLang looks for modules by these names; heads, embeddings and biases that are saved whole do not reach the model.",
        remedy="Train without modules_to_save and with bias none, or merge the adapter into the base and serve the result.",
        fires="base_model.model.score.weight",
        passes="base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        source=f"{_LORA}: _process_weight",
    ),
)
