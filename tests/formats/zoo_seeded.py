"""Uni-LoRA, FourierFT and WaveFT: numbers at random places."""

from __future__ import annotations

from peft import FourierFTConfig, UniLoraConfig, WaveFTConfig
from peft_zoo import LINE, Case, gpt2, llama

_LINE = ["wide", "tall", "square"]
_GPT2 = ["c_attn", "mlp.c_proj"]
_LLAMA = ["q_proj", "k_proj", "down_proj"]
_WAVE = {"random_loc_seed": 777, "scaling": 25.0, "use_idwt": True, "wavelet_family": "db1"}
CASES: dict[str, Case] = {
    "fourierft, linear": Case(
        LINE,
        FourierFTConfig(n_frequency=20, target_modules=_LINE, random_loc_seed=9, scaling=40),
        said={"random_loc_seed": 9, "scaling": 40},
    ),
    "fourierft, other numbers": Case(
        llama,
        FourierFTConfig(
            n_frequency=20,
            target_modules=_LLAMA,
            n_frequency_pattern={"k_proj": 12, "model.layers.1.self_attn.q_proj": 33},
        ),
        said={"random_loc_seed": 777, "scaling": 150.0},
    ),
    "fourierft, transposed": Case(
        gpt2,
        FourierFTConfig(n_frequency=20, target_modules=_GPT2, fan_in_fan_out=True),
        said={"random_loc_seed": 777, "scaling": 150.0},
    ),
    "waveft, linear": Case(
        LINE,
        WaveFTConfig(
            n_frequency=20,
            target_modules=_LINE,
            random_loc_seed=9,
            scaling=4,
            wavelet_family="sym3",
            modules_to_save=["other"],
        ),
        said={"random_loc_seed": 9, "scaling": 4, "use_idwt": True, "wavelet_family": "sym3"},
    ),
    "waveft, no transform": Case(
        LINE,
        WaveFTConfig(n_frequency=20, target_modules=_LINE, use_idwt=False, n_frequency_pattern={"tall": 9}),
        said={"random_loc_seed": 777, "scaling": 25.0, "use_idwt": False},
    ),
    "waveft, in proportion": Case(
        llama, WaveFTConfig(n_frequency=20, target_modules=_LLAMA, proportional_parameters=True), said=_WAVE
    ),
    "waveft, transposed": Case(
        gpt2, WaveFTConfig(n_frequency=20, target_modules=_GPT2, fan_in_fan_out=True), said=_WAVE
    ),
    "unilora, indices": Case(LINE, UniLoraConfig(r=3, target_modules=_LINE, theta_d_length=40, save_indices=True)),
    "unilora, one vector": Case(
        LINE,
        UniLoraConfig(r=3, target_modules=_LINE, theta_d_length=40, proj_seed=5),
        said={"r": 3, "proj_seed": 5, "target_modules": _LINE},
    ),
    "unilora, transposed": Case(
        gpt2,
        UniLoraConfig(r=3, target_modules=_GPT2, theta_d_length=40, fan_in_fan_out=True),
        said={"r": 3, "proj_seed": 42, "target_modules": _GPT2},
        base_needed=True,
    ),
    "unilora, llama": Case(
        llama,
        UniLoraConfig(r=3, target_modules=_LLAMA, theta_d_length=40, layers_to_transform=[1]),
        said={
            "r": 3,
            "proj_seed": 42,
            "target_modules": ["layers.1.self_attn.q_proj", "1.self_attn.k_proj", "layers.1.mlp.down_proj"],
        },
    ),
}
