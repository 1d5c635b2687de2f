"""The names of tensors in peft; diffusers writes those of LoRA too.

Sources: huggingface/peft 0.21.2 `tuners/*/layer.py`, `tuners/*/model.py` (`_get_adapter_state_dict`).  An adapter's own
name stands at `{adapter}` in a model's state dict and is removed by `save_pretrained`; people who save the state dict
themselves leave it in.
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
"""The LoRA that diffusers writes too."""


def _own(method: str, *texts: str, kind: str = "", ends: str = "") -> tuple[Suffix, ...]:
    """`.{method}_X` for each X, which is the role."""
    options = {"kind": kind} if kind else {}
    middle = f"{kind}_" if kind else ""
    return tuple(Suffix(f".{method}_{middle}{text}{{adapter}}{ends}", method, text, options) for text in texts)


_PATHS = ("Xd", "Xu", "X", "zeros")
"""How a path of GLoRA may be parametrised."""

MODULES = (
    *LORA,
    *(Suffix(f".hada_{role}{{adapter}}", "loha", role) for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(Suffix(f".lokr_{r}{{adapter}}", "lokr", r) for r in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    # (IA)³ starts from one here, and from zero in LyCORIS.
    Suffix(".ia3_l{adapter}", "ia3", "vector", {"initial": 1}),
    *(Suffix(f".lora_{role}{{adapter}}", "adalora", role) for role in ("A", "B", "E")),
    Suffix(".ranknum{adapter}", "adalora", "ranknum"),
    *_own("oft", "R", ends=".weight"),
    *_own("oft", "R", kind="embedding", ends=".weight"),
    *_own("boft", "R", "s"),
    *_own("hra", "u"),
    *_own("road", "theta", "alpha"),
    *(Suffix(f".psoft_R{{adapter}}.{role}", "psoft", role) for role in ("weight", "vector_a", "vector_b")),
    *(Suffix(f".glora_{p}{{adapter}}.{end}", "glora", f"{p}.{end}") for p in "ABCDE" for end in _PATHS),
    *_own("vera", "lambda_b", "lambda_d"),
    *_own("pvera", "lambda_b", "lambda_d"),
    *_own("randlora", "lambda", "gamma", "A", "B"),
    *_own("vblora", *(f"logits_{f}{end}" for f in "AB" for end in ("", "_topk_indices", "_topk_weights"))),
    *_own("tinylora", "A", "B", "P"),
    *_own("frod", "lambda_l", "lambda_s_values"),
    *_own("fourierft", "spectrum"),
    *_own("waveft", "spectrum"),
    *_own("miss", "block"),
    # MiSS as peft 0.14 to 0.17 called it.
    Suffix(".bone_block{adapter}", "miss", "block"),
    *_own("gralora", "A", "B", "A_general", "B_general"),
    *_own("c3a", "kernel"),
    *_own("shira", "weight", "indices"),
    *_own("delora", "A", "B", "lambda", "w_norm"),
    *_own("hira", "A", "B"),
    *_own("hira", "A", "B", kind="embedding"),
    *_own("deft", "P", "R"),
    *_own("supertuning", "values", "indices", "lora_A", "lora_B"),
    *_own("beft", "bias"),
    *(Suffix(f".ln_tuning_layers{{adapter}}.{role}", "ln_tuning", role) for role in ("weight", "bias")),
    *(Suffix(f".osf_svd_params{{adapter}}.{role}", "osf", role) for role in ("U_low", "S_low", "V_low")),
    Suffix(".trainable_tokens_delta{adapter}", "trainable_tokens", "delta", {"kind": "alone"}),
    *(Suffix(f".lily_{role}{{adapter}}.weight", "lily", role) for role in ("A", "B", "router")),
    *(Suffix(f".peanut_{role}{{adapter}}.weight", "peanut", role) for role in ("A", "B")),
    *_own("poly", "lora_A", "lora_B"),
    Suffix(".poly_router{adapter}.module_logits", "poly", "module_logits"),
)
"""What stands behind a module's name."""

ONCE = (
    *(Suffix(f"vera_{role}{{adapter}}", "vera", role) for role in "AB"),
    *(Suffix(f"pvera_{role}{{adapter}}", "pvera", role) for role in "AB"),
    *(Suffix(f"randlora_{role}{{adapter}}", "randlora", role) for role in "AB"),
    Suffix("vblora_vector_bank{adapter}", "vblora", "vector_bank"),
    Suffix("unilora_theta_d{adapter}", "unilora", "theta_d"),
    Suffix("tinylora_v.", "tinylora", "v"),
    *(Suffix(f"frod_{role}.", "frod", role) for role in ("V", "s_indices", "s_size")),
)
"""What stands once, behind `base_model.`."""

TOP = (Suffix("prompt_embeddings", "prompt_tuning", "embeddings"),)
"""What stands once, at the top of the file."""
