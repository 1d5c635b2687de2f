"""What llama.cpp makes of an adapter, computed apart from this project: with gguf's own reader, numpy and torch.

The weights of a base as llama.cpp's converter lays them out are written down here a second time, on whole matrices and by
other means (reshaping) than the product, which moves rows of factors by lists.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft_models as pm
import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

VALUES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MOE = {**VALUES, "num_hidden_layers": 1, "num_experts": 3, "moe_intermediate_size": 6, "num_experts_per_tok": 2}
GPT = {
    "vocab_size": 24,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FALCON = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


class Case:
    """A class of transformers, its smallest config, what peft adapts, and llama.cpp's name for it."""

    def __init__(self, class_name: str, architecture: str, targets: tuple[str, ...], values: Mapping[str, Any]) -> None:
        self.class_name, self.architecture, self.targets = class_name, architecture, targets
        self.values = dict(values)

    def config(self) -> PretrainedConfig:
        made = getattr(transformers, self.class_name).config_class(**self.values)
        made.architectures = [self.class_name]
        return made

    def model(self) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return getattr(transformers, self.class_name)(self.config()).eval()

    def base(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        self.config().to_json_file(folder / "config.json")
        return folder / "config.json"

    def tuned(self, folder: Path, **options: Any) -> PeftModel:
        """An adapter of noise, trained and saved by peft."""
        settings = {"r": 4, "lora_alpha": 8, "target_modules": list(self.targets), **options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of patterns that this base has no module for
            model = pm.trained(self.model(), LoraConfig(**settings))
        pm.saved(model, folder)
        return model


CASES = {
    "llama": Case("LlamaForCausalLM", "llama", (*ALL, "lm_head", "embed_tokens"), VALUES),
    "llama-headless": Case("LlamaModel", "llama", ALL, VALUES),
    "mistral": Case("MistralForCausalLM", "llama", ALL, {**VALUES, "head_dim": 6}),
    "qwen2": Case("Qwen2ForCausalLM", "qwen2", (*ALL, "lm_head"), VALUES),
    "qwen3": Case("Qwen3ForCausalLM", "qwen3", ALL, {**VALUES, "head_dim": 6}),
    "gemma": Case("GemmaForCausalLM", "gemma", ALL, {**VALUES, "head_dim": 6}),
    "gemma2": Case("Gemma2ForCausalLM", "gemma2", ALL, {**VALUES, "head_dim": 6}),
    "gemma3": Case("Gemma3ForCausalLM", "gemma3", ALL, {**VALUES, "head_dim": 6}),
    "phi3": Case("Phi3ForCausalLM", "phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), VALUES),
    "gpt2": Case("GPT2LMHeadModel", "gpt2", ("c_attn", "c_proj", "c_fc"), GPT),
    "falcon": Case(
        "FalconForCausalLM", "falcon", FALCON, {**VALUES, "num_kv_heads": 2, "new_decoder_architecture": True}
    ),
    "falcon-7b": Case("FalconForCausalLM", "falcon", FALCON, {**VALUES, "multi_query": True}),
    "bloom": Case("BloomForCausalLM", "bloom", FALCON, {**VALUES, "n_layer": 2, "n_head": 4}),
    "mixtral": Case(
        "MixtralForCausalLM", "llama", ("q_proj", "k_proj"), {**VALUES, "num_hidden_layers": 1, "num_local_experts": 3}
    ),
    "qwen2moe": Case(
        "Qwen2MoeForCausalLM",
        "qwen2moe",
        ("q_proj", "shared_expert.up_proj", "shared_expert.down_proj"),
        {**MOE, "shared_expert_intermediate_size": 10},
    ),
    "qwen3moe": Case("Qwen3MoeForCausalLM", "qwen3moe", ("k_proj",), {**MOE, "head_dim": 6}),
}
SEEING = Case(
    "Gemma3ForConditionalGeneration",
    "gemma3",
    (),
    {
        "text_config": {**VALUES, "head_dim": 6},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
        "boi_token_index": 6,
        "eoi_token_index": 7,
    },
)
"""A language model that is a part of a larger one."""
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def options_of(name: str) -> dict[str, Any]:
    """What of peft's config the base asks for."""
    return {"target_parameters": EXPERTS} if name in ("mixtral", "qwen2moe", "qwen3moe") else {}


def applied(path: Path, strength: float = 1.0) -> dict[str, np.ndarray]:
    """What llama.cpp adds to each of its tensors (out, in): `llama_adapter_lora_weight::get_scale`, `build_lora_mm`,
    `build_lora_mm_id` and, for tokens, `build_inp_embd`."""
    reader = gguf.GGUFReader(path)
    field = reader.fields.get("adapter.lora.alpha")
    alpha = field.contents() if field is not None else 0.0
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for tensor in reader.tensors:
        name, _, half = tensor.name.rpartition(".lora_")
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        # The reader's data stand in numpy's order; bfloat16 and quantised types come as bytes.
        pairs.setdefault(name, {})[half] = values.reshape([int(n) for n in tensor.shape[::-1]]).astype(np.float64)
    out = {}
    for name, pair in pairs.items():
        a, b = pair["a"], pair["b"]
        rank = b.shape[-1]  # ne[0]
        scale = strength * alpha / rank if alpha else strength
        if name == "token_embd.weight":
            assert a.shape[1] == rank
            out[name] = scale * (a @ b.T)
        else:
            assert a.shape[-2] == rank
            out[name] = scale * np.matmul(b, a)
    return out


def entries(path: Path) -> dict[str, Any]:
    """The header's entries."""
    return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}


Layout = Callable[[Tensor, PretrainedConfig], Tensor]


def pairwise(weight: Tensor, heads: int) -> Tensor:
    """Each head's two halves of rows, interleaved."""
    size = weight.shape[0] // heads
    per_head = weight.reshape(heads, size, -1)
    return torch.stack((per_head[:, : size // 2], per_head[:, size // 2 :]), dim=2).reshape(weight.shape)


def thirds(weight: Tensor, groups: int, each: int) -> Tensor:
    """Groups of `each` queries, a key and a value: all queries, then all keys, then all values."""
    size = weight.shape[0] // (groups * (each + 2))
    split = weight.reshape(groups, each + 2, size, -1)
    parts = [split[:, :each], split[:, each : each + 1], split[:, each + 1 :]]
    return torch.cat([part.reshape(-1, weight.shape[1]) for part in parts])


def as_llama(config: PretrainedConfig, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Deltas of transformers' weights (out, in) as those of llama.cpp's, under its names."""
    kind = config.model_type
    out = {}
    for name, delta in deltas.items():
        own = name.removeprefix("model.").removeprefix("language_model.").removeprefix("transformer.")
        layer, module = "", own
        if own.startswith(("layers.", "h.")):
            _, number, module = own.split(".", 2)
            layer = f"blk.{number}."
        if kind in ("llama", "mistral", "mixtral") and module == "self_attn.q_proj":
            delta = pairwise(delta, config.num_attention_heads)
        if kind in ("llama", "mistral", "mixtral") and module == "self_attn.k_proj":
            delta = pairwise(delta, config.num_key_value_heads)
        if module == "self_attention.query_key_value":
            heads = config.num_attention_heads
            groups = heads if kind == "bloom" else config.num_kv_heads if config.new_decoder_architecture else 1
            delta = thirds(delta, groups, heads // groups)
        if module == "mlp.experts.gate_up_proj":
            half = delta.shape[1] // 2
            out[f"{layer}ffn_gate_exps.weight"], out[f"{layer}ffn_up_exps.weight"] = delta[:, :half], delta[:, half:]
            continue
        out[f"{layer}{_NAMES[module]}.weight"] = delta
    return out


_NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.experts.down_proj": "ffn_down_exps",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}


def deltas_of(model: PeftModel, fresh: nn.Module) -> dict[str, Tensor]:
    """What peft adds to each weight (out, in), by merging into the base and comparing with a fresh one."""
    before = {name: value.detach().double() for name, value in fresh.named_parameters(remove_duplicate=False)}
    # In float64, so that the difference is not that of large numbers' rounding.
    merged = model.double().merge_and_unload()
    out = {}
    for name, value in merged.named_parameters(remove_duplicate=False):
        change = value.detach() - before[name]
        if change.abs().max() > 0:
            module = merged.get_submodule(name.rpartition(".")[0])
            stored = type(module).__name__ == "Conv1D"
            key = name.removesuffix(".weight")
            out[key if key.startswith(("model.", "transformer.", "lm_head")) else f"model.{key}"] = (
                change.T if stored else change
            )
    return out
