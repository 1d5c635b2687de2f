"""What peft, vLLM, mlx-lm and llama.cpp make of adapters.  Rows about peft have been tried with peft 0.21.2."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from adapterops.validation.rules.loader_facts import (
    Effect,
    Fact,
    ending,
    fact,
    first_key,
    peft_config,
    same,
    scale,
)
from adapterops.validation.rules.peft_folders import (
    TIED_WEIGHTS,
    flagged,
    foreign,
    is_mlx,
    lora_config,
    magnitudes,
    other_tensors,
    other_type,
    positive,
    ranks,
    saved_modules,
    scaled_apart,
)
from adapterops.validation.subject import Subject

_MLX_FILE = "adapters.safetensors"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_VLLM_DEFAULT, _VLLM_MOST = 16, 512
_LONGEST = 1_000_000


def _not_mlx(subject: Subject) -> list[str]:
    return list(subject.tensors) if subject.recognised is not None and not is_mlx(subject) else []


def _bone(subject: Subject) -> list[str]:
    return ["BONE"] if peft_config(subject).get("peft_type") == "BONE" else []


def _vllm_others(subject: Subject) -> list[str]:
    # Where modules_to_save has names, vLLM stops at the config already.
    saved = set(saved_modules(subject))
    return [key for key in other_tensors(subject) if not key.endswith(TIED_WEIGHTS) and not saved & set(key.split("."))]


def _gguf_norm(key: str) -> bool:
    return "_layernorm" in key or ".norm" in key


def _gguf_others(subject: Subject) -> list[str]:
    return [key for key in other_tensors(subject) if not key.endswith(".base_layer.weight") and not _gguf_norm(key)]


def _gguf_norms(subject: Subject) -> list[str]:
    """Whole norms, which a converter passes on and the program skips."""
    if subject.dialect == "gguf":
        return ending(subject, "_norm.weight")
    return [key for key in other_tensors(subject) if not key.endswith(".base_layer.weight") and _gguf_norm(key)]


def _gguf_heads(subject: Subject) -> list[str]:
    if not lora_config(subject):
        return []
    return [first_key(u) for u in subject.updates if u.method == "lora" and u.module.rpartition(".")[2] == "lm_head"]


def _rank_to_name(subject: Subject) -> list[str]:
    largest = max(ranks(subject), default=0) if lora_config(subject) else 0
    return [str(largest)] if _VLLM_DEFAULT < largest <= _VLLM_MOST else []


def _rank_too_large(subject: Subject) -> list[str]:
    largest = max(ranks(subject), default=0) if lora_config(subject) else 0
    return [str(largest)] if largest > _VLLM_MOST else []


def _gguf_scales(subject: Subject) -> list[str]:
    """Modules whose alpha is not the config's (llama.cpp divides it by each module's own rank)."""
    config = lora_config(subject)
    alpha = positive(config.get("lora_alpha"))
    if alpha is None or config.get("use_rslora"):
        return []
    known = [(u, s) for u in subject.updates if (s := scale(u)) is not None and "A" in u.tensors]
    return [first_key(update) for update, own in known if not same(own, alpha / update.tensors["A"].shape[0])]


def _targets_parameters(subject: Subject) -> list[str]:
    listed = lora_config(subject).get("target_parameters")
    return [str(name) for name in listed] if isinstance(listed, list) else []


def _mlx_config(subject: Subject) -> dict[str, Any] | None:
    text = subject.text(os.path.basename(subject.config_path)) if is_mlx(subject) else None
    if text is None or len(text) > _LONGEST:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _mlx_name(subject: Subject) -> list[str]:
    return [os.path.basename(subject.weights)] if is_mlx(subject) and _MLX_FILE not in subject.files else []


def _mlx_fields(subject: Subject) -> list[str]:
    if not is_mlx(subject) or subject.is_folder:
        return []
    config = _mlx_config(subject)
    if config is None:
        return ["adapter_config.json"]
    inner = config.get("lora_parameters")
    missing = [] if "num_layers" in config else ["num_layers"]
    if not isinstance(inner, dict):
        return [*missing, "lora_parameters"]
    return missing + [f"lora_parameters.{name}" for name in ("rank", "scale", "dropout") if name not in inner]


def _mlx_layers(subject: Subject) -> list[str]:
    config = _mlx_config(subject)
    count = config.get("num_layers") if config is not None else None
    if not isinstance(count, int) or count <= 0:
        return []
    layers = {key: int(match.group(1)[:9]) for key in subject.tensors if (match := _LAYER.search(key))}
    kept = sorted(set(layers.values()))[-count:]
    return [key for key, layer in layers.items() if layer not in kept]


_VLLM = "vllm lora/peft_helper.py (PEFTHelper)"
_VLLM_MODEL = "vllm lora/lora_model.py (LoRAModel.from_local_checkpoint)"
_MLX_LOAD = "mlx-lm mlx_lm/tuner/utils.py (load_adapters)"
_GGUF = "llama.cpp convert_lora_to_gguf.py"

FACTS: tuple[Fact, ...] = (
    fact(
        "L501",
        "peft",
        "not-a-peft-folder",
        Effect.REFUSES,
        foreign,
        "peft reads folders of adapter_config.json and adapter_model.safetensors; this has other names ({keys})",
        why="peft cannot load other spellings than its own.",
        remedy="Run adapterops convert FILE --to peft.",
        fires="style.safetensors with lora_unet_….lora_down.weight",
        passes="a folder of adapter_config.json and adapter_model.safetensors",
        source="peft 0.21 peft_model.py (PeftModel.from_pretrained)",
    ),
    fact(
        "L502",
        "peft",
        "bone",
        Effect.REFUSES,
        _bone,
        "peft no longer has peft_type BONE and fails with a KeyError",
        why="Bone was taken out of peft in favour of MiSS.",
        remedy="Run adapterops convert FOLDER --to peft, which writes the same as MiSS.",
        fires='"peft_type": "BONE"',
        passes='"peft_type": "MISS"',
        source="peft 0.21 mapping.py (PEFT_TYPE_TO_CONFIG_MAPPING); peft#3051",
        field="peft_type",
    ),
    fact(
        "L545",
        "vllm",
        "not-a-peft-folder",
        Effect.REFUSES,
        foreign,
        "vLLM reads peft's folders only; this has other names ({keys})",
        why="vLLM knows no other spelling than peft's.",
        remedy="Run adapterops convert FILE --to peft.",
        fires="adapters.safetensors with layers.0.self_attn.q_proj.lora_a",
        passes="a folder of adapter_config.json and adapter_model.safetensors",
        source=_VLLM_MODEL,
    ),
    fact(
        "L547",
        "vllm",
        "other-method",
        Effect.REFUSES,
        other_type,
        "vLLM reads LoRA only, not peft_type {keys}",
        why="vLLM has no other method than LoRA.",
        remedy="Run adapterops to-lora FOLDER --energy 0.99, which makes a plain LoRA of it.",
        fires='"peft_type": "LOHA"',
        passes='"peft_type": "LORA"',
        source=_VLLM_MODEL,
        field="peft_type",
    ),
    fact(
        "L548",
        "vllm",
        "dora",
        Effect.REFUSES,
        lambda s: flagged("use_dora", s) or magnitudes(s),
        'vLLM refuses DoRA ({keys}): "vLLM does not yet support DoRA", or "DoRA adapter loading is not implemented yet"',
        why="vLLM refuses every adapter whose config has use_dora, and every magnitude that it meets without.",
        remedy="Merge the adapter into the base (peft: merge_and_unload) and serve the result, or train without DoRA.",
        fires='"use_dora": true',
        passes='"use_dora": false',
        source=f"{_VLLM}, lora/lora_model.py (from_lora_tensors); vllm#9280",
        field="use_dora",
    ),
    fact(
        "L549",
        "vllm",
        "modules-to-save",
        Effect.REFUSES,
        saved_modules,
        'vLLM refuses modules_to_save ({keys}): "vLLM only supports modules_to_save being None"',
        why="vLLM refuses every adapter whose config lists modules that were trained whole.",
        remedy="Train without modules_to_save, or merge the adapter into the base and serve the result.",
        fires='"modules_to_save": ["lm_head"]',
        passes='"modules_to_save": null',
        source=f"{_VLLM}; vllm#9280",
        field="modules_to_save",
    ),
    fact(
        "L550",
        "vllm",
        "other-tensors",
        Effect.REFUSES,
        _vllm_others,
        'vLLM refuses {n tensor} that are no LoRA factors ({keys}): "unsupported LoRA weight"',
        why="vLLM stops at the first tensor that is neither lora_A nor lora_B.",
        remedy="Train with bias none and without saved heads or embeddings, or merge the adapter into the base.",
        fires="base_model.model.score.weight",
        passes="base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        source="vllm lora/utils.py (parse_fine_tuned_lora_name)",
    ),
    fact(
        "L551",
        "vllm",
        "patterns",
        Effect.MISREADS,
        lambda s: scaled_apart(s, rslora=True),
        "vLLM applies lora_alpha/r of the config to all modules, {n module} of another scale ({keys}) included",
        why="vLLM reads r and lora_alpha and ignores rank_pattern and alpha_pattern.",
        remedy="Run adapterops convert FOLDER --to peft --for vllm, which gives all modules one scale and the same deltas.",
        fires='"alpha_pattern": {"q_proj": 32} beside "lora_alpha": 16',
        passes='"alpha_pattern": {}',
        source=_VLLM,
    ),
    fact(
        "L552",
        "vllm",
        "max-lora-rank",
        Effect.NEEDS,
        _rank_to_name,
        "vLLM refuses rank {value} until it is started with a --max-lora-rank of at least that (default 16)",
        why="vLLM refuses ranks above its --max-lora-rank, which is 16 where nobody sets it.",
        remedy="Tell users the --max-lora-rank to start vLLM with.",
        fires="rank 64",
        passes="rank 16",
        source="vllm config/lora.py (LoRAConfig.max_lora_rank)",
        field="r",
    ),
    fact(
        "L553",
        "vllm",
        "rank-too-large",
        Effect.REFUSES,
        _rank_too_large,
        "vLLM has no --max-lora-rank above 512; this adapter has rank {value}",
        why="vLLM's --max-lora-rank goes no further than 512, so no setting makes it load the adapter.",
        remedy="Run adapterops to-lora FOLDER --rank 512, or merge the adapter into the base.",
        fires="rank 1024",
        passes="rank 512",
        source="vllm config/lora.py (MaxLoRARanks)",
        field="r",
    ),
    fact(
        "L554",
        "vllm",
        "target-parameters",
        Effect.MISREADS,
        _targets_parameters,
        "vLLM applies the factors on parameters ({keys}) transposed, or leaves them out",
        why="vLLM reads peft's target_parameters in another orientation than peft writes them.",
        remedy="Merge the adapter into the base and serve the result.",
        fires='"target_parameters": ["mlp.experts.down_proj"]',
        passes='"target_parameters": null',
        source="vllm#52198, vllm#41384",
        field="target_parameters",
    ),
    fact(
        "L560",
        "mlx",
        "not-mlx",
        Effect.REFUSES,
        _not_mlx,
        "mlx-lm reads lora_a (in, r) and lora_b (r, out) of its own training, not {keys}",
        why="mlx-lm reads no adapters but its own, and finds no tensor for its layers in others.",
        remedy="Run adapterops convert FOLDER --to mlx; or merge the adapter into the base and convert that with mlx_lm.convert.",
        fires="base_model.model.….lora_A.weight",
        passes="model.layers.0.self_attn.q_proj.lora_a",
        source=f"{_MLX_LOAD}; mlx-lm#1119",
    ),
    fact(
        "L561",
        "mlx",
        "file-name",
        Effect.REFUSES,
        _mlx_name,
        "mlx-lm reads adapters.safetensors; the folder has {keys} only",
        why="mlx-lm opens one name, adapters.safetensors, beside adapter_config.json.",
        remedy="Name the file adapters.safetensors.",
        fires="0000100_adapters.safetensors alone, or adapters.npz",
        passes="adapters.safetensors",
        source=_MLX_LOAD,
    ),
    fact(
        "L562",
        "mlx",
        "config-fields",
        Effect.REFUSES,
        _mlx_fields,
        "mlx-lm cannot build the layers without {keys}",
        why="mlx-lm takes rank, scale, dropout and the number of layers from adapter_config.json.",
        remedy="Add the missing fields to adapter_config.json as they were in training.",
        fires='{"lora_parameters": {"rank": 8}}',
        passes='{"num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}}',
        source=f"{_MLX_LOAD}, linear_to_lora_layers",
        field="lora_parameters",
    ),
    fact(
        "L563",
        "mlx",
        "layers",
        Effect.DROPS,
        _mlx_layers,
        "mlx-lm adapts only the last num_layers layers and leaves out {n tensor} of others ({keys}) in silence",
        why="mlx-lm loads without strictness: tensors of layers that it did not wrap vanish.",
        remedy="Set num_layers in adapter_config.json to the number of layers that have tensors.",
        fires='tensors of layers 8 to 23 with "num_layers": 4',
        passes='tensors of layers 8 to 23 with "num_layers": 16',
        source=_MLX_LOAD,
    ),
    fact(
        "L570",
        "gguf",
        "not-a-peft-folder",
        Effect.REFUSES,
        lambda s: [] if s.dialect == "gguf" else foreign(s),  # which llama.cpp reads as it is
        "llama.cpp converts peft's folders only; this has other names ({keys})",
        why="llama.cpp's convert_lora_to_gguf.py reads adapter_config.json and lora_A, lora_B, and stops at anything else.",
        remedy="Run adapterops convert FILE --to peft first.",
        fires="adapters.safetensors with layers.0.self_attn.q_proj.lora_a",
        passes="a folder of adapter_config.json and adapter_model.safetensors",
        source=_GGUF,
    ),
    fact(
        "L572",
        "gguf",
        "other-method",
        Effect.REFUSES,
        other_type,
        'llama.cpp converts LoRA only, not peft_type {keys}: "Not a lora_A or lora_B tensor"',
        why="A GGUF adapter is a LoRA and nothing else.",
        remedy="Run adapterops to-lora FOLDER --energy 0.99, which makes a plain LoRA of it.",
        fires='"peft_type": "LOHA"',
        passes='"peft_type": "LORA"',
        source=f"{_GGUF} (get_tensors)",
        field="peft_type",
    ),
    fact(
        "L574",
        "gguf",
        "alpha-pattern",
        Effect.MISREADS,
        _gguf_scales,
        "a GGUF adapter has one alpha, the config's, for {n module} with another as well ({keys})",
        why="convert_lora_to_gguf.py writes lora_alpha once and ignores alpha_pattern.",
        remedy="Run adapterops convert FOLDER --to peft --for vllm first, which gives all modules one scale and the same deltas.",
        fires='"alpha_pattern": {"q_proj": 32} beside "lora_alpha": 16',
        passes='"alpha_pattern": {}, ranks by rank_pattern',
        source=f"{_GGUF} (set_gguf_parameters)",
    ),
    fact(
        "L575",
        "gguf",
        "dora",
        Effect.REFUSES,
        magnitudes,
        'llama.cpp stops at {n DoRA magnitude} ({keys}): "Not a lora_A or lora_B tensor"',
        why="A GGUF adapter has no place for DoRA's magnitudes.",
        remedy="Merge the adapter into the base (peft: merge_and_unload) and convert the result, or train without DoRA.",
        fires="….lora_magnitude_vector",
        passes="….lora_A.weight and ….lora_B.weight alone",
        source=f"{_GGUF} (get_tensors)",
    ),
    fact(
        "L576",
        "gguf",
        "other-tensors",
        Effect.REFUSES,
        _gguf_others,
        "llama.cpp stops at {n tensor} that are no LoRA factors ({keys}), norms excepted",
        why="A GGUF adapter has no place for whole heads, embeddings and biases.",
        remedy="Train without modules_to_save and with bias none, or merge the adapter into the base and convert that.",
        fires="base_model.model.lm_head.weight",
        passes="base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        source=f"{_GGUF} (get_tensors); llama.cpp#9948",
    ),
    fact(
        "L577",
        "gguf",
        "norms",
        Effect.DROPS,
        _gguf_norms,
        "llama.cpp skips {n whole norm} ({keys}) in silence",
        why="convert_lora_to_gguf.py passes trained norms on, and llama.cpp leaves every _norm.weight of an adapter out.",
        remedy="Merge the adapter into the base and convert the result, or train without the norms.",
        fires="base_model.model.model.layers.0.input_layernorm.weight",
        passes="base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        source=f"{_GGUF} (get_tensors); src/llama-adapter.cpp (llama_adapter_lora_init_impl)",
    ),
    fact(
        "L578",
        "gguf",
        "tied-head",
        Effect.NEEDS,
        _gguf_heads,
        "llama.cpp converts a LoRA on the head ({keys}) only where the base does not share it with the embeddings",
        why='convert_lora_to_gguf.py ends with "lm_head is present in adapter, but is ignored in base model" where the base '
        "ties its head to its embeddings (tie_word_embeddings).",
        remedy="For a base that ties them: train without lm_head, or merge the adapter into the base and convert that.",
        fires="base_model.model.lm_head.lora_A.weight",
        passes="base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        source=f"{_GGUF} (modify_tensors); llama.cpp#9065",
    ),
)
