"""The names of LoRA's tensors in peft, which diffusers writes too.

Source: huggingface/peft 0.21.2 `tuners/lora/layer.py`, `tuners/lora/model.py` (`_get_adapter_state_dict`).  An
adapter's own name stands at `{adapter}` in a model's state dict and is removed by `save_pretrained`; people who
save the state dict themselves leave it in.
"""

from __future__ import annotations

from adapterops.plugin import Suffix

LORA = (
    Suffix(".lora_A{adapter}.weight", "lora", "A"),
    Suffix(".lora_B{adapter}.weight", "lora", "B"),
    Suffix(".lora_B{adapter}.bias", "lora", "bias"),
    Suffix(".lora_embedding_A{adapter}", "lora", "A", {"kind": "embedding"}),
    Suffix(".lora_embedding_B{adapter}", "lora", "B", {"kind": "embedding"}),
    Suffix(".lora_magnitude_vector{adapter}", "lora", "magnitude"),
    # A model's own state dict since peft 0.10, where the magnitude became a module.
    Suffix(".lora_magnitude_vector{adapter}.weight", "lora", "magnitude"),
)
