"""The names of tensors in peft; diffusers writes those of LoRA too.

Sources: huggingface/peft 0.21.2 `tuners/*/layer.py`, `tuners/*/model.py` (`_get_adapter_state_dict`).  An adapter's own
name stands at `{adapter}` in a model's state dict and is removed by `save_pretrained`; people who save the state dict
themselves leave it in.
"""

from __future__ import annotations

from adapterops.plugin import PARAMETERS, Suffix

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

_VARIANTS = ("kasa", "bdlora", "qalora", "alora", "arrow", "lora_merged", "lora_parameters")
"""What a config may make of LoRA's tensors; a key alone reads as LoRA's, which stands behind them."""

MODULES = (
    *(Suffix(suffix.text, method, suffix.role) for method in _VARIANTS for suffix in LORA if not suffix.options),
    Suffix(".lora_diag{adapter}", "kasa", "diag"),
    *LORA,
    # KaSA's diagonal, and what MonteCLoRA and VeLoRA train with.
    Suffix(".lora_diag{adapter}", "lora", "diag"),
    *(
        Suffix(f".lora_monteclora_sampler{{adapter}}.{role}", "lora", f"monteclora_sampler.{role}")
        for role in ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")
    ),
    Suffix(".lora_velora_embed{adapter}", "lora", "velora_embed"),
    *(Suffix(f".hada_{role}{{adapter}}", "loha", role) for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(Suffix(f".lokr_{r}{{adapter}}", "lokr", r) for r in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    # (IA)³ starts from one here, and from zero in LyCORIS.
    Suffix(".ia3_l{adapter}", "ia3", "vector", {"initial": 1}),
    *(Suffix(f".lora_{role}{{adapter}}", "adalora", role) for role in ("A", "B", "E")),
    Suffix(".ranknum{adapter}", "adalora", "ranknum"),
    *_own("oft", "R", ends=".weight"),
    *_own("oft", "R", kind="embedding", ends=".weight"),
    # OFT before peft 0.16; with `oft_s` since 0.14.
    *_own("oft", "r", "s"),
    *_own("boft", "R", "s"),
    *_own("hra", "u"),
    Suffix(".road_theta{adapter}", "road", "theta"),
    # Not LoRA's alpha, of which there is one.
    Suffix(".road_alpha{adapter}", "road", "alphas"),
    Suffix(".psoft_R{adapter}.weight", "psoft", "R"),
    *(Suffix(f".psoft_R{{adapter}}.{role}", "psoft", role) for role in ("vector_a", "vector_b")),
    *(Suffix(f".glora_{p}{{adapter}}.{end}", "glora", f"{p}.{end}") for p in "ABCDE" for end in _PATHS),
    *_own("vera", "lambda_b", "lambda_d"),
    *_own("pvera", "lambda_b", "lambda_d"),
    *_own("randlora", "lambda", "gamma", "A", "B"),
    *_own("vblora", *(f"logits_{f}{end}" for f in "AB" for end in ("", "_topk_indices", "_topk_weights"))),
    # Of an embedding spelled alike: read as the last of the two, and then known by the base.
    *(Suffix(f".tinylora_{role}{{adapter}}", "tinylora", role, {"kind": "embedding"}) for role in "AB"),
    *_own("tinylora", "A", "B", "P"),
    *_own("unilora", *(f"{kind}_{f}" for kind in ("indices", "scales") for f in "AB")),
    *_own("frod", "lambda_l", "lambda_s_values"),
    *_own("fourierft", "spectrum"),
    *_own("waveft", "spectrum"),
    *_own("miss", "block"),
    # MiSS as peft 0.14 to 0.18 called it.
    Suffix(".bone_block{adapter}", "miss", "block"),
    *_own("gralora", "A", "B"),
    *_own("gralora", "A_general", "B_general", ends=".weight"),
    *_own("c3a", "kernel"),
    *_own("shira", "weight", "indices"),
    *_own("delora", "A", "B", "lambda", "w_norm"),
    *_own("hira", "A", "B"),
    *_own("hira", "A", "B", kind="embedding"),
    *_own("deft", "P", "R"),
    *_own("supertuning", "values", "indices"),
    *_own("supertuning", "lora_A", "lora_B", ends=".weight"),
    *_own("beft", "bias"),
    *(Suffix(f".ln_tuning_layers{{adapter}}.{role}", "ln_tuning", role) for role in sorted(PARAMETERS)),
    *_own("adamss", "newB"),
    # More than anyone has: peft's default is five groups.
    *(Suffix(f".adamss_{role}.{n}", "adamss", f"{role}.{n}") for role in "AB" for n in range(64)),
    *(Suffix(f".osf_svd_params{{adapter}}.{role}", "osf", role) for role in ("U_low", "S_low", "V_low")),
    Suffix(".trainable_tokens_delta{adapter}", "trainable_tokens", "delta", {"kind": "alone"}),
    *(Suffix(f".lily_{role}{{adapter}}.weight", "lily", role) for role in ("A", "B", "router")),
    *(Suffix(f".peanut_{role}{{adapter}}.weight", "peanut", role) for role in ("A", "B")),
    *(Suffix(f".peanut_{s}.{n}.weight", "peanut", f"{s}.{n}") for s in ("encoders", "decoders") for n in range(16)),
    *_own("poly", "lora_A", "lora_B"),
    Suffix(".poly_router{adapter}.module_logits", "poly", "router.module_logits"),
    Suffix(".adaption_prompt", "adaption_prompt", "prompt"),
    Suffix(".adaption_gate", "adaption_prompt", "gate"),
    # peft calls every adapter `default` here.
    *(Suffix(f".shadow_{role}.default.weight", "shadow", f"{role}.weight") for role in ("down", "up")),
    *(
        Suffix(f".shadow_{role}.default.{at}.{part}", "shadow", f"{role}.{at}.{part}")
        for role in ("update_gate", "update_transform")
        for at in (0, 2)
        for part in ("weight", "bias")
    ),
)
"""What stands behind a module's name."""

ONCE = (
    *(Suffix(f"vera_{role}{{adapter}}", "vera", role) for role in "AB"),
    *(Suffix(f"pvera_{role}{{adapter}}", "pvera", role) for role in "AB"),
    *(Suffix(f"randlora_{role}{{adapter}}", "randlora", role) for role in "AB"),
    Suffix("vblora_vector_bank{adapter}", "vblora", "bank"),
    Suffix("unilora_theta_d{adapter}", "unilora", "theta_d"),
    Suffix("tinylora_v.", "tinylora", "v"),
    *(Suffix(f"frod_{role}.", "frod", role) for role in ("V", "s_indices", "s_size")),
    *(Suffix(f"shadow_{role}.", "shadow", role) for role in ("backbone", "projection", "head")),
    Suffix("internal_xlora_classifier.", "xlora", "classifier"),
)
"""What stands once, behind `base_model.`."""

_PROMPTS = ("p_tuning", "cpt", "prefix_tuning", "cartridge", "multitask_prompt_tuning", "prompt_tuning")
"""The types of prompts that are spelled alike; what is read is the last one's until the config or the tensors say more."""

TOP = (
    *(Suffix("prompt_embeddings", method, "prompt_embeddings") for method in _PROMPTS),
    *(Suffix(f"prefix_task_{role}", m, f"prefix_task_{role}") for role in ("cols", "rows") for m in _PROMPTS[-2:]),
)
"""What stands once, at the top of the file."""
