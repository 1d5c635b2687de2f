"""MiSS, GraLoRA, C3A, SHiRA, DeLoRA and HiRA."""

from __future__ import annotations

from typing import Any

import torch
from peft import C3AConfig, DeloraConfig, GraloraConfig, HiraConfig, MissConfig, ShiraConfig
from peft_zoo import IMAGE, LINE, SIGNAL, VOLUME, WORDS, Case, gpt2, llama
from torch import Tensor, nn

_LINE = ["wide", "tall", "square"]
_HEADS = ["q_proj", "v_proj", "down_proj"]


def _first_rows(layer: nn.Linear, r: int, **_: Any) -> Tensor:
    """A mask of a user's own: as many numbers as peft wants, from the beginning."""
    mask = torch.zeros(layer.weight.numel())
    mask[: r * sum(layer.weight.shape)] = 1
    return mask.view(layer.weight.shape)


def _masked() -> ShiraConfig:
    config = ShiraConfig(r=2, mask_type="first rows", target_modules=_LINE, inference_mode=True)
    config.mask_fn = _first_rows
    return config


CASES: dict[str, Case] = {
    "miss, standard": Case(LINE, MissConfig(r=4, target_modules=_LINE)),
    "miss, drawn": Case(LINE, MissConfig(r=4, init_weights=False, bias="all", target_modules=_LINE[:2])),
    "miss, cut off": Case(LINE, MissConfig(r=7, target_modules=_LINE, modules_to_save=["other"])),
    "miss, mini": Case(LINE, MissConfig(r=4, init_weights="mini", mini_r=8, target_modules=_LINE), base_needed=True),
    "miss, mini as wide as a module": Case(
        LINE, MissConfig(r=4, init_weights="mini", mini_r=24, target_modules=["wide"]), base_needed=True
    ),
    "miss, mini said": Case(
        LINE,
        MissConfig(r=4, init_weights="mini", mini_r=2, target_modules=_LINE),
        assumed={"init_weights": "mini", "mini_r": 2},
    ),
    "miss, bat": Case(LINE, MissConfig(r=8, init_weights="bat", target_modules=_LINE)),
    "miss, llama": Case(llama, MissConfig(r=4, target_modules=_HEADS)),
    "gralora, linear": Case(LINE, GraloraConfig(r=4, alpha=6, target_modules=_LINE), alpha=6),
    "gralora, hybrid": Case(
        LINE,
        GraloraConfig(r=4, alpha=6, gralora_k=4, hybrid_r=3, bias="gralora_only", target_modules=_LINE),
        alpha=6,
    ),
    "gralora, transposed": Case(
        gpt2, GraloraConfig(r=4, alpha=6, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"]), alpha=6
    ),
    "gralora, llama": Case(
        llama, GraloraConfig(r=8, alpha=3, gralora_k=4, target_modules=_HEADS, modules_to_save=["lm_head"]), alpha=3
    ),
    "c3a, linear": Case(LINE, C3AConfig(block_size=8, target_modules=_LINE)),
    "c3a, pattern": Case(
        LINE, C3AConfig(block_size=8, block_size_pattern={"wide": 4, "square": 16}, target_modules=_LINE)
    ),
    "c3a, llama": Case(
        llama,
        C3AConfig(
            block_size=16,
            block_size_pattern={"layers.1.self_attn.q_proj": 32, "v_proj": 2},
            target_modules=_HEADS,
            modules_to_save=["lm_head"],
        ),
    ),
    "shira, linear": Case(LINE, ShiraConfig(r=2, target_modules=_LINE, modules_to_save=["other"]), base_needed=True),
    "shira, said": Case(LINE, ShiraConfig(r=3, random_seed=5, target_modules=_LINE), assumed={"r": 3}),
    "shira, own mask": Case(LINE, _masked(), assumed={"r": 2}),
    "shira, llama": Case(llama, ShiraConfig(r=1, target_modules=_HEADS), base_needed=True),
    "delora, linear": Case(LINE, DeloraConfig(r=3, delora_lambda=5, target_modules=_LINE, bias="delora_only")),
    "delora, patterns": Case(
        LINE,
        DeloraConfig(
            r=3, rank_pattern={"tall": 5}, lambda_pattern={"wide": 9}, target_modules=_LINE, modules_to_save=["other"]
        ),
    ),
    "delora, llama": Case(llama, DeloraConfig(r=2, target_modules=_HEADS)),
    "hira, linear": Case(LINE, HiraConfig(r=3, target_modules=_LINE, modules_to_save=["other"])),
    "hira, rank pattern": Case(LINE, HiraConfig(r=3, rank_pattern={"square": 2}, target_modules=_LINE)),
    "hira, convolution": Case(IMAGE, HiraConfig(r=3, target_modules=["conv", "point"])),
    "hira, convolution of one dimension": Case(SIGNAL, HiraConfig(r=3, target_modules=["conv"])),
    "hira, convolution of three dimensions": Case(VOLUME, HiraConfig(r=3, target_modules=["conv"])),
    "hira, embedding": Case(WORDS, HiraConfig(r=3, target_modules=["words"])),
    "hira, transposed": Case(gpt2, HiraConfig(r=3, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"])),
    "hira, llama": Case(llama, HiraConfig(r=3, target_modules=[*_HEADS, "embed_tokens"])),
}
