"""The methods of PEFT that are converted, as rows: how their configs and keys say what an update is.

Source: huggingface/peft 0.21.2 `tuners/*/config.py`, `tuners/*/layer.py`, `utils/save_and_load.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterops_formats import peft_conv, peft_ia3, peft_lokr
from adapterops_formats.peft_patterns import Base

from adapterops.plugin import METHODS, Update

Fields = Callable[[Sequence[Update], Base], dict[str, Any]]
Problems = Callable[[Any, Sequence[Update], Base], Iterable[str]]
Ranks = Callable[[Sequence[Update], Base], dict[str, int]]


def _no_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    return {}


def _no_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    return iter(())


def _own_ranks(updates: Sequence[Update], base: Base) -> dict[str, int]:
    return {u.module: METHODS[u.method].rank(u) or 0 for u in updates}


@dataclass(frozen=True, slots=True)
class PeftMethod:
    """One `peft_type`.

    `alpha` and `rslora` name the fields of a config that say the scale ("" where there is none); `roles` the fields that
    say for all modules whether they have a tensor.  `shaping` are fields that follow from the tensors' shapes and nothing
    else: `fields` derives them, `problems` names where a config contradicts the tensors, `ranks` gives r.
    `known` lists further fields; `refused` those that change what the tensors mean, with the reason.
    """

    kind: str
    method: str
    title: str
    alpha: str = ""
    rslora: str = ""
    roles: tuple[tuple[str, str], ...] = ()
    shaping: tuple[str, ...] = ()
    narrowing: tuple[str, ...] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    flags: tuple[str, ...] = ()
    tokens: bool = False
    """Whether `trainable_token_indices` may stand beside it."""
    biases: bool = False
    """Whether `bias` may say that biases are saved."""
    known: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a config that is written anew says where nothing is known: fields that every peft with the method has."""
    fields: Fields = _no_fields
    problems: Problems = _no_problems
    ranks: Ranks = _own_ranks

    @property
    def scale(self) -> tuple[str, ...]:
        """The fields that say a scale."""
        return tuple(name for name in (self.alpha, "alpha_pattern" if self.alpha else "", self.rslora) if name)

    @property
    def derived(self) -> tuple[str, ...]:
        """The fields that the tensors and their facts decide; the rest of a config only travels."""
        ranked = ("r", "rank_pattern") if self.alpha else ()
        tokens = ("trainable_token_indices",) if self.tokens else ()
        roles = tuple(name for name, _ in self.roles)
        return (*ranked, *self.scale, *roles, *self.shaping, "target_modules", "modules_to_save", *tokens)

    @property
    def all_fields(self) -> tuple[str, ...]:
        """Every field of the method's config: what `--set` may name."""
        return (*_EVERYWHERE, *self.derived, *self.narrowing, *self.flags, *self.refused, *self.known)


_EVERYWHERE = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"),
    "peft_version",
)
_LYCORIS = {"rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True, "modules_to_save": None}


def _defaults(kind: str, own: Mapping[str, Any]) -> dict[str, Any]:
    return {"peft_type": kind, "task_type": None, "base_model_name_or_path": None, "inference_mode": True, **own}


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
    defaults=_defaults(
        "LORA",
        {
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
        },
    ),
)
LOHA = PeftMethod(
    "LOHA",
    "loha",
    "LoHa",
    alpha="alpha",
    shaping=("use_effective_conv2d",),
    known=("rank_dropout", "module_dropout", "init_weights"),
    defaults=_defaults("LOHA", _LYCORIS),
    fields=peft_conv.effective,
    problems=peft_conv.problems,
)
LOKR = PeftMethod(
    "LOKR",
    "lokr",
    "LoKr",
    alpha="alpha",
    shaping=("decompose_both", "decompose_factor", "use_effective_conv2d"),
    known=("rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights"),
    defaults=_defaults("LOKR", _LYCORIS),
    fields=peft_lokr.fields,
    problems=peft_lokr.problems,
    ranks=peft_lokr.ranks,
)
IA3 = PeftMethod(
    "IA3",
    "ia3",
    "(IA)³",
    shaping=("feedforward_modules",),
    narrowing=("exclude_modules",),
    flags=("fan_in_fan_out",),
    known=("init_ia3_weights",),
    defaults=_defaults("IA3", {"fan_in_fan_out": False, "init_ia3_weights": True, "modules_to_save": None}),
    fields=peft_ia3.fields,
    problems=peft_ia3.problems,
)

KINDS: Mapping[str, PeftMethod] = {spec.kind: spec for spec in (LORA, LOHA, LOKR, IA3)}
"""By `peft_type`."""
BY_METHOD: Mapping[str, PeftMethod] = {spec.method: spec for spec in KINDS.values()}
"""By the method of an update."""
CONVERTED = ", ".join(KINDS)
"""The types that are converted, for messages."""
