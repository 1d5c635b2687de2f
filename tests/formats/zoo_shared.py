"""VeRA, PVeRA, RandLoRA, VB-LoRA, TinyLoRA and FRoD: tensors that stand once for all modules."""

from __future__ import annotations

from peft import FrodConfig, PveraConfig, RandLoraConfig, TinyLoraConfig, VBLoRAConfig, VeraConfig
from peft_zoo import LINE, WORDS, Case, gpt2, llama

_LINE = ["wide", "tall", "square"]
_GPT2 = ["c_attn", "mlp.c_proj"]
_LLAMA = ["q_proj", "k_proj", "down_proj"]
CASES: dict[str, Case] = {
    "vera, linear": Case(LINE, VeraConfig(r=4, target_modules=_LINE)),
    "vera, a saved module": Case(LINE, VeraConfig(r=4, target_modules=_LINE, modules_to_save=["other"])),
    "vera, biases": Case(LINE, VeraConfig(r=4, target_modules=["wide", "square"], bias="vera_only")),
    "vera, projections from a seed": Case(
        LINE,
        VeraConfig(r=4, target_modules=_LINE, save_projection=False, projection_prng_key=5),
        said={"projection_prng_key": 5},
    ),
    "vera, transposed": Case(gpt2, VeraConfig(r=3, target_modules=_GPT2, fan_in_fan_out=True)),
    "vera, llama": Case(llama, VeraConfig(r=3, target_modules=_LLAMA, layers_to_transform=[1])),
    "pvera, linear": Case(LINE, PveraConfig(r=4, target_modules=_LINE)),
    "pvera, projections from a seed": Case(
        LINE,
        PveraConfig(r=4, target_modules=_LINE, save_projection=False, projection_prng_key=5),
        said={"projection_prng_key": 5},
    ),
    "pvera, transposed": Case(gpt2, PveraConfig(r=3, target_modules=_GPT2, fan_in_fan_out=True)),
    "randlora, linear": Case(LINE, RandLoraConfig(r=3, randlora_alpha=6, target_modules=_LINE), alpha=6),
    "randlora, sparse": Case(LINE, RandLoraConfig(r=3, randlora_alpha=6, target_modules=_LINE, sparse=True), alpha=6),
    "randlora, projections from a seed": Case(
        LINE,
        RandLoraConfig(r=3, randlora_alpha=6, target_modules=_LINE, save_projection=False, projection_prng_key=5),
        said={"projection_prng_key": 5, "sparse": False, "very_sparse": False},
        alpha=6,
    ),
    "randlora, sparse projections from a seed": Case(
        LINE,
        RandLoraConfig(r=3, randlora_alpha=6, target_modules=_LINE, save_projection=False, very_sparse=True),
        said={"projection_prng_key": 0, "sparse": False, "very_sparse": True},
        alpha=6,
    ),
    "randlora, transposed": Case(
        gpt2, RandLoraConfig(r=4, randlora_alpha=6, target_modules=_GPT2, fan_in_fan_out=True), alpha=6
    ),
    "vblora, linear": Case(
        LINE, VBLoRAConfig(r=3, target_modules=_LINE, num_vectors=12, vector_length=8, topk=3), said={"topk": 3}
    ),
    "vblora, weights of the topk": Case(
        LINE,
        VBLoRAConfig(r=3, target_modules=_LINE, num_vectors=12, vector_length=8, topk=3, save_only_topk_weights=True),
    ),
    "vblora, transposed": Case(
        gpt2,
        VBLoRAConfig(r=3, target_modules=_GPT2, num_vectors=12, vector_length=8, fan_in_fan_out=True),
        said={"topk": 2},
    ),
    "tinylora, linear": Case(LINE, TinyLoraConfig(r=3, u=6, target_modules=_LINE)),
    "tinylora, one vector": Case(LINE, TinyLoraConfig(r=3, u=6, target_modules=_LINE, weight_tying=1.0)),
    "tinylora, groups": Case(llama, TinyLoraConfig(r=3, u=6, target_modules=_LLAMA, weight_tying=0.4)),
    "tinylora, more rank than there is": Case(LINE, TinyLoraConfig(r=20, u=6, target_modules=_LINE)),
    "tinylora, projections from a seed": Case(
        LINE,
        TinyLoraConfig(r=3, u=6, target_modules=_LINE, save_projection=False, projection_seed=5),
        said={"projection_seed": 5},
    ),
    "tinylora, embedding": Case(WORDS, TinyLoraConfig(r=3, u=6, target_modules=["words"])),
    "tinylora, transposed": Case(gpt2, TinyLoraConfig(r=3, u=6, target_modules=_GPT2, fan_in_fan_out=True)),
    "frod, linear": Case(
        LINE, FrodConfig(target_modules=_LINE, progressbar=False), said={"regularization_alpha": 1e-3}
    ),
    "frod, another rate": Case(
        LINE,
        FrodConfig(target_modules=_LINE, progressbar=False, sparse_rate=0.37, regularization_alpha=1e-2),
        said={"regularization_alpha": 1e-2},
    ),
    "frod, llama": Case(
        llama, FrodConfig(target_modules=_LLAMA, progressbar=False), said={"regularization_alpha": 1e-3}
    ),
    "frod, transposed": Case(
        gpt2,
        FrodConfig(target_modules=_GPT2, progressbar=False, fan_in_fan_out=True),
        said={"regularization_alpha": 1e-3},
    ),
    "frod, no basis": Case(
        LINE,
        FrodConfig(target_modules=_LINE, progressbar=False, save_projection=False, projection_prng_key=5),
        said={"regularization_alpha": 1e-3, "projection_prng_key": 5},
        change=False,
    ),
}
