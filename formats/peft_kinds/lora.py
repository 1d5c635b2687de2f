"""LoRA in PEFT configs.  Source: huggingface/peft 0.21.2 `tuners/lora/config.py`."""

from __future__ import annotations

from adapterops_formats import peft_lora
from adapterops_formats.peft_kinds.row import PeftMethod, defaults

LORA = PeftMethod(
    "LORA",
    "lora",
    "LoRA",
    also=peft_lora.VARIANTS,
    alpha="lora_alpha",
    rslora="use_rslora",
    roles=(("use_dora", "magnitude"), ("lora_bias", "bias")),
    shaping=peft_lora.FIELDS,
    flags=("fan_in_fan_out",),
    tokens=True,
    biases=True,
    known=(
        *("lora_dropout", "bias", "init_lora_weights", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    ),
    legacy=("enable_lora", "merge_weights"),
    bare=("lora_parameters",),
    refused={
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
    fields=peft_lora.fields,
    problems=peft_lora.problems,
    options=peft_lora.options,
    meant=peft_lora.meant,
    fitted=peft_lora.fitted,
    needs="lora_alpha (--alpha); for KaSA's whole change the base's weight (--base-weights)",
    lost=("alora_invocation_tokens", "use_qalora or use_bdlora, where lora_A is narrow", "layer_replication"),
)
