#!/usr/bin/env python
r"""Writes fixtures/adapterhub/, fixtures/litgpt/ and fixtures/tinker/: adapters by the libraries that write them, and what these
libraries make of them.

None of the three is a dependency.  Each needs an environment of its own:

    pip install torch==2.13.0 safetensors adapters==1.3.0 'transformers==4.57.6'
    python scripts/trainer_fixtures.py adapterhub

    pip install torch==2.13.0 safetensors pyyaml litgpt==0.5.13 lightning
    python scripts/trainer_fixtures.py litgpt

    git clone https://github.com/thinking-machines-lab/tinker-cookbook; pip install ./tinker-cookbook
    python scripts/trainer_fixtures.py tinker

adapterhub and litgpt: beside each adapter, `change.safetensors` is what the library's own merging adds to each weight (for (IA)³,
the weight before and after).  tinker: the keys and shapes are those of tinker-cookbook's own tests
(tests/weights/conftest.py), the numbers noise; `peft/` is what its `_convert_adapter` makes of them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).parents[1] / "fixtures"
WIDTH, INNER, WORDS, HEADS, KEYS, RANK = 16, 24, 20, 4, 2, 3


def fresh(*parts: str) -> Path:
    folder = FIXTURES.joinpath(*parts)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def noise(parameters: Any) -> None:
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3)


def adapterhub() -> None:
    import adapters
    from adapters import IA3Config, LoRAConfig
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS, "intermediate_size": INNER}
    bases = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=KEYS, vocab_size=WORDS)),
        "bert": lambda: BertModel(BertConfig(**sizes, vocab_size=WORDS, max_position_embeddings=8)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=WIDTH, n_layer=1, n_head=HEADS, vocab_size=WORDS, n_positions=8)
        ),
    }
    kinds = {
        "lora": LoRAConfig(r=RANK, alpha=4, intermediate_lora=True, output_lora=True),
        "kv": LoRAConfig(r=RANK, alpha=6, attn_matrices=["k", "v"]),
        "early": LoRAConfig(r=RANK, alpha=6),
        "ia3": IA3Config(attn_matrices=["q", "k", "v"]),
    }
    for base, make in bases.items():
        for kind, config in kinds.items():
            torch.manual_seed(0)
            model = make()
            adapters.init(model)
            model.add_adapter(kind, config=config)
            noise(p for n, p in model.named_parameters() if f".{kind}." in n)
            folder = fresh("adapterhub", f"{base}-{kind}")
            model.save_adapter(str(folder), kind, use_safetensors=kind == "kv", with_head=False)
            used = kind
            if kind == "early":
                file = folder / "adapter_config.json"
                file.write_text(json.dumps(json.loads(file.read_text()) | {"version": "adapters.1.0.1"}, indent=2))
                model.delete_adapter(kind)
                used = model.load_adapter(str(folder), load_as="again", with_head=False)
            before = {n: p.detach().clone() for n, p in model.named_parameters() if ".loras." not in n}
            model.merge_adapter(used)
            after = {n: p.detach() for n, p in model.named_parameters() if ".loras." not in n}
            changed = [n for n, p in after.items() if not torch.equal(before[n], p)]
            if kind == "ia3":
                own = {f"before.{n}": before[n] for n in changed} | {f"after.{n}": after[n] for n in changed}
            else:
                own = {n: after[n] - before[n] for n in changed}
            save_file({n: t.contiguous().clone() for n, t in own.items()}, folder / "change.safetensors")
    for kind, config in {
        "bottleneck": adapters.SeqBnConfig(reduction_factor=4),
        "compacter": adapters.CompacterConfig(reduction_factor=2, phm_dim=2),
        "prefix": adapters.PrefixTuningConfig(prefix_length=2, bottleneck_size=4),
        "prompt": adapters.PromptTuningConfig(prompt_length=2),
        "reft": adapters.LoReftConfig(),
        "dora": LoRAConfig(r=RANK, alpha=4, use_dora=True),
        "vera": adapters.configuration.adapter_config.VeraConfig(r=RANK),
        "gated": LoRAConfig(r=RANK, alpha=4, use_gating=True),
    }.items():
        torch.manual_seed(0)
        model = bases["bert"]()
        adapters.init(model)
        model.add_adapter(kind, config=config)
        model.save_adapter(str(fresh("adapterhub", "others", kind)), kind, with_head=False)


def litgpt() -> None:
    import yaml
    from litgpt.lora import GPT, Config, merge_lora_weights

    names = ("lora_query", "lora_key", "lora_value")
    for name, flags in {"qv": (True, False, True), "qkv": (True, True, True), "k": (False, True, False)}.items():
        torch.manual_seed(0)
        own = dict(zip(names, flags, strict=True))
        rest = {"lora_projection": True, "lora_mlp": True, "lora_head": True}
        config = Config(
            name="Llama",
            n_layer=2,
            n_embd=WIDTH,
            n_head=HEADS,
            n_query_groups=KEYS,
            intermediate_size=INNER,
            padded_vocab_size=WORDS,
            block_size=8,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            lora_r=RANK,
            lora_alpha=4,
            **own,
            **rest,
        )
        model = GPT(config)
        noise(model.parameters())
        folder = fresh("litgpt", name)
        state = {key: value for key, value in model.state_dict().items() if "lora_" in key}
        torch.save({"model": state}, folder / "lit_model.pth.lora")
        said = {"lora_r": RANK, "lora_alpha": 4, "lora_dropout": 0.05, **own, **rest, "precision": "bf16-true"}
        (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(said))
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(".linear.weight")}
        merge_lora_weights(model)
        after = {n: p.detach() - weights[n] for n, p in model.named_parameters() if n in weights}
        save_file({n: t.contiguous() for n, t in after.items()}, folder / "change.safetensors")
        base = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KEYS,
            "vocab_size": WORDS,
        }
        (folder / "config.json").write_text(json.dumps(base, indent=2))


def tinker() -> None:
    from tinker_cookbook.weights._adapter import _convert_adapter
    from tinker_cookbook.weights._merge import detect_merge_profile

    experts = 3
    layer = "base_model.model.model.layers.0."

    def pair(stem: str, *, rows: int, columns: int, stacks: tuple[int, int] = (0, 0)) -> dict[str, torch.Tensor]:
        a, b = ((n,) if n else () for n in stacks)
        return {
            f"{stem}.lora_A.weight": torch.randn(*a, RANK, columns),
            f"{stem}.lora_B.weight": torch.randn(*b, rows, RANK),
        }

    def attention(name: str) -> dict[str, torch.Tensor]:
        wide = {"q_proj": WIDTH, "k_proj": WIDTH // 2, "v_proj": WIDTH // 2, "o_proj": WIDTH}
        out: dict[str, torch.Tensor] = {}
        for part, rows in wide.items():
            out |= pair(f"{layer}{name}.{part}", rows=rows, columns=WIDTH)
        return out

    def stacked(name: str) -> dict[str, torch.Tensor]:
        return (
            pair(f"{layer}{name}.experts.w1", rows=INNER, columns=WIDTH, stacks=(1, experts))
            | pair(f"{layer}{name}.experts.w3", rows=INNER, columns=WIDTH, stacks=(1, experts))
            | pair(f"{layer}{name}.experts.w2", rows=WIDTH, columns=INNER, stacks=(experts, 1))
        )

    def none(name: str) -> dict[str, torch.Tensor]:
        return {f"{layer}{name}.experts.w3.lora_{role}.weight": torch.empty(0) for role in "AB"}

    def head() -> dict[str, torch.Tensor]:
        return pair("base_model.model.model.unembed_tokens", rows=WORDS, columns=WIDTH)

    own = {f"model.layers.0.mlp.experts.{n}.gate_proj.weight" for n in range(experts)}
    for name, make, config, keys in (
        ("dense", lambda: attention("self_attn") | head(), ("Qwen3ForCausalLM", "qwen3"), set[str]()),
        ("experts", lambda: attention("self_attn") | stacked("mlp"), ("Qwen3MoeForCausalLM", "qwen3_moe"), own),
        (
            "gpt-oss",
            lambda: attention("attn") | stacked("mlp") | head(),
            ("GptOssForCausalLM", "gpt_oss"),
            {"model.layers.0.mlp.experts.gate_up_proj"},
        ),
        (
            "nemotron",
            lambda: stacked("mixer") | none("mixer"),
            ("NemotronHForCausalLM", "nemotron_h"),
            {"backbone.layers.0.mixer.experts.0.up_proj.weight"},
        ),
    ):
        torch.manual_seed(0)
        tensors = make()
        folder = fresh("tinker", name)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": RANK}))
        said = {"architectures": [config[0]], "model_type": config[1]}
        profile = detect_merge_profile(said, keys | {"lm_head.weight"})
        (folder / "peft").mkdir()
        wanted, _, _ = _convert_adapter(tensors, keys | {"lm_head.weight"}, profile, {})
        wanted = {key.replace("backbone.", "model."): value for key, value in wanted.items()}
        save_file(wanted, folder / "peft" / "wanted.safetensors")


if __name__ == "__main__":
    {"adapterhub": adapterhub, "litgpt": litgpt, "tinker": tinker}[sys.argv[1]]()
