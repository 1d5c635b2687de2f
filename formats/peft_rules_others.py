"""Rules about a PEFT config beside tensors that another format names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

from adapterops_formats.peft_rules_fields import OTHER_TYPE

from adapterops.plugin import METHODS, AlphaIn, Certainty, Reading
from adapterops.validation.registry import Checker, checker
from adapterops.validation.rule import Finding, Rule, Severity
from adapterops.validation.subject import Subject

UNREAD_CONFIG = Rule(
    "C220",
    "config-not-read",
    Severity.INFO,
    why="The tensors' names are those of a format whose readers ask for no config: peft, which reads the config, finds none "
    "of its own tensors beside it.",
    remedy="For peft convert the weights, and take the config that comes with them: adapterops convert FOLDER --to peft. "
    "For the readers of the tensors nothing is amiss.",
    fires='"peft_type": "LORA", "r": 16, "lora_alpha": 16 beside diffusion_model.….lora_A.weight',
    passes='"peft_type": "LORA" beside base_model.model.….lora_A.weight',
    source="peft 0.21 utils/save_and_load.py (set_peft_model_state_dict); diffusion-pipe models/*.py (save_adapter)",
)
_OWN = "base_model."
"""How peft's keys begin."""


@checker(OTHER_TYPE, UNREAD_CONFIG)
def other_names(subject: Subject) -> Iterator[Finding]:
    """A PEFT folder whose tensors have another format's names: an error where peft is to load it, or where it decides."""
    recognised, config = subject.recognised, subject.config
    if recognised is None or config is None or "peft_type" not in config or recognised[0].is_folder:
        return
    reading = recognised[1]
    claim = next((c for c in reading.claims if c.suffix.method != "saved"), None)
    if claim is None:
        return
    named = f"{claim.key!r} and the other tensors are named as {reading.dialect.title} names them"
    remedy = "Convert the weights, and take the config that comes with them: adapterops convert FILE --to peft."
    strength = _other_strength(subject, config)
    if "peft" in subject.options.targets or not _is_wholly_anothers(reading):
        yield OTHER_TYPE.found(
            subject.weights,
            f"{named}, and peft, whose config is beside them, looks for base_model.model.… only: it finds none",
            remedy=remedy,
        )
    elif strength:
        yield OTHER_TYPE.found(
            subject.weights,
            f"{named}, whose readers take no config and apply scale 1; the config beside them says {strength}",
            remedy="Find out which was trained. If it was the config's, write it into the file: adapterops convert FOLDER "
            f"--to {reading.dialect.name} --alpha X{'' if reading.dialect.alpha is AlphaIn.TENSOR else ' --fold-alpha'}.",
            field="lora_alpha",
        )
    else:
        yield UNREAD_CONFIG.found(subject.weights, f"{named}, whose readers take no config; peft finds none of them")


def _is_wholly_anothers(reading: Reading) -> bool:
    """Whether every key has what only the other format puts before a module's name."""
    places = {claim.place for claim in reading.claims}
    return (
        not reading.unclaimed and not any(p.bare or p.prefix.startswith(_OWN) for p in places) and reading.prefix != ""
    )


def _other_strength(subject: Subject, config: Mapping[str, Any]) -> str:
    """The scale in the config, in words, where the file says none and readers assume another; "" where they agree."""
    assumed = [u for u in subject.updates if u.alpha is not None and u.alpha.certainty is Certainty.ASSUMED]
    alpha = config.get("lora_alpha", config.get("alpha"))
    ranks = [rank for u in assumed if (rank := METHODS[u.method].rank(u))]
    if not ranks or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        return ""
    rslora = config.get("use_rslora") is True
    other = [rank for rank in ranks if not _is_one(alpha, rank, rslora)]
    if not other:
        return ""
    return f"alpha {alpha:g} at rank {other[0]}{' and use_rslora' if rslora else ''}, which is another scale"


def _is_one(alpha: float, rank: int, rslora: bool) -> bool:
    return abs(alpha - (sqrt(rank) if rslora else rank)) <= 1e-6 * rank


RULES: tuple[Rule, ...] = (UNREAD_CONFIG,)
CHECKERS: tuple[Checker, ...] = (other_names,)
