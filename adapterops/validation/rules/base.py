"""Modules against the base model, and the base model against what the file says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from adapterops import registry
from adapterops.adapter import Certainty
from adapterops.architectures import load
from adapterops.architectures.declared import FIELDS, IN_CONFIG, named
from adapterops.dialects.read import Request
from adapterops.errors import AdapterOpsError
from adapterops.validation.registry import Checker, checker
from adapterops.validation.rule import Finding, Needs, Rule, Severity
from adapterops.validation.subject import Subject

UNKNOWN_MODULE = Rule(
    "B301",
    "unknown-module",
    Severity.ERROR,
    why="The base model has no module of that name, so a loader drops the tensors or refuses the file.",
    remedy="If the base is another model, name it with --arch or --base; if the keys are botched, adapterops convert --rename "
    "PATTERN=REPLACEMENT repairs them.",
    fires="lora_unet_down_blocks_7_attentions_0_…_to_q beside modules of Stable Diffusion 1.5, which has 4 down blocks",
    passes="lora_unet_down_blocks_0_attentions_0_…_to_q",
    faults=("unknown-module",),
)
OTHER_SHAPE = Rule(
    "B302",
    "other-shape",
    Severity.ERROR,
    why="The factors make a change of another shape than the module's weight has, so a loader fails or skips the module.",
    remedy="If the base is another model (another size of the same family, say), name it with --arch or --base.",
    fires="…attn2_to_k with lora_down [4, 1024] (Stable Diffusion 2) beside modules of Stable Diffusion 1.5, where it takes 768",
    passes="…attn2_to_k with lora_down [4, 768]",
    faults=("other-shape",),
)
UNKNOWN_BASE = Rule(
    "B303",
    "unknown-base",
    Severity.INFO,
    why="The names belong to some base model that adapterops does not know, or to a text encoder of which it has no table, so "
    "neither names nor shapes could be checked.",
    remedy="Name the base: --arch NAME (adapterops architectures lists them), or --base with its config.json, its weights or its "
    "pipeline's folder.",
    fires="lora_unet_some_block_q.lora_down.weight",
    passes="lora_unet_down_blocks_0_attentions_0_…_to_q.lora_down.weight",
    faults=("unknown-architecture",),
)
OTHER_BASE = Rule(
    "B304",
    "other-base",
    Severity.ERROR,
    why="The config, header or card declares one base model and the modules are another's, so whoever follows the declaration "
    "loads the adapter into a model that it does not fit.",
    remedy="Correct the declaration, or put the file where it belongs.",
    fires='"modelspec.architecture": "stable-diffusion-xl-v1-base/lora" beside modules of Stable Diffusion 1.5',
    passes='"modelspec.architecture": "stable-diffusion-v1/lora" beside the same',
    needs=Needs.FILES,
)

_CARD_BASE = re.compile(r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?[\"']?([^\s\"'#]+)", re.MULTILINE)


@checker(OTHER_BASE)
def declared(subject: Subject) -> Iterator[Finding]:
    """The identified base model against every declaration."""
    adapter = subject.adapter
    if adapter is None or not adapter.architecture.value:
        return
    fact = adapter.architecture
    if fact.certainty is not Certainty.DERIVED and not (fact.certainty is Certainty.ASSUMED and fact.others):
        return  # the user's word, or nothing but a guess
    found = [fact.value or "", *(other or "" for other in fact.others)]
    for place, file, value in _declarations(subject):
        said = named(value)
        if said and not set(found) & set(said) and not any(_spelled_for(subject, name) for name in said):
            yield OTHER_BASE.found(
                file,
                f"{place} is {value[:80]!r} ({said[0]}), but the modules and their shapes are those of {' or '.join(found)}",
                field=place,
            )
            return


def _spelled_for(subject: Subject, base: str) -> bool:
    """Whether the keys may as well be the modules of another built-in base model, in another spelling."""
    if subject.source is None:
        return False
    architecture = load(base)
    try:
        form, reading = registry.recognise(subject.source, None, architecture)
        form.read(subject.source, reading, Request(architecture, repair=True))
    except AdapterOpsError:
        return False
    return True


def _declarations(subject: Subject) -> Iterator[tuple[str, str, str]]:
    """What the config, the header and the card call the base: the field, the file, the name."""
    base = (subject.config or {}).get(IN_CONFIG)
    if isinstance(base, str):
        yield IN_CONFIG, subject.config_path, base
    for field in FIELDS:
        if field in subject.metadata:
            yield field, subject.weights, subject.metadata[field]
    card = subject.text("README.md") if subject.is_folder else None
    if card is not None and card.startswith("---"):
        match = _CARD_BASE.search(card.partition("\n---")[0])
        if match:
            yield "base_model", f"{subject.place.folder.path}/README.md", match[1]


RULES: tuple[Rule, ...] = (UNKNOWN_MODULE, OTHER_SHAPE, UNKNOWN_BASE, OTHER_BASE)
CHECKERS: tuple[Checker, ...] = (declared,)
