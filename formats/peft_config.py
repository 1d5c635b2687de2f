"""PEFT's LoRA config: what it says of a module's scale, and how to say it of a set of modules.

It stands in `adapter_config.json` of a PEFT folder and, with each field prefixed by its component, in the header
of a diffusers file (`lora_adapter_metadata`).  Sources: huggingface/peft 0.21.2 `tuners/lora/config.py`,
`utils/other.py` (`get_pattern_key`), `tuners/tuners_utils.py` (`check_target_module_exists`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from types import NoneType
from typing import Any

from adapterops.plugin import Certainty, ScaleRule, Update, errors

Config = Mapping[str, Any]

DERIVED = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "target_modules",
    "modules_to_save",
    "trainable_token_indices",
)
"""Fields that the tensors and their facts decide; the rest of a config only travels."""

NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields that narrow `target_modules`: void where that is made anew (peft refuses them beside a pattern)."""

REFUSED = {
    "use_qalora": "QA-LoRA pools the module's input",
    "use_bdlora": "BD-LoRA keeps block-diagonal factors",
    "kasa_config": "KaSA has a third factor",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
    "layer_replication": "the base's layers are replicated, so module names mean other layers",
    "target_parameters": "its factors act on bare parameters, not on modules",
    "arrow_config": "Arrow routes between several adapters",
    "megatron_config": "the factors are those of Megatron's parallel layers",
}
"""Fields that change what the factors mean in a way that this version does not model, and why."""

MUTATING = ("pissa", "olora", "corda", "lora_ga")
"""Values of `init_lora_weights` (or their beginnings) after which the base weights are no longer the published ones."""


KNOWN = (
    *(
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "inference_mode",
        "peft_version",
    ),
    *DERIVED,
    *NARROWING,
    *REFUSED,
    *("lora_dropout", "fan_in_fan_out", "bias", "init_lora_weights", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "monteclora_config", "runtime_config"),
    "ensure_weight_tying",
)
"""The fields of peft 0.21.2's LoraConfig: what `--set` may name."""
SCALE = ("lora_alpha", "alpha_pattern", "use_rslora")
"""Fields that say a scale."""
_CHOICES = {
    "bias": ("none", "all", "lora_only"),
    "task_type": (*(None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),),
}


def check_given(fields: Config) -> None:
    """Raise `UsageError` for a field of `--set` that peft does not have, or a value that it would refuse."""
    for name, value in fields.items():
        if name not in KNOWN:
            import difflib  # only ever needed for a message

            near = difflib.get_close_matches(name, KNOWN, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise errors.UsageError(f"--set {name}: PEFT's LoRA config has no such field{hint}")
        if name in _CHOICES and value not in _CHOICES[name]:
            known = ", ".join(str(v) for v in _CHOICES[name])
            raise errors.UsageError(f"--set {name}={value}: must be one of {known}")


def refuse_scale(fields: Config, title: str) -> None:
    """Raise `UsageError` where `--set` says a scale to a file that has no config to say it in."""
    name = next((n for n in SCALE if n in fields), None)
    if name is not None:
        raise errors.UsageError(
            f"--set {name}: the input is {title} and keeps no config; --alpha X says the alpha of modules that have none"
        )


def _bad(where: str, name: str, value: object, wanted: str) -> errors.AdapterOpsError:
    return errors.UnreadableFile(f"{where}: {name} is {json.dumps(value, default=str)[:80]}, not {wanted}")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """A checked config and the place it stands in."""

    fields: Config
    where: str
    certainty: Certainty = Certainty.READ

    @classmethod
    def parse(cls, fields: Config, where: str) -> LoraConfig:
        """Check the fields that have a meaning here.

        Raises `UnreadableFile` for a field of the wrong type, `UnsupportedFormat` for another method, or for an
        option of LoRA that changes the factors' meaning and is not modelled.
        """
        kind = fields.get("peft_type", "LORA")
        if str(kind).upper() != "LORA":
            raise errors.UnsupportedFormat(f"{where}: peft_type is {kind}; this version converts LORA only")
        for name, why in REFUSED.items():
            if fields.get(name):
                raise errors.UnsupportedFormat(
                    f"{where}: {name} is set ({why}); this version converts plain LoRA, DoRA and rsLoRA"
                )
        rank = fields.get("r", 8)
        if type(rank) is not int or rank <= 0:
            raise _bad(where, "r", rank, "a positive number")
        alpha = fields.get("lora_alpha", 8)
        if not _is_number(alpha):
            raise _bad(where, "lora_alpha", alpha, "a number")
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = fields.get(name) or {}
            if not isinstance(pattern, Mapping):
                raise _bad(where, name, pattern, "a table of patterns")
            for key, value in pattern.items():
                if not _is_number(value) or (name == "rank_pattern" and (value != int(value) or value <= 0)):
                    wanted = "a rank" if name == "rank_pattern" else "a number"
                    raise _bad(where, f"{name}[{key!r}]", value, wanted)
                _compile(where, name, f"(.*\\.)?({key})$")
        targets = fields.get("target_modules")
        if isinstance(targets, str):
            _compile(where, "target_modules", targets)
        elif targets is not None and not _is_names(targets):
            raise _bad(where, "target_modules", targets, "a list of names, a pattern, or null")
        excluded = fields.get("exclude_modules")
        if isinstance(excluded, str):
            _compile(where, "exclude_modules", excluded)
        elif excluded is not None and not _is_names(excluded):
            raise _bad(where, "exclude_modules", excluded, "a list of names, a pattern, or null")
        saved = fields.get("modules_to_save")
        if saved is not None and not _is_names(saved):
            raise _bad(where, "modules_to_save", saved, "a list of names or null")
        for name in saved or ():
            _compile(where, "modules_to_save", name)
        layers = fields.get("layers_to_transform")
        if layers is not None and type(layers) is not int and not _is_list_of(layers, int):
            raise _bad(where, "layers_to_transform", layers, "a layer number, a list of them, or null")
        patterns = fields.get("layers_pattern")
        if patterns is not None and not isinstance(patterns, str) and not _is_names(patterns):
            raise _bad(where, "layers_pattern", patterns, "a name, a list of them, or null")
        for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
            if not isinstance(fields.get(name, False), (bool, NoneType)):
                raise _bad(where, name, fields[name], "true or false")
        return cls(fields, where)

    @property
    def states_alpha(self) -> bool:
        """Whether the config says an alpha at all."""
        return "lora_alpha" in self.fields

    def rank(self, module: str) -> int:
        """The rank of a module."""
        return int(self._lookup("rank_pattern", module, self.fields.get("r", 8)))

    def rule(self, module: str) -> ScaleRule:
        """The scale rule of a module."""
        rslora = bool(self.fields.get("use_rslora", False))
        if not self.states_alpha:
            return ScaleRule(rslora=rslora)
        alpha = float(self._lookup("alpha_pattern", module, self.fields["lora_alpha"]))
        return ScaleRule(alpha, rslora, self.certainty, f"{self.where}: lora_alpha or alpha_pattern")

    def _lookup(self, field: str, module: str, default: Any) -> Any:
        for key, value in (self.fields.get(field) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return default

    def targets(self, module: str) -> bool:
        """Whether peft would put an adapter on `module`, were it in the base (True where that cannot be told)."""
        fields = self.fields
        excluded, wanted = fields.get("exclude_modules"), fields.get("target_modules")
        if shuts_out(fields.get("modules_to_save") or (), module):
            return False
        if wanted is None:
            return True
        if excluded and _named(module, excluded):
            return False
        if wanted == "all-linear":
            return True
        if not _named(module, wanted):
            return False
        layers = fields.get("layers_to_transform")
        if isinstance(wanted, str) or layers is None or layers == []:
            return True
        return _in_layers(module, layers, fields.get("layers_pattern"))

    @property
    def mutated_init(self) -> str | None:
        """The way of initialising that changed the base weights, if there was one."""
        init = str(self.fields.get("init_lora_weights", "")).lower()
        return init if init.startswith(MUTATING) else None


def shuts_out(modules_to_save: Iterable[str], module: str) -> bool:
    """Whether peft leaves `module` unadapted for the sake of saved ones (it reads their names as patterns)."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in modules_to_save)


_REPEATED_REPEAT = re.compile(r"[*+}]\??\)*\)[*+{]")
"""`(a+)+` and the like, which take exponential time on a name that does not match."""
_UNBOUNDED = re.compile(r"(?<!\\)[*+]|,\}")


def _compile(where: str, name: str, pattern: str) -> None:
    if len(pattern) > 100_000 or _REPEATED_REPEAT.search(pattern) or len(_UNBOUNDED.findall(pattern)) > 16:
        wanted = (
            f"a pattern that surely ends in bounded time (a repeat inside a repeat?); --set {name}=null leaves it out"
        )
        raise _bad(where, name, pattern, wanted)
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _bad(where, name, pattern, f"a regular expression ({error})") from error


def _is_number(value: object) -> bool:
    return type(value) is int or (isinstance(value, float) and isfinite(value))


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(v) is kind for v in value)


def _is_names(value: object) -> bool:
    return _is_list_of(value, str)


def _named(module: str, wanted: Any) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith("." + name) for name in wanted)


def _in_layers(module: str, layers: Any, patterns: Any) -> bool:
    wanted = [layers] if isinstance(layers, int) else list(layers)
    names = [patterns] if isinstance(patterns, str) else list(patterns or [])
    for name in names or [r"[^.]*"]:
        lead = r".*?\." if not names else r"(?:^|.*?\.)"
        match = re.match(rf"{lead}{name}\.(\d+)\.", module)
        if match:
            return int(match.group(1)) in wanted
    return False


# ---- from a set of modules to patterns ----------------------------------------------------------------------


def names_regex(names: Iterable[str]) -> str:
    """A regular expression that matches exactly `names`: a trie by dotted segments, equal branches joined."""
    branches: dict[str, list[str]] = {}
    ends = False
    for name in names:
        if name == "":
            ends = True
            continue
        first, _, rest = name.partition(".")
        branches.setdefault(first, []).append(rest)
    joined: dict[str, list[str]] = {}
    for first, rests in branches.items():
        joined.setdefault(names_regex(set(rests)), []).append(first)
    parts = []
    for rest, firsts in joined.items():
        firsts.sort(key=lambda s: (0, int(s), "") if s.isdigit() else (1, 0, s))
        head = re.escape(firsts[0]) if len(firsts) == 1 else "(?:" + "|".join(map(re.escape, firsts)) + ")"
        if rest.startswith("?"):
            parts.append(head + f"(?:\\.{rest[1:]})?")
        else:
            parts.append(head + (rf"\.{rest}" if rest else ""))
    body = parts[0] if len(parts) == 1 else "(?:" + "|".join(parts) + ")"
    if not parts:
        return ""
    return "?" + body if ends else body


def shortest_suffixes(chosen: set[str], among: Iterable[str]) -> dict[str, str]:
    """For every name in `chosen` its shortest dotted ending that no name of `among` outside `chosen` has too."""
    taken: dict[str, bool] = {}
    for name in among:
        inside = name in chosen
        for ending in _endings(name):
            taken[ending] = taken.get(ending, True) and inside
    # An ending that begins with a number would also fit a sibling without parameters, which no table lists.
    return {
        name: next((e for e in _endings(name) if taken.get(e, True) and not e[0].isdigit()), name) for name in chosen
    }


def _endings(name: str) -> list[str]:
    """The dotted endings of a name, shortest first, itself last."""
    out, at = [], len(name)
    while at >= 0:
        at = name.rfind(".", 0, at)
        out.append(name[at + 1 :])
    return out


def with_parents(names: Iterable[str]) -> set[str]:
    """The names and every module that contains them, as a walk over a model meets them."""
    out: set[str] = set()
    for name in names:
        parts = name.split(".")
        out.update(".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return out


def target_modules(adapted: set[str], base: set[str] | None, optional_prefix: str = "") -> list[str] | str:
    """`target_modules` that makes peft adapt exactly `adapted`.

    With the base's modules known, short endings where they are exact; otherwise a pattern of the full names,
    because an ending (even a whole name) could also fit a module that nobody has listed.
    """
    if base is not None:
        walk = with_parents(base)
        endings = sorted(set(shortest_suffixes(adapted, walk).values()))
        chosen = set(endings)
        exact = all(chosen.isdisjoint(_endings(n)) != (n in adapted) for n in walk)
        if exact and (not optional_prefix or not any(e.startswith(optional_prefix) for e in endings)):
            return endings
    return _optional(names_regex(sorted(adapted)), optional_prefix)


def _optional(pattern: str, prefix: str) -> str:
    escaped = re.escape(prefix)
    return pattern.replace(escaped, f"(?:{escaped})?", 1) if prefix and pattern.startswith(escaped) else pattern


def pattern_table(values: Mapping[str, Any], optional_prefix: str = "") -> tuple[Any, dict[str, Any]]:
    """The commonest of `values` and a table of patterns for the others, exact over the modules given.

    peft looks patterns up for adapted modules only, so an ending that no other adapted module has is exact.
    """
    counted = Counter(values.values())
    default = min(counted, key=lambda v: (-counted[v], str(v)))
    table: dict[str, Any] = {}
    for value in sorted((v for v in counted if v != default), key=str):
        chosen = {name for name, v in values.items() if v == value}
        for name, ending in sorted(shortest_suffixes(chosen, values).items()):
            key = _optional(re.escape(ending), optional_prefix)
            table[f"^{key}" if ending == name else key] = value
    return default, table


def number(value: float) -> int | float:
    """A number as people write it: 16, not 16.0."""
    return int(value) if value == int(value) else value


def from_updates(updates: Sequence[Update], base: set[str] | None, optional_prefix: str = "") -> dict[str, Any]:
    """The fields of `DERIVED` that describe the LoRA updates of one component.

    Raises `Conflict` where modules have different scale rules (a config knows one).
    """
    loras = [u for u in updates if u.method == "lora"]
    rules = {u.rslora for u in loras}
    if len(rules) > 1:
        raise errors.Conflict("some modules are scaled by alpha/rank and some by alpha/√rank; a config holds one rule")
    ranks = {u.module: u.tensors["B"].shape[1] for u in loras}
    alphas = {u.module: number(u.alpha.value) for u in loras if u.alpha is not None and u.alpha.value is not None}
    r, rank_pattern = pattern_table(ranks, optional_prefix)
    alpha, alpha_pattern = pattern_table(alphas, optional_prefix)
    fields: dict[str, Any] = {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": target_modules(set(ranks), base, optional_prefix),
        "use_rslora": rules.pop() if rules else False,
    }
    for name, role in (("use_dora", "magnitude"), ("lora_bias", "bias")):
        having = [u for u in loras if role in u.tensors]
        if having and len(having) != len(loras):
            lacking = next(u for u in loras if role not in u.tensors)
            raise errors.CannotRepresent(
                f"{having[0].name} has a {role} and {lacking.name} has none; a PEFT config says {name} for all or none"
            )
        if having:
            fields[name] = True
    return fields


def describes(config: Config, where: str, updates: Sequence[Update], problem: Callable[[str], None]) -> None:
    """Call `problem` with a sentence for everything that `config` and the tensors of `updates` say differently."""
    view = LoraConfig.parse(config, where)
    loras = [u for u in updates if u.method == "lora"]
    for update in loras:
        rank = update.tensors["B"].shape[1]
        if view.rank(update.module) != rank:
            problem(
                f"{update.tensors['B'].where} has rank {rank}, but {where} says {view.rank(update.module)} for it "
                f"(r or rank_pattern); --set r={rank}, or --set rank_pattern='{{\"…\": {rank}}}'"
            )
        if not view.targets(update.module):
            problem(
                f"{update.tensors['B'].where}: {where} targets no such module (target_modules, exclude_modules or "
                "layers_to_transform), so peft would ignore this tensor; --set target_modules=null derives it anew"
            )
        for name, role in (("use_dora", "magnitude"), ("lora_bias", "bias")):
            if bool(config.get(name, False)) != (role in update.tensors):
                has = "has no" if config.get(name) else "has a"
                problem(
                    f"{update.tensors['B'].where}: the module {has} {role}, but {where} says {name}="
                    f"{json.dumps(bool(config.get(name, False)))}; --set {name}={json.dumps(role in update.tensors)}"
                )
