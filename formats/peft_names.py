"""The names of tensors in peft; diffusers writes those of LoRA too.

Sources: huggingface/peft 0.21.2 `tuners/lora/layer.py`, `tuners/lora/model.py` (`_get_adapter_state_dict`),
`tuners/loha/layer.py`, `tuners/lokr/layer.py`, `tuners/ia3/layer.py`.  An
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
LOHA = tuple(Suffix(f".hada_{role}{{adapter}}", "loha", role) for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
LOKR = tuple(
    Suffix(f".lokr_{role}{{adapter}}", "lokr", role) for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
)
# (IA)³ starts from one here, and from zero in LyCORIS.
IA3 = (Suffix(".ia3_l{adapter}", "ia3", "vector", {"initial": 1}),)
