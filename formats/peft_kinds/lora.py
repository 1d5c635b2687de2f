"""LoRA in PEFT configs.  Source: huggingface/peft 0.21.2 `tuners/lora/config.py`."""

from __future__ import annotations

from adapterops_formats.peft_kinds.row import PeftMethod, defaults

LORA = PeftMethod(
    "LORA",
    "lora",
    "LoRA",
    alpha="lora_alpha",
    rslora="use_rslora",
    roles=(("use_dora", "magnitude"), ("lora_bias", "bias")),
    flags=("fan_in_fan_out",),
    tokens=True,
    biases=True,
    known=(
        *("lora_dropout", "bias", "init_lora_weights", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "velora_config", "qalora_group_size", "monteclora_config", "runtime_config"),
        "ensure_weight_tying",
    ),
    refused={
        "use_qalora": "QA-LoRA pools the module's input",
        "use_bdlora": "BD-LoRA keeps block-diagonal factors",
        "kasa_config": "KaSA has a third factor",
        "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
        "layer_replication": "the base's layers are replicated, so module names mean other layers",
        "target_parameters": "its factors act on bare parameters, not on modules",
        "arrow_config": "Arrow routes between several adapters",
        "megatron_config": "the factors are those of Megatron's parallel layers",
    },
    defaults=defaults(
        "LORA",
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=False,
        init_lora_weights=True,
        modules_to_save=None,
    ),
)
