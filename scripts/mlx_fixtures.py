"""The fixtures that mlx-lm itself writes: `fixtures/mlx-*/`.

    python -m venv mlx && mlx/bin/pip install 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
    mlx/bin/python scripts/mlx_fixtures.py

Each folder holds the adapter as `mlx_lm.lora` saves it (`tuner/trainer.py`, `tuner/utils.py`: the trainable parameters, and
`adapter_config.json`), and in `base/` the tiny model's `config.json` and, in `fused.safetensors`, for each adapted module the
base's weight (`NAME.before`) and what the layer's own `fuse()` makes of it (`NAME.after`).  Factors are drawn, not trained.
A second run writes the same bytes.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save_config

FIXTURES = Path(__file__).parents[1] / "fixtures"
ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}
LLAMA: dict[str, Any] = {
    **SIZES,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
GEMMA = QWEN2 | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "head_dim": 4}
MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_ctx": 32,
    "n_embd": 16,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 32,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": 40,
    "num_key_value_heads": 4,
}
CASES: dict[str, tuple[dict[str, Any], str, int, dict[str, Any]]] = {
    # folder: base, fine_tune_type, num_layers, lora_parameters
    "mlx-llama": (LLAMA, "lora", 2, {"rank": 4, "dropout": 0.0, "scale": 20.0, "keys": [*ATTENTION, "mlp.down_proj"]}),
    "mlx-llama-dora": (LLAMA, "dora", 2, {"rank": 4, "dropout": 0.05, "scale": 1.7, "keys": ATTENTION}),
    "mlx-llama-head": (LLAMA, "lora", 1, {"rank": 3, "dropout": 0.0, "scale": 2.5, "keys": [*ATTENTION, "lm_head"]}),
    "mlx-llama-embedding": (
        LLAMA,
        "lora",
        1,
        {"rank": 2, "dropout": 0.0, "scale": 4.0, "keys": ["model.embed_tokens", "mlp.up_proj"]},
    ),
    "mlx-qwen2": (QWEN2, "lora", -1, {"rank": 8, "dropout": 0.0, "scale": 10.0}),
    "mlx-gemma": (GEMMA, "lora", 2, {"rank": 4, "dropout": 0.0, "scale": 0.1, "keys": ATTENTION}),
    "mlx-gpt2": (GPT2, "lora", 2, {"rank": 4, "dropout": 0.0, "scale": 3.0, "keys": ["attn.c_attn", "mlp.c_proj"]}),
    "mlx-mixtral": (
        MIXTRAL,
        "lora",
        1,
        {
            "rank": 2,
            "dropout": 0.0,
            "scale": 5.0,
            "keys": ["self_attn.q_proj", *(f"block_sparse_moe.switch_mlp.{n}_proj" for n in ("gate", "up", "down"))],
        },
    ),
}


def build(base: dict[str, Any]) -> Any:
    """mlx-lm's model of a config, with drawn weights."""
    module = importlib.import_module(f"mlx_lm.models.{base['model_type']}")
    mx.random.seed(0)
    return module.Model(module.ModelArgs.from_dict(base))


def main() -> None:
    """Write every folder."""
    for name, (base, kind, layers, parameters) in CASES.items():
        folder = FIXTURES / name
        (folder / "base").mkdir(parents=True, exist_ok=True)
        (folder / "base" / "config.json").write_text(json.dumps(base, indent=2, sort_keys=True) + "\n")
        model = build(base)
        model.freeze()
        linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
        drawn = [
            (key, value * 1.1 if key.endswith(".m") else mx.random.normal(value.shape) * 0.05)
            for key, value in tree_flatten(model.trainable_parameters())
        ]
        model.load_weights(drawn, strict=False)
        fused = {}
        for key, module in model.named_modules():
            if hasattr(module, "fuse"):
                inner = module.linear if "linear" in module else module.embedding
                fused |= {f"{key}.before": inner.weight, f"{key}.after": module.fuse().weight}
        mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
        config = {"fine_tune_type": kind, "model": f"tiny/{base['model_type']}", "num_layers": layers, "seed": 0}
        save_config(config | {"lora_parameters": parameters}, folder / "adapter_config.json")
        mx.save_safetensors(str(folder / "base" / "fused.safetensors"), fused)


if __name__ == "__main__":
    main()
