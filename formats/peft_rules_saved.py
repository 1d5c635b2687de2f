"""Rules about what a PEFT file saves beside the adapter: whole modules, biases, rows of embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from adapterops_formats.peft_patterns import shuts_out
from adapterops_formats.peft_rules_view import View, view

from adapterops.validation.registry import Checker, checker
from adapterops.validation.rule import Change, Finding, Rule, Severity, several
from adapterops.validation.subject import Subject

NOT_SAVED = Rule(
    "C250",
    "listed-not-saved",
    Severity.WARNING,
    why="modules_to_save lists a module of which the file holds nothing; where the base has it, peft fails with a KeyError.",
    remedy="Take the name out if the base has no such module; if it was trained, take the tensors from an earlier checkpoint.",
    fires='"modules_to_save": ["lm_head"] without base_model.model.lm_head.weight',
    passes='"modules_to_save": ["lm_head"] with it',
    source="peft 0.21 utils/save_and_load.py (set_peft_model_state_dict)",
)
DEFAULT_HEAD = Rule(
    "C251",
    "default-head-not-saved",
    Severity.INFO,
    why="For classification peft lists both classifier and score whatever the base calls its head; the one that it does not have "
    "does nothing.",
    remedy="Nothing needs doing; the name may be taken out.",
    fires='"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"] with classifier saved alone',
    passes='"task_type": "SEQ_CLS", "modules_to_save": ["classifier"] with classifier saved',
    source="peft 0.21 peft_model.py (PeftModelForSequenceClassification)",
)
BASE_NOT_SAVED = Rule(
    "C252",
    "listed-in-base-not-saved",
    Severity.ERROR,
    why="peft looks up the tensors of every module of the base that modules_to_save names, and fails with a KeyError where the "
    "file has none.",
    remedy="Take the name out of modules_to_save, or take the tensors from an earlier checkpoint.",
    fires='"modules_to_save": ["lm_head"] without base_model.model.lm_head.weight, with --base of a Llama',
    passes='"modules_to_save": ["lm_head"] with base_model.model.lm_head.weight',
    source="peft 0.21 utils/save_and_load.py (set_peft_model_state_dict)",
)
UNLISTED = Rule(
    "C253",
    "saved-not-listed",
    Severity.WARNING,
    why="A saved module that modules_to_save does not list is written over the base's own: it stays there when the adapter is "
    "switched off, and loaders that go by the list drop it.",
    remedy="Add the module's name to modules_to_save.",
    fires='base_model.model.norm.weight with "modules_to_save": null',
    passes='base_model.model.norm.weight with "modules_to_save": ["norm"]',
    fixable=True,
    source="peft 0.21 utils/save_and_load.py (set_peft_model_state_dict)",
)
UNLISTED_HEAD = Rule(
    "C254",
    "unlisted-by-peft",
    Severity.INFO,
    why="peft lists classification heads by itself when it loads and saves resized embeddings unasked, so the config does not "
    "name them; other loaders go by the config and drop them.",
    remedy="Add the module's name to modules_to_save.",
    fires='base_model.model.score.weight with "task_type": "SEQ_CLS", "modules_to_save": null',
    passes='the same with "modules_to_save": ["score"]',
    fixable=True,
    source="peft 0.21 peft_model.py (PeftModelForSequenceClassification), utils/save_and_load.py (save_embedding_layers)",
)
IGNORED = Rule(
    "C255",
    "saved-under-adapter",
    Severity.ERROR,
    why="peft keeps the layer that it adapts as base_layer, and drops a weight or bias that is saved under the layer's own name.",
    remedy="Rename the tensor to ….base_layer.bias (or .weight); peft loads it then.",
    fires="…q_proj.bias beside …q_proj.lora_A.weight",
    passes="…q_proj.base_layer.bias beside …q_proj.lora_A.weight",
    source="peft 0.21 tuners/tuners_utils.py (BaseTunerLayer), utils/save_and_load.py",
)
TOKENS = Rule(
    "C256",
    "token-indices",
    Severity.ERROR,
    why="trainable_token_indices without the trained rows makes peft fail with a KeyError, and rows without it are dropped.",
    remedy="Write the indices that were trained, or set the field to null where no rows are saved.",
    fires='"trainable_token_indices": [1, 2] without ….token_adapter.trainable_tokens_delta',
    passes='"trainable_token_indices": [1, 2] with ….trainable_tokens_delta [2, 2048]',
    source="peft 0.21 utils/other.py (TrainableTokensWrapper)",
)
BAD_BIAS = Rule(
    "C257",
    "unknown-bias",
    Severity.ERROR,
    why="peft knows three values of bias and refuses others.",
    remedy='Write "none", or "all" or "lora_only" where biases were trained.',
    fires='"bias": "some"',
    passes='"bias": "none"',
    source="peft 0.21 tuners/lora/model.py (_mark_only_adapters_as_trainable)",
)
NO_BIASES = Rule(
    "C258",
    "biases-not-saved",
    Severity.WARNING,
    why="bias says that the base's biases were trained, and the file holds none, so that part of the training is lost.",
    remedy='Take the biases from an earlier checkpoint (peft saves them with bias "all" only); if none was trained, write '
    '"bias": "none".',
    fires='"bias": "lora_only" without ….base_layer.bias, with --base of a model that has biases',
    passes='"bias": "none", or "bias": "all" with them',
    source="peft 0.21 utils/save_and_load.py (get_peft_model_state_dict)",
)
TWICE = Rule(
    "C259",
    "adapted-inside-saved",
    Severity.ERROR,
    why="peft before 0.13 put modules_to_save around a head that it had adapted already; a later one drops the factors, or fails "
    "with a KeyError.",
    remedy="Save the head's weight + scale · lora_B · lora_A as its weight, without the factors, and take it out of "
    "target_modules.",
    fires="…score.modules_to_save.lora_A.weight beside …score.base_layer.weight",
    passes="…score.weight",
    faults=("wrapped-twice",),
    source="peft 0.10 peft_model.py (PeftModelForSequenceClassification), utils/other.py (ModulesToSaveWrapper)",
)

_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "shared", "word_embeddings", "embed_in", "embed_out")
"""What models call their embeddings, which peft saves unasked when they were resized."""


@checker(NOT_SAVED, DEFAULT_HEAD, BASE_NOT_SAVED)
def listed(subject: Subject) -> Iterator[Finding]:
    """modules_to_save against what is saved."""
    seen = view(subject)
    if not _applies(seen):
        return
    names = _listed(seen)
    saved = [path for module in seen.saved for path in _path(module)]
    missing = [n for n in dict.fromkeys(names) if not any(path.endswith(n) for path in saved)]
    # A name that keeps adapted modules from being such is told of with the targets.
    missing = [n for n in missing if not any(shuts_out([n], module) for module in seen.keys)]
    in_base = [n for n in missing if seen.base is not None and any(m.endswith(n) for m in seen.base.names or ())]
    has_head = any(path.endswith(head) for head in seen.heads for path in saved)
    default = [n for n in missing if n in seen.heads and n not in in_base and (has_head or seen.base is not None)]
    rest = [n for n in missing if n not in in_base and n not in default]
    if not has_head and seen.heads and not names:
        # peft adds them all the same.
        heads = " or ".join(seen.heads)
        task = (seen.config or {}).get("task_type")
        yield NOT_SAVED.found(
            seen.where,
            f"task_type is {task}, for which peft loads {heads} as a saved module, and the file holds neither: peft fails with a "
            "KeyError where the base has one",
            field="modules_to_save",
        )
    for rule, found, told in (
        (BASE_NOT_SAVED, in_base, "which the base has and the file does not: peft fails with a KeyError"),
        (DEFAULT_HEAD, default, "which peft lists for every such task, and of which the file holds nothing"),
        (NOT_SAVED, rest, "of which the file holds nothing: where the base has it, peft fails with a KeyError"),
    ):
        if found:
            yield rule.found(seen.where, f"modules_to_save lists {several(found)}, {told}", field="modules_to_save")


@checker(UNLISTED, UNLISTED_HEAD, IGNORED)
def unlisted(subject: Subject) -> Iterator[Finding]:
    """What is saved against modules_to_save."""
    seen = view(subject)
    if not _applies(seen) or seen.config is None or seen.lost("modules_to_save"):
        return
    names = _listed(seen)
    under = {m: keys for m, keys in seen.saved.items() if m in seen.keys and not _is_listed(m, names)}
    if under:
        yield IGNORED.found(
            seen.weights,
            f"{several(_flat(under), 1)}: peft calls the adapted layer's own parameters base_layer.…, and drops "
            f"{'it' if len(_flat(under)) == 1 else 'them'} in silence",
            _flat(under),
        )
    biases = seen.config.get("bias") == "all"
    found: dict[Rule, dict[str, list[str]]] = {UNLISTED: {}, UNLISTED_HEAD: {}}
    for module, keys in seen.saved.items():
        if module in under or _is_listed(module, names) or (biases and all(k.endswith(".bias") for k in keys)):
            continue
        usual = _is_listed(module, seen.heads) or module.rpartition(".")[2] in _EMBEDDINGS
        found[UNLISTED_HEAD if usual else UNLISTED][module] = keys
    plain = seen.parsed.fields.get("modules_to_save") if seen.parsed is not None else None
    for rule, modules in found.items():
        if not modules:
            continue
        add = list(dict.fromkeys(_name(module, seen) for module in modules))
        change = Change(f"add {several(add)} to modules_to_save", config={"modules_to_save": [*(plain or ()), *add]})
        # What stands twice in the list is mended first.
        safe = plain is None or (isinstance(plain, list) and len(set(plain)) == len(plain))
        yield rule.found(
            seen.where,
            f"{several(modules)} {'is' if len(modules) == 1 else 'are'} saved whole, and modules_to_save is "
            f"{json.dumps(plain, default=str)[:80]}",
            _flat(modules),
            field="modules_to_save",
            change=change if safe and not (found[UNLISTED] and rule is UNLISTED_HEAD) else None,
        )


@checker(TOKENS)
def tokens(subject: Subject) -> Iterator[Finding]:
    """Rows of an embedding that are trained beside another method."""
    seen = view(subject)
    if not _applies(seen) or not seen.method.tokens or seen.config is None or subject.recognised is None:
        return
    rows = [c.key for c in subject.recognised[1].claims if c.suffix.method == "trainable_tokens"]
    stated = seen.config.get("trainable_token_indices")
    if stated not in (None, {}) and not rows:
        yield TOKENS.found(
            seen.where,
            f"trainable_token_indices is {json.dumps(stated)[:60]}, and the file holds no trained rows: peft fails with a "
            "KeyError",
            field="trainable_token_indices",
        )
    elif rows and not stated:
        yield TOKENS.found(
            seen.where,
            f"{rows[0]!r} holds trained rows of an embedding, and trainable_token_indices does not say of which tokens: peft "
            "drops them",
            rows,
            field="trainable_token_indices",
        )


@checker(BAD_BIAS, NO_BIASES)
def biases(subject: Subject) -> Iterator[Finding]:
    """The field bias."""
    seen = view(subject)
    if seen.config is None or seen.parsed is None or seen.is_anothers or not seen.method.biases:
        return
    stated = seen.config.get("bias", "none")
    known = ("none", "all", seen.method.bias_only)
    if stated not in known:
        yield BAD_BIAS.found(
            seen.where,
            f"bias is {json.dumps(stated, default=str)[:40]}, and peft knows {', '.join(known)} only",
            field="bias",
        )
    elif stated != "none" and seen.base is not None and seen.keys and subject.adapter is not None:
        if any(u.method == "saved" and "bias" in u.tensors for u in subject.updates):
            return
        base = subject.adapter.base
        parts = base.components.get(subject.adapter.components[0]) if base is not None else None
        having = [m for m in seen.keys if parts is not None and (spec := parts.spec(m)) is not None and spec.bias]
        if having:
            yield NO_BIASES.found(
                seen.where,
                f"bias is {json.dumps(stated)}, and {len(having)} adapted modules of the base have one "
                f"({several(having, 1)}), but the file holds no bias",
                field="bias",
            )


def _applies(seen: View) -> bool:
    return seen.parsed is not None and not seen.is_anothers and seen.method.saves and bool(seen.subject.updates)


def _listed(seen: View) -> list[str]:
    names = seen.parsed.fields.get("modules_to_save") if seen.parsed is not None else None
    return list(names or ())


def _path(module: str) -> list[str]:
    """The module and every module that contains it."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _is_listed(module: str, names: Iterable[str]) -> bool:
    """Whether peft counts a module among the named ones: it, or one that contains it, ends as a name does."""
    return any(path.endswith(name) for name in names for path in _path(module))


def _name(module: str, seen: View) -> str:
    """The name to list: the head that peft would list, or the module's own."""
    head = next((h for h in seen.heads if _is_listed(module, [h])), None)
    return head or module


def _flat(modules: dict[str, list[str]]) -> list[Any]:
    return [key for keys in modules.values() for key in keys]


RULES: tuple[Rule, ...] = (
    NOT_SAVED,
    DEFAULT_HEAD,
    BASE_NOT_SAVED,
    UNLISTED,
    UNLISTED_HEAD,
    IGNORED,
    TOKENS,
    BAD_BIAS,
    NO_BIASES,
    TWICE,
)
CHECKERS: tuple[Checker, ...] = (listed, unlisted, tokens, biases)
