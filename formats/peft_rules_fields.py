"""Rules about the fields of a PEFT config by themselves."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from adapterops_formats.peft_config import MUTATING, mistyped, unknown_fields
from adapterops_formats.peft_kinds import KINDS
from adapterops_formats.peft_rules_view import CONFIG_NAME, View, view

from adapterops.plugin import Certainty
from adapterops.storage.source import FOLDER_WEIGHTS
from adapterops.validation.registry import Checker, checker
from adapterops.validation.rule import Change, Finding, Rule, Severity, several
from adapterops.validation.subject import Subject

UNREADABLE = Rule(
    "C201",
    "config-unreadable",
    Severity.ERROR,
    why="peft reads adapter_config.json before anything else, so an adapter whose config is not JSON does not load at all.",
    remedy="Mend the JSON (a trailing comma, a byte order mark, a field that stands twice), or take the config of an earlier "
    "revision.",
    fires='{"peft_type": "LORA",}',
    passes='{"peft_type": "LORA"}',
    faults=("config-unreadable",),
    source="peft 0.21 config.py (from_json_file)",
)
NO_CONFIG = Rule(
    "C202",
    "no-config",
    Severity.ERROR,
    why="peft reads the method, the rank and the targets from adapter_config.json, and refuses a folder without it.",
    remedy="Put the adapter_config.json of the training run beside the weights, or write one: adapterops convert FOLDER "
    "--to peft (for a LoRA with --alpha X, the trainer's lora_alpha).",
    fires="adapter_model.safetensors alone in its folder",
    passes="the same beside an adapter_config.json",
    source="peft 0.21 config.py (from_pretrained)",
)
TYPE = Rule(
    "C203",
    "config-type",
    Severity.ERROR,
    why='A field of the wrong type makes peft fail while it loads, or means something else: the text "false" is true.',
    remedy="Give the field the type that the message names.",
    fires='"r": "8", "use_rslora": "false"',
    passes='"r": 8, "use_rslora": false',
    fixable=True,
    faults=("config-type",),
    source="peft 0.21 tuners/lora/layer.py (update_layer), utils/other.py (get_pattern_key)",
)
PATTERN = Rule(
    "C204",
    "bad-pattern",
    Severity.ERROR,
    why="peft compiles target_modules and the keys of patterns as regular expressions, and fails where one is none.",
    remedy="Mend the expression; re.escape writes a name that is to be taken literally.",
    fires='"alpha_pattern": {"(q_proj": 16}',
    passes='"alpha_pattern": {"q_proj": 16}',
    faults=("config-pattern",),
    source="peft 0.21 utils/other.py (get_pattern_key, match_target_against_key)",
)
SLOW_PATTERN = Rule(
    "C205",
    "slow-pattern",
    Severity.WARNING,
    why="A repeat around another repeat can take exponential time on a module name that does not match, so loading may hang.",
    remedy="Write the expression without nested repeats, or list the modules.",
    fires='"target_modules": "(.*a)*b"',
    passes='"target_modules": ".*a.*b"',
    faults=("config-slow-pattern",),
)
NO_TYPE = Rule(
    "C206",
    "no-peft-type",
    Severity.ERROR,
    why="peft picks the method by peft_type and fails with a KeyError where the field is missing.",
    remedy="Add the field; the tensors' names say which method it is.",
    fires='{"r": 8, "lora_alpha": 16}',
    passes='{"peft_type": "LORA", "r": 8, "lora_alpha": 16}',
    fixable=True,
    source="peft 0.21 config.py (_get_peft_type)",
)
UNKNOWN_TYPE = Rule(
    "C207",
    "unknown-peft-type",
    Severity.ERROR,
    why="peft fails with a KeyError for a peft_type that it does not have, as it does for one in small letters.",
    remedy="Load it with the fork of peft that wrote it, or correct the name; adapterops methods lists those of peft 0.21.",
    fires='"peft_type": "FINEGATES"',
    passes='"peft_type": "LORA"',
    fixable=True,
    faults=("peft-type-unknown",),
    source="peft 0.21 config.py (from_peft_type), utils/peft_types.py",
)
OTHER_TYPE = Rule(
    "C208",
    "other-peft-type",
    Severity.ERROR,
    why="peft looks for the tensors of the config's method only, and leaves an adapter untrained where the file holds another's.",
    remedy="Put the adapter's own config beside the weights; where only the field is wrong, correct peft_type.",
    fires='"peft_type": "IA3" beside …q_proj.lora_A.weight',
    passes='"peft_type": "LORA" beside …q_proj.lora_A.weight',
    faults=("peft-type",),
    source="peft 0.21 utils/save_and_load.py (set_peft_model_state_dict)",
)
UNKNOWN_FIELD = Rule(
    "C209",
    "unknown-field",
    Severity.WARNING,
    why="peft 0.21 drops a field that it does not know with a warning, so what the field does to the adapter is lost.",
    remedy="Load it with the peft that wrote it (see peft_version), or take the field out if it changes nothing.",
    fires='"peft_type": "LORA", "shiny_scale": 3',
    passes='"peft_type": "LORA", "shiny_scale": null',
    source="peft 0.21 config.py (from_peft_type)",
)
TASK = Rule(
    "C210",
    "unknown-task-type",
    Severity.ERROR,
    why="peft refuses a config whose task_type it does not know.",
    remedy="Write one of SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM, TOKEN_CLS, QUESTION_ANS and FEATURE_EXTRACTION, or null.",
    fires='"task_type": "CHAT"',
    passes='"task_type": "CAUSAL_LM"',
    source="peft 0.21 config.py (PeftConfigMixin.__post_init__)",
)
NO_TASK = Rule(
    "C211",
    "no-task-type",
    Severity.INFO,
    why="Where both task_type and auto_mapping are null, AutoPeftModel cannot tell which class the base model is of.",
    remedy='Write the task, e.g. "task_type": "CAUSAL_LM".',
    fires='"task_type": null, "auto_mapping": null',
    passes='"task_type": "CAUSAL_LM"',
    source="peft 0.21 auto.py",
)
TRAINING = Rule(
    "C212",
    "inference-mode",
    Severity.INFO,
    why="peft saves configs with inference_mode true; false is left from a training run, and loads an adapter that collects "
    "gradients where config objects are used as they stand.",
    remedy='Write "inference_mode": true.',
    fires='"inference_mode": false',
    passes='"inference_mode": true',
    fixable=True,
    source="peft 0.21 peft_model.py (save_pretrained)",
)
NO_BASE = Rule(
    "C213",
    "no-base-model",
    Severity.INFO,
    why="Nothing in the config says which model the adapter is for, so AutoPeftModel and serving tools cannot load it by "
    "itself.",
    remedy='Write the base\'s name on the Hub: "base_model_name_or_path": "owner/name".',
    fires='"base_model_name_or_path": null',
    passes='"base_model_name_or_path": "meta-llama/Llama-3.2-1B"',
    source="peft 0.21 auto.py",
)
LOCAL_BASE = Rule(
    "C214",
    "local-base-model",
    Severity.WARNING,
    why="A path on the trainer's disk names the base for nobody else, and may tell their user name.",
    remedy='Write the base\'s name on the Hub: "base_model_name_or_path": "owner/name".',
    fires='"base_model_name_or_path": "/home/ann/models/llama" or "gemma3-270m-it"',
    passes='"base_model_name_or_path": "google/gemma-3-270m-it" or "gpt2"',
)
LOCAL_CLASS = Rule(
    "C215",
    "local-base-class",
    Severity.WARNING,
    why="auto_mapping names a class in a script of the trainer's, which nobody else can import.",
    remedy="Publish the script and say in the card how the base model is made; or set auto_mapping to null.",
    fires='"auto_mapping": {"base_model_class": "Net", "parent_library": "modeling_finetune"}',
    passes='"auto_mapping": {"base_model_class": "ConvNeXt", "parent_library": "timm.models.convnext"}',
    source="peft 0.21 auto.py (check_import_allowlist)",
)
DUPLICATES = Rule(
    "C216",
    "duplicate-entries",
    Severity.INFO,
    why="peft adds its defaults to modules_to_save anew at each run, so names pile up in configs; they are read once.",
    remedy="Keep each name once.",
    fires='"modules_to_save": ["classifier", "classifier", "score"]',
    passes='"modules_to_save": ["classifier", "score"]',
    fixable=True,
    source="peft 0.21 peft_model.py (PeftModelForSequenceClassification)",
)
MUTATED = Rule(
    "C217",
    "mutated-base",
    Severity.WARNING,
    why="PiSSA, OLoRA, CorDA and LoRA-GA change the base's weights when they start, and on the published base the adapter "
    "computes something else than was trained.",
    remedy="Convert it with the adapter as it was before training: adapterops to-lora FOLDER --initial FOLDER_BEFORE "
    "(in peft: save_pretrained with path_initial_model_for_weight_conversion).",
    fires='"init_lora_weights": "pissa"',
    passes='"init_lora_weights": true',
    source="peft 0.21 tuners/lora/layer.py (pissa_init, olora_init, corda_init, lora_ga_init)",
)
BAD_INIT = Rule(
    "C218",
    "bad-init",
    Severity.ERROR,
    why="peft initialises an adapter before it loads the weights, and fails for an init_lora_weights that it does not know or "
    "that needs data which only training had.",
    remedy='Write "init_lora_weights": true: the weights are loaded over it.',
    fires='"init_lora_weights": "kaiming"',
    passes='"init_lora_weights": "gaussian"',
    fixable=True,
    source="peft 0.21 tuners/lora/layer.py (reset_lora_parameters)",
)
SECOND_CONFIG = Rule(
    "C219",
    "config-without-weights",
    Severity.INFO,
    why="The folder holds the config of another adapter whose weights are not there.",
    remedy="Add that adapter's weights, in a folder of their own, or take its config away.",
    fires="pixart__adapter_config.json without pixart__adapter_model.safetensors",
    passes="adapter_config.json beside adapter_model.safetensors",
)

_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_LOCAL = re.compile(r"^(?:[/~.\\]|[A-Za-z]:[\\/]|file:)|\\|/$|//|^[^/]+/[^/]+/.")
"""A path rather than a name on the Hub: absolute, relative, of Windows, or of more than two parts."""
_LOCAL_MODULE = re.compile(r"(?!(?:transformers|diffusers|timm)$)[^.]+$|transformers_modules\.")
"""A module that stands in no package; or code of a repository, which transformers keeps under that name."""
_WITHOUT_OWNER = re.compile(
    r"^(?:albert-(?:base|large|xlarge|xxlarge)-v[12]|bert-(?:base|large)-[a-z-]+|camembert-base|ctrl|distilbert-base-[a-z0-9-]+"
    r"|distilgpt2|distilroberta-base|gpt2(?:-medium|-large|-xl)?|openai-gpt|roberta-(?:base|large)(?:-mnli|-openai-detector)?"
    r"|t5-(?:small|base|large|3b|11b)|transfo-xl-wt103|xlm-(?:mlm|clm)-[a-z0-9-]+|xlm-roberta-(?:base|large)[a-z0-9-]*"
    r"|xlnet-(?:base|large)-cased)$"
)
"""The models on the Hub that have no owner in their names; no others can be added."""
_INITS = ("gaussian", "eva", "olora", "mica", "orthogonal", "lora_ga")
_WEIGHTS = "adapter_model"


@checker(NO_CONFIG)
def no_config(subject: Subject) -> Iterator[Finding]:
    """A PEFT folder without its config."""
    seen = view(subject)
    named_so = subject.is_folder or subject.place.name.startswith("adapter_model.")
    # (Of weights that peft would not look for anyway, what is lost is told by unknown-fact.)
    own = os.path.basename(subject.weights) in FOLDER_WEIGHTS
    lost = not own and any(u.alpha is not None and u.alpha.certainty is Certainty.UNKNOWN for u in subject.updates)
    if seen.is_peft and named_so and subject.config is None and CONFIG_NAME not in subject.files and not lost:
        yield NO_CONFIG.found(seen.weights, f"no {CONFIG_NAME} is beside it: peft refuses the adapter")


@checker(TYPE, NO_TYPE, UNKNOWN_TYPE, UNKNOWN_FIELD, TASK, NO_TASK, TRAINING, DUPLICATES)
def general(subject: Subject) -> Iterator[Finding]:
    """The fields of every config."""
    seen = view(subject)
    config = seen.config
    if config is None:
        return
    yield from _types(seen, config)
    yield from _method(seen, config)
    unknown = unknown_fields(seen.method, config) if seen.parsed is not None and not seen.is_anothers else []
    if unknown:
        told = ", ".join(f"{name[:60]}={_short(config[name])}" for name in unknown[:3])
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        yield UNKNOWN_FIELD.found(
            seen.where,
            f"{told}{more}: {'a field' if len(unknown) == 1 else 'fields'} that peft 0.21's {seen.method.title} config does "
            "not have, and drops with a warning",
            field=unknown[0],
        )
    task = config.get("task_type")
    if task is not None and task not in _TASKS:
        yield TASK.found(seen.where, f"task_type is {_short(task)}, which peft refuses", field="task_type")
    if task is None and not config.get("auto_mapping"):
        yield NO_TASK.found(
            seen.where, "neither task_type nor auto_mapping says what the base model is", field="task_type"
        )
    if config.get("inference_mode") is False:
        change = Change("set inference_mode to true", config={"inference_mode": True})
        yield TRAINING.found(
            seen.where, "inference_mode is false, as during training", field="inference_mode", change=change
        )
    yield from _duplicates(seen, config)


def _types(seen: View, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Fields whose types reading has no use for."""
    for name, wanted in mistyped(config):
        yield TYPE.found(seen.where, f"{name} is {_short(config[name])}, not {wanted}", field=name)
    dropout = config.get("lora_dropout")
    if isinstance(dropout, int | float) and not isinstance(dropout, bool) and not dropout <= 1:
        yield TYPE.found(
            seen.where,
            f"lora_dropout is {_short(dropout)}, no probability: torch refuses more than 1",
            field="lora_dropout",
        )
    # Tables of patterns that are null or a list: peft asks them for keys.  (AdaLoRA's rank_pattern is no such table.)
    if seen.method.kind not in ("LORA", "LOHA", "LOKR") or seen.is_anothers:
        return
    wrong = [n for n in ("rank_pattern", "alpha_pattern") if n in config and config[n] in (None, [], "", False)]
    if wrong:
        change = Change(f"set {' and '.join(wrong)} to {{}}", config={name: {} for name in wrong})
        yield TYPE.found(
            seen.where,
            f"{wrong[0]} is {_short(config[wrong[0]])}, not a table of patterns: peft fails with \"no attribute 'keys'\"",
            field=wrong[0],
            change=change,
        )


def _method(seen: View, config: Mapping[str, Any]) -> Iterator[Finding]:
    stated = config.get("peft_type")
    shown = {u.method for u in seen.updates}
    if not stated:
        known = len(shown) == 1
        change = (
            Change(f"set peft_type to {seen.method.kind}", config={"peft_type": seen.method.kind}) if known else None
        )
        has = "is missing" if "peft_type" not in config else f"is {_short(stated)}"
        yield NO_TYPE.found(
            seen.where, f"peft_type {has}: peft fails with a KeyError", field="peft_type", change=change
        )
    elif isinstance(stated, str) and stated not in KINDS and stated.upper() in KINDS:
        change = Change(f"set peft_type to {stated.upper()}", config={"peft_type": stated.upper()})
        yield UNKNOWN_TYPE.found(
            seen.where,
            f"peft_type is {_short(stated)}: peft knows it as {stated.upper()} only, and fails with a KeyError",
            field="peft_type",
            change=change,
        )


def _duplicates(seen: View, config: Mapping[str, Any]) -> Iterator[Finding]:
    changed: dict[str, list[Any]] = {}
    told: list[str] = []
    for name in ("modules_to_save", "target_modules", "exclude_modules"):
        names = config.get(name)
        if isinstance(names, list) and all(isinstance(n, str) for n in names) and len(set(names)) < len(names):
            changed[name] = list(dict.fromkeys(names))
            twice = [n for n in changed[name] if names.count(n) > 1]
            told.append(
                f"{name} has {len(names)} entries, of which {len(changed[name])} differ ({several(twice)} again)"
            )
    if changed:
        change = Change(f"keep each entry of {' and '.join(changed)} once", config=changed)
        yield DUPLICATES.found(seen.where, "; ".join(told), field=next(iter(changed)), change=change)


@checker(NO_BASE, LOCAL_BASE, LOCAL_CLASS)
def base_model(subject: Subject) -> Iterator[Finding]:
    """What the config says of the model that the adapter is for."""
    seen = view(subject)
    if seen.config is None:
        return
    base, field = seen.config.get("base_model_name_or_path"), "base_model_name_or_path"
    if base is None or base == "":
        mapping = seen.config.get("auto_mapping")
        cls = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
        beside = f"; auto_mapping names only its class, {str(cls)[:60]}" if cls else ""
        yield NO_BASE.found(seen.where, f"base_model_name_or_path is {_short(base)}{beside}", field=field)
    elif isinstance(base, str) and _LOCAL.search(base):
        yield LOCAL_BASE.found(
            seen.where, f"base_model_name_or_path is {_short(base)}, a path on one disk", field=field
        )
    elif isinstance(base, str) and "/" not in base and not _WITHOUT_OWNER.match(base):
        yield LOCAL_BASE.found(
            seen.where,
            f"base_model_name_or_path is {_short(base)}: no model on the Hub is called so without an owner, so it is a folder "
            "of the trainer's",
            field=field,
        )
    mapping = seen.config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, Mapping) else None
    if isinstance(library, str) and _LOCAL_MODULE.match(library):
        yield LOCAL_CLASS.found(
            seen.where,
            f"auto_mapping takes the base's class from {_short(library)}, a script and no package",
            field="auto_mapping",
        )


@checker(MUTATED, BAD_INIT)
def initialisation(subject: Subject) -> Iterator[Finding]:
    """Ways of starting that outlive training."""
    seen = view(subject)
    if seen.config is None or seen.method.kind not in ("LORA", "ADALORA"):
        return
    init = seen.config.get("init_lora_weights")
    change = Change("set init_lora_weights to true", config={"init_lora_weights": True})
    if isinstance(init, str) and (init.lower().startswith(MUTATING) or init == "loftq"):
        if init == "loftq":
            if not seen.config.get("loftq_config"):
                yield BAD_INIT.found(
                    seen.where, "init_lora_weights is 'loftq' without a loftq_config, which peft refuses",
                    field="init_lora_weights", remedy="Give loftq_config as it was in training.",
                )  # fmt: skip
            return
        if init == "corda":
            yield BAD_INIT.found(
                seen.where,
                "init_lora_weights is 'corda': without its statistics, which no file holds, peft fails to load it; and it was "
                "trained on base weights that the start had changed",
                field="init_lora_weights",
                remedy=MUTATED.remedy,
            )
            return
        yield MUTATED.found(
            seen.where,
            f"init_lora_weights is {_short(init)}: it was trained on base weights that the start had changed, and on the "
            "published ones it computes something else",
            field="init_lora_weights",
        )
    elif not _is_known(init):
        yield BAD_INIT.found(
            seen.where,
            f"init_lora_weights is {_short(init)}, which peft 0.21 does not know, and fails",
            field="init_lora_weights",
            change=change if isinstance(init, str) else None,
        )


def _is_known(init: Any) -> bool:
    return not isinstance(init, str) or not init or init in _INITS or init.lower() in ("gaussian", "olora", "mica")


@checker(SECOND_CONFIG)
def second_config(subject: Subject) -> Iterator[Finding]:
    """Configs in the folder whose weights are not."""
    if not subject.is_folder or CONFIG_NAME not in subject.files:
        return
    for name in subject.files:
        if name == CONFIG_NAME or not name.endswith(CONFIG_NAME):
            continue
        stem = name.removesuffix(CONFIG_NAME)
        if not any(other.startswith(stem + _WEIGHTS) for other in subject.files):
            yield SECOND_CONFIG.found(
                f"{subject.place.folder.path}/{name}",
                f"is the config of an adapter whose weights ({stem}{_WEIGHTS}.safetensors) are not in the folder",
            )


def _short(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)[:80]


RULES: tuple[Rule, ...] = (
    UNREADABLE,
    NO_CONFIG,
    TYPE,
    PATTERN,
    SLOW_PATTERN,
    NO_TYPE,
    UNKNOWN_TYPE,
    OTHER_TYPE,
    UNKNOWN_FIELD,
    TASK,
    NO_TASK,
    TRAINING,
    NO_BASE,
    LOCAL_BASE,
    LOCAL_CLASS,
    DUPLICATES,
    MUTATED,
    BAD_INIT,
    SECOND_CONFIG,
)
CHECKERS: tuple[Checker, ...] = (no_config, general, base_model, initialisation, second_config)
