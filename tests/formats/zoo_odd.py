"""Methods with shapes of their own, soft prompts, mixtures, and models beside the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft_models as pm
import torch
from peft import (
    AdaptionPromptConfig,
    BeftConfig,
    CartridgeConfig,
    CPTConfig,
    DeftConfig,
    LilyConfig,
    LNTuningConfig,
    MultitaskPromptTuningConfig,
    OSFConfig,
    PeanutConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShadowConfig,
    SupertuningConfig,
    TrainableTokensConfig,
)
from peft_zoo import INPUTS, LINE, TOKENS, WORDS, Case, gpt2, llama
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

_LINE = ["wide", "tall", "square"]
_TASK = {"task_type": "CAUSAL_LM"}
_QV = ["q_proj", "v_proj"]


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, dropout_rate=0.0,
    )  # fmt: skip
    return pm.fill(T5ForConditionalGeneration(config), 7)


INPUTS[t5] = TOKENS  # type: ignore[index]


@dataclass(frozen=True)
class Pair(Case):
    """An encoder and a decoder."""

    def outputs(self, model: nn.Module) -> pm.Outputs:
        with torch.no_grad():
            out = model(input_ids=TOKENS, decoder_input_ids=TOKENS, use_cache=False)
        return [out.logits[:, -TOKENS.shape[1] :]]


@dataclass(frozen=True)
class Words(Case):
    """A language model, of whose outputs those of the text itself count; `task` is the number of a task."""

    task: int | None = None

    def outputs(self, model: nn.Module) -> pm.Outputs:
        more = {} if self.task is None or not hasattr(model, "peft_config") else {"task_ids": torch.tensor([self.task])}
        with torch.no_grad():
            return [model(INPUTS[self.base], use_cache=False, **more)[0][:, -TOKENS.shape[1] :]]


def _prompt(config: Any, said: Any = None, **rest: Any) -> Words:
    return Words(llama, config, said={**_TASK, **(said or {})}, change=False, **rest)


def _kind(name: str) -> dict[str, str]:
    """What must be said beside the task where another type spells its tensors alike."""
    return {"peft_type": name}


_CPT = {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}
CASES: dict[str, Case] = {
    "deft, relu": Case(
        LINE, DeftConfig(r=3, target_modules=_LINE), said={"decomposition_method": "relu"}, tolerance=1e-4
    ),
    "deft, qr": Case(
        LINE,
        DeftConfig(r=3, target_modules=_LINE, decomposition_method="qr", alpha=6, modules_to_save=["other"]),
        said={"decomposition_method": "qr"},
        assumed={"alpha": 6},
        tolerance=1e-4,
    ),
    "deft, para": Case(
        LINE,
        DeftConfig(r=30, target_modules=["wide", "square"], para=True),
        said={"decomposition_method": "relu"},
        tolerance=1e-4,
    ),
    "deft, transposed": Case(
        gpt2,
        DeftConfig(r=2, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True),
        said={"decomposition_method": "relu"},
        tolerance=1e-4,
    ),
    "supertuning, linear": Case(LINE, SupertuningConfig(target_modules=_LINE, sparsity=0.9), base_needed=True),
    "supertuning, supra": Case(
        LINE,
        SupertuningConfig(target_modules=_LINE, sparsity=0.95, r=3, lora_alpha=5, modules_to_save=["other"]),
        said={"lora_alpha": 5},
    ),
    "supertuning, positions of the base": Case(
        LINE,
        SupertuningConfig(target_modules=_LINE, sparsity=0.9, save_precomputed_indices=False, select_top=False),
        said={"select_top": False},
        base_needed=True,
    ),
    "beft, linear": Case(LINE, BeftConfig(target_modules=_LINE, modules_to_save=["other"])),
    "ln_tuning, norm": Case(LINE, LNTuningConfig(target_modules=["norm"], modules_to_save=["other"]), lora=False),
    "ln_tuning, llama": Case(llama, LNTuningConfig(), lora=False),
    "osf, half": Case(LINE, OSFConfig(target_modules=_LINE, modules_to_save=["other"])),
    "osf, some": Case(LINE, OSFConfig(target_modules=_LINE, effective_rank=20)),
    "osf, patterns": Case(
        LINE, OSFConfig(target_modules=_LINE, effective_rank=10, rank_pattern={"tall": 5, "wide": 0.5})
    ),
    "peanut, shallow": Case(
        LINE, PeanutConfig(r=4, target_modules=_LINE), said={"act_fn": "relu", "scaling": 1.0}, tolerance=1e-4
    ),
    "peanut, deep": Case(
        LINE,
        PeanutConfig(r=4, depth=2, act_fn="tanh", scaling=0.5, target_modules=_LINE, modules_to_save=["other"]),
        said={"act_fn": "tanh", "scaling": 0.5},
    ),
    "trainable_tokens, embedding": Case(
        WORDS,
        TrainableTokensConfig(target_modules=["words"], token_indices=[1, 3, 4]),
        said={"token_indices": [1, 3, 4]},
        lora=False,
    ),
    "trainable_tokens, llama": Case(
        llama,
        TrainableTokensConfig(token_indices=[2, 5], task_type="CAUSAL_LM"),
        said={"token_indices": [2, 5]},
        lora=False,
    ),
    "prompt_tuning, llama": _prompt(PromptTuningConfig(num_virtual_tokens=4, **_TASK)),
    "prompt_tuning, encoder and decoder": Pair(
        t5,
        PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_2_SEQ_LM"),
        said={"task_type": "SEQ_2_SEQ_LM"},
        change=False,
    ),
    "beft, encoder and decoder": Pair(t5, BeftConfig(target_modules=["v"], task_type="SEQ_2_SEQ_LM")),
    "p_tuning, llama": _prompt(
        PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=6, **_TASK), assumed=_kind("P_TUNING")
    ),
    "prefix_tuning, llama": _prompt(PrefixTuningConfig(num_virtual_tokens=4, **_TASK), assumed=_kind("PREFIX_TUNING")),
    "prefix_tuning, projected": _prompt(
        PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=6, **_TASK),
        assumed=_kind("PREFIX_TUNING"),
    ),
    "cartridge, llama": _prompt(
        CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=2, **_TASK), assumed=_kind("CARTRIDGE")
    ),
    "cpt, llama": _prompt(CPTConfig(**_TASK, **_CPT), {"cpt_token_ids": [3, 4, 5]}, assumed=_kind("CPT")),
    "multitask_prompt_tuning, llama": _prompt(
        MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3, num_ranks=2, **_TASK), task=1
    ),
    "adaption_prompt, llama": Words(
        llama, AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **_TASK), change=False
    ),
    "lily, linear": Case(
        LINE, LilyConfig(r=3, num_B=2, scaling=1.5, target_modules=_LINE), said={"scaling": 1.5}, change=False
    ),
    "lily, shared": Words(
        llama,
        LilyConfig(r=3, num_B=3, stride_A=2, scaling=0.5, target_modules=_QV, modules_to_save=["lm_head"], **_TASK),
        said={"scaling": 0.5},
        change=False,
    ),
    "poly, llama": Words(
        llama,
        PolyConfig(r=3, n_tasks=3, n_skills=2, n_splits=2, target_modules=_QV, modules_to_save=["lm_head"], **_TASK),
        assumed=_TASK,
        change=False,
        task=1,
    ),
    "shadow, llama": Words(llama, ShadowConfig(r=3, **_TASK), said={"shadow_alpha": 0.1}, assumed=_TASK, change=False),
    "shadow, of its own size": Words(
        llama,
        ShadowConfig(
            r=3,
            shadow_alpha=0.3,
            update_hidden_size=5,
            shadow_hidden_size=16,
            shadow_num_hidden_layers=2,
            shadow_intermediate_size=24,
            **_TASK,
        ),
        said={"shadow_alpha": 0.3},
        assumed=_TASK,
        change=False,
    ),
}
try:
    from peft import AdamssConfig

    CASES |= {
        "adamss, linear": Case(
            LINE,
            AdamssConfig(r=10, num_subspaces=3, subspace_rank=2, target_modules=_LINE, modules_to_save=["other"]),
            tolerance=1e-4,
        ),
        "adamss, dynamic": Case(
            LINE,
            AdamssConfig(
                # Of the whole rank of `wide` and `tall`; `square` would be left to chance (test_adamss.py).
                r=100,
                num_subspaces=2,
                subspace_rank=4,
                use_dynamic_rank=True,
                random_seed=3,
                target_modules=_LINE[:2],
            ),
            assumed={"random_seed": 3},
            tolerance=1e-4,
        ),
    }
except ImportError:
    pass  # scikit-learn, which peft's AdaMSS needs, is not installed
