"""Model cards, licences, and what the header says of the file.

Cards are asked of folders and repositories, never of a lone file.  Sources: huggingface_hub `repocard_data.py`
(`ModelCardData`), peft 0.21 `peft_model.py` (`create_or_update_model_card`), kohya-ss/sd-scripts `library/train_util.py`,
https://github.com/Stability-AI/ModelSpec.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from adapterops.validation import hashes
from adapterops.validation.registry import checker
from adapterops.validation.rule import Change, Finding, Needs, Rule, Severity, several
from adapterops.validation.rules.card_texts import TEMPLATE, front_matter
from adapterops.validation.subject import Subject

CARD = "README.md"

NO_CARD = Rule(
    "D601",
    "no-model-card",
    Severity.INFO,
    why="Without a README.md nobody learns what the adapter was trained on, for which base, and how to use it.",
    remedy="Write a README.md that begins with a front matter of base_model, library_name, license and tags.",
    fires="a folder of adapter_config.json and adapter_model.safetensors only",
    passes="the same folder with a README.md",
    needs=Needs.FILES,
)
BROKEN_FRONT_MATTER = Rule(
    "D602",
    "broken-front-matter",
    Severity.WARNING,
    why="The Hub refuses a card whose front matter is no YAML, or shows it without base model, licence and tags.",
    remedy="Correct the lines between the two --- of README.md; values with a colon or a # need quotes.",
    fires="a README.md that begins with ---, then license: apache-2.0: yes",
    passes="a README.md that begins with ---, then license: apache-2.0, then ---",
    needs=Needs.FILES,
    source="huggingface_hub repocard.py (RepoCard.content)",
)
NO_FRONT_MATTER = Rule(
    "D603",
    "no-front-matter",
    Severity.INFO,
    why="A card without front matter tells programs nothing: no search by base model finds the adapter.",
    remedy="Begin README.md with ---, lines of base_model, library_name, license and tags, and ---.",
    fires="a README.md whose first line is # My adapter",
    passes="a README.md whose first line is ---",
    needs=Needs.FILES,
    source="huggingface_hub repocard_data.py (ModelCardData)",
)
NO_BASE = Rule(
    "D604",
    "card-without-base-model",
    Severity.INFO,
    why="The Hub lists an adapter under its base model only where the card's front matter names it.",
    remedy="Add base_model: OWNER/NAME to the front matter of README.md.",
    fires="a front matter of license: mit only",
    passes="a front matter with base_model: meta-llama/Llama-3.2-1B",
    needs=Needs.FILES,
    source="huggingface_hub repocard_data.py (ModelCardData)",
)
OTHER_BASE = Rule(
    "D605",
    "card-names-another-base",
    Severity.WARNING,
    why="Whoever follows the card loads another base model than the one that the config names.",
    remedy="Make base_model in README.md and base_model_name_or_path in adapter_config.json the same repository.",
    fires="base_model: gpt2 in README.md, openai-community/gpt2-large in the config",
    passes="base_model: openai-community/gpt2 in both",
    needs=Needs.FILES,
)
NO_LICENSE = Rule(
    "D606",
    "no-license",
    Severity.INFO,
    why="Without a licence nobody else may use the adapter, strictly speaking.",
    remedy="Add license: NAME to the front matter (that of the base model often binds), or license: other with license_name.",
    fires="a front matter without license",
    passes="a front matter with license: apache-2.0",
    needs=Needs.FILES,
    source="huggingface_hub repocard_data.py (ModelCardData)",
)
NO_TAGS = Rule(
    "D607",
    "no-library-or-tags",
    Severity.INFO,
    why="The Hub takes from library_name and tags how an adapter is loaded and where it is listed.",
    remedy="Add library_name: peft (or diffusers) and tags: [lora] to the front matter of README.md.",
    fires="a front matter with neither library_name nor tags",
    passes="a front matter with library_name: peft and tags: [lora]",
    needs=Needs.FILES,
    source="peft 0.21 peft_model.py (create_or_update_model_card)",
)
TEMPLATE_CARD = Rule(
    "D608",
    "untouched-template-card",
    Severity.INFO,
    why="The card is the template that a library writes when it saves, and says nothing of this adapter.",
    remedy=f"Fill in what is known and take out the sections that still say {TEMPLATE}.",
    fires=f"a README.md with {TEMPLATE} in twenty places",
    passes="a README.md that says what the adapter does, with one open point",
    needs=Needs.FILES,
    source="peft 0.21 peft_model.py (create_or_update_model_card)",
)
UNTOLD_TRIGGER = Rule(
    "D609",
    "untold-trigger-words",
    Severity.INFO,
    why="The header knows the words that call what was trained, and the card keeps them from its readers.",
    remedy="Name the words in README.md.",
    fires="modelspec.trigger_phrase = ohwx man in the header, a README.md without ohwx man",
    passes="the same header, and a README.md that says: Trigger word: ohwx man",
    needs=Needs.FILES,
    source="https://github.com/Stability-AI/ModelSpec; kohya-ss/sd-scripts library/train_util.py (ss_tag_frequency)",
)
WRONG_HASH = Rule(
    "D620",
    "wrong-model-hash",
    Severity.WARNING,
    why="User interfaces and sites find a file by sshs_model_hash, and this one leads to another file, or to none.",
    remedy="Run adapterops validate --fix, which writes the hash of the bytes that are there.",
    fires="a file whose tensors were edited after training and whose sshs_model_hash was kept",
    passes="a file whose sshs_model_hash is the SHA-256 of everything behind its header",
    needs=Needs.TENSORS,
    fixable=True,
    source="kohya-ss/sd-scripts library/train_util.py (addnet_hash_safetensors)",
)
PRIVATE_PATH = Rule(
    "D621",
    "private-path",
    Severity.INFO,
    why="The header tells the world a path of the machine that trained it, with a person's name in it as a rule.",
    remedy="Run adapterops validate --fix, which leaves the last part of the path.",
    fires="ss_sd_model_name = /home/jane/models/sd15.safetensors",
    passes="ss_sd_model_name = sd15.safetensors",
    fixable=True,
    source="kohya-ss/sd-scripts train_network.py (metadata)",
)

_REPO = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")
_ABSOLUTE = re.compile(r"(/(home|Users|mnt|media|run/media|Volumes)/|[A-Za-z]:[\\/]|~[\\/]|\\{2,4}[\w.-]+\\)")
"""How paths begin that lead into somebody's home or onto his disks; those of rented machines (/workspace/…) tell nothing."""
_PATHS = (
    "ss_sd_model_name",
    "ss_vae_name",
    "ss_train_data_dir",
    "ss_reg_data_dir",
    "ss_output_dir",
    "ss_output_name",
    "ss_network_weights",
    "ss_dataset_dirs",
    "ss_reg_dataset_dirs",
    "ss_datasets",
    "ss_network_args",
    "ss_training_comment",
)
_LONGEST = 2_000_000
"""Characters of a header's JSON that are parsed."""
_FEW = 5


@checker(NO_CARD, BROKEN_FRONT_MATTER, NO_FRONT_MATTER, NO_BASE, OTHER_BASE, NO_LICENSE, NO_TAGS, TEMPLATE_CARD)
def card(subject: Subject) -> Iterator[Finding]:
    """The card of a folder."""
    # A subfolder that is one component of an adapter has its card where the others have theirs.
    if not subject.is_folder or subject.source is None or subject.source.component:
        return
    path = os.path.join(subject.place.folder.path, CARD)
    text = subject.text(CARD)
    if text is None:
        if CARD not in subject.files:  # else it could not be read, which is told already
            yield NO_CARD.found(subject.path, "the folder has no README.md (the model card)")
        return
    if (left := text.count(TEMPLATE)) >= _FEW:
        yield TEMPLATE_CARD.found(path, f"the card still says {TEMPLATE} in {left} places")
    fields = front_matter(text)
    if isinstance(fields, str):
        yield BROKEN_FRONT_MATTER.found(path, f"the front matter is no YAML: {fields}")
    elif fields is None:
        yield NO_FRONT_MATTER.found(path, "the card has no front matter (lines between --- and --- at its beginning)")
    else:
        yield from _fields(subject, path, fields)


def _fields(subject: Subject, path: str, fields: Mapping[str, Any]) -> Iterator[Finding]:
    named = [value for value in _listed(fields.get("base_model")) if value]
    own = (subject.config or {}).get("base_model_name_or_path")
    if not named:
        yield NO_BASE.found(path, "the front matter names no base_model", field="base_model")
    elif isinstance(own, str) and _REPO.fullmatch(own) and "/" in own and not any(_same(own, n) for n in named):
        yield OTHER_BASE.found(
            path, f"the card's base_model is {several(named)}, the config's {own[:120]!r}", field="base_model"
        )
    if not any(_listed(fields.get("license"))):
        yield NO_LICENSE.found(path, "the front matter names no license", field="license")
    missing = [name for name in ("library_name", "tags") if not any(_listed(fields.get(name)))]
    if missing:
        yield NO_TAGS.found(path, f"the front matter has no {' and no '.join(missing)}", field=missing[0])


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str)]


def _same(own: str, named: str) -> bool:
    """Whether two names of a base are one; a name without an owner is the same as that name with one."""
    one, other = own.lower(), named.lower().rstrip("/").removeprefix("https://huggingface.co/")
    return one == other or ("/" not in other and one.rpartition("/")[2] == other)


@checker(UNTOLD_TRIGGER)
def trigger_words(subject: Subject) -> Iterator[Finding]:
    """Trigger words of the header that the card beside the file does not name."""
    words = _triggers(subject.metadata)
    text = subject.text(CARD) if words else None
    if text is None:
        return
    told = " ".join(text.lower().replace("\\", "").split())
    if not any(" ".join(word.lower().replace("\\", "").split()) in told for word in words):
        field = "modelspec.trigger_phrase" if "modelspec.trigger_phrase" in subject.metadata else "ss_tag_frequency"
        yield UNTOLD_TRIGGER.found(
            subject.weights, f"the header has {several(words)} as trigger words; README.md names none", field=field
        )


def _triggers(metadata: Mapping[str, str]) -> list[str]:
    """What the header calls trigger words, else the tags that stand on every image of a dataset."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return [phrase]
    tags, folders = _object(metadata.get("ss_tag_frequency")), _object(metadata.get("ss_dataset_dirs"))
    out: list[str] = []
    for name, counts in tags.items():
        folder = folders.get(name)
        images = folder.get("img_count") if isinstance(folder, dict) else None
        if isinstance(counts, dict) and isinstance(images, int) and images > 1:
            out += [tag for tag, count in counts.items() if count == images]
    return list(dict.fromkeys(tag.strip() for tag in out if tag.strip()))


def _object(text: str | None) -> dict[str, Any]:
    if text is None or len(text) > _LONGEST:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@checker(WRONG_HASH)
def wrong_hash(subject: Subject) -> Iterator[Finding]:
    """A recorded hash that is not that of the bytes."""
    said = hashes.recorded(subject.metadata)
    if said is None or not subject.tensors or subject.leftover:  # what training left over counts, and is not among them
        return
    found = hashes.model_hash(subject.tensors)
    if found is not None and found != said:
        yield WRONG_HASH.found(
            subject.weights,
            f"{hashes.KEY} is {said[:12]}…, the bytes behind the header have {found[:12]}…",
            field=hashes.KEY,
            change=Change("write the hash of the tensors into the header", metadata={hashes.KEY: found}),
        )


@checker(PRIVATE_PATH)
def private_paths(subject: Subject) -> Iterator[Finding]:
    """Paths of the trainer's machine in the header."""
    told = {name: subject.metadata[name] for name in _PATHS if name in subject.metadata}
    private = {name: match for name, text in told.items() if (match := _private(text)) is not None}
    if not private:
        return
    name, path = next(iter(private.items()))
    more = f", and {several(list(private)[1:])} too" if len(private) > 1 else ""
    # Only an entry that is a path and nothing else has a last part that says the same.
    whole = {key: re.split(r"[\\/]", told[key].rstrip("\\/"))[-1] for key in private if _is_path(told[key])}
    change = Change(f"leave the last part of the paths in {several(whole)}", metadata=whole) if whole else None
    yield PRIVATE_PATH.found(subject.weights, f"{name} tells the path {path[:120]!r}{more}", field=name, change=change)


def _is_path(text: str) -> bool:
    return _ABSOLUTE.match(text) is not None and not any(c in text for c in '\n{}"')


def _private(text: str) -> str | None:
    if _is_path(text):
        return text
    # In JSON every text stands in quotes, and in comments paths stand between spaces.
    for word in _quoted(text[:_LONGEST]):
        if _ABSOLUTE.match(word):
            return word
    return None


def _quoted(text: str) -> Iterable[str]:
    return re.split(r'["\s,;=]+', text)


RULES: tuple[Rule, ...] = (
    NO_CARD,
    BROKEN_FRONT_MATTER,
    NO_FRONT_MATTER,
    NO_BASE,
    OTHER_BASE,
    NO_LICENSE,
    NO_TAGS,
    TEMPLATE_CARD,
    UNTOLD_TRIGGER,
    WRONG_HASH,
    PRIVATE_PATH,
)
CHECKERS = (card, trigger_words, wrong_hash, private_paths)
