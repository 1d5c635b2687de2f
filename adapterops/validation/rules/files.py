"""Files and their names: what loaders look for, what stands beside it, and shards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from adapterops.errors import AdapterOpsError
from adapterops.storage.folder import LocalFolder
from adapterops.storage.sharded import number_note
from adapterops.storage.source import CONFIG_NAME, FOLDER_INDEX, FOLDER_WEIGHTS, HUB_WEIGHTS, INDEX_SUFFIX, open_in
from adapterops.storage.tensor import LazyTensor, same_bytes
from adapterops.storage.training_state import is_training_state, without_state
from adapterops.validation.discover import is_weights
from adapterops.validation.registry import Checker, by_fault, checker
from adapterops.validation.rule import Change, Finding, Needs, Rule, Severity, several
from adapterops.validation.rules.container import NOT_AN_ADAPTER, PICKLES, take
from adapterops.validation.subject import Subject, in_words

_PEFT = "peft 0.21 utils/save_and_load.py (load_peft_weights)"

OTHER_NAME = Rule(
    "F040",
    "name-not-looked-for",
    Severity.ERROR,
    why="peft looks for adapter_model.safetensors and adapter_model.bin in a folder, and for nothing else.",
    remedy="Rename the weights to adapter_model.safetensors; shards are written as one file by `adapterops convert FOLDER "
    "--to peft`.",
    fires="adapter_config.json with model.safetensors, or with adapter_model.safetensors.index.json",
    passes="adapter_config.json with adapter_model.safetensors",
    fixable=True,
    source=_PEFT,
)
NO_WEIGHTS = Rule(
    "F041",
    "missing-weights",
    Severity.ERROR,
    why="The folder has the config of an adapter and no weights, so that there is nothing to load.",
    remedy="Add adapter_model.safetensors: an upload may have left it out, or .gitignore may name it.",
    fires="a folder with adapter_config.json and README.md",
    passes="a folder with adapter_config.json and adapter_model.safetensors",
    faults=("no-weights",),
    source=_PEFT,
)
NO_ADAPTER = Rule(
    "F042",
    "no-adapter-here",
    Severity.ERROR,
    why="Nothing in the folder, or below it, is called as weights are, so that nothing was checked.",
    remedy="Name the folder or the file that holds the adapter.",
    fires="a folder with README.md and train.py",
    passes="a folder with lora.safetensors, or with a folder that has it",
    faults=("no-adapter",),
)
LONE_SHARD = Rule(
    "F043",
    "lone-shard",
    Severity.ERROR,
    why="By its name the file is one of several, and without the others and their index part of the adapter is missing.",
    remedy="Put all shards and their index into one folder and name that index; or save the adapter as one file.",
    fires="lora-00001-of-00002.safetensors by itself",
    passes="lora-00001-of-00002.safetensors, lora-00002-of-00002.safetensors and lora.safetensors.index.json",
    faults=("shard",),
)
MISSING_SHARD = Rule(
    "F044",
    "missing-shard",
    Severity.ERROR,
    why="The index names a file that is not there, and with it the tensors that it holds.",
    remedy="Download or upload the missing shards, or save the adapter as one file.",
    fires="an index that names lora-00002-of-00002.safetensors, which is not beside it",
    passes="an index beside all the files that it names",
    faults=("missing-shard",),
)
OUTSIDE = Rule(
    "F045",
    "path-outside-folder",
    Severity.ERROR,
    why="An index that names a path could make a loader read any file of the machine; only plain names of files beside it "
    "are taken.",
    remedy="Write plain file names into `weight_map`; if the index is a stranger's, do not load it.",
    fires='"weight_map": {"a": "../../.ssh/id_rsa"}',
    passes='"weight_map": {"a": "lora-00001-of-00002.safetensors"}',
    faults=("outside",),
)
INDEX = Rule(
    "F046",
    "index-disagrees",
    Severity.ERROR,
    why="Index and shards tell different tensors, so that loaders miss some or refuse the whole.",
    remedy="Download index and shards again from one revision, or save the adapter as one file.",
    fires='an index that places "a" in lora-00001-of-00002.safetensors, which has no "a"',
    passes="an index that places each tensor in the shard that has it",
    faults=("index", "json"),
    source="huggingface_hub serialization/_torch.py",
)
LINK = Rule(
    "F047",
    "link-outside-folder",
    Severity.WARNING,
    why="A link that leaves the folder is published as a link: who downloads or clones it gets a name without a file.",
    remedy="Copy the file into the folder in place of the link (`cp -L`).",
    fires="adapter_model.safetensors -> /home/me/runs/7/adapter_model.safetensors",
    passes="adapter_model.safetensors -> ../../blobs/4f2a…, as in huggingface_hub's cache",
)
TWO_FILES = Rule(
    "F048",
    "two-trainings",
    Severity.WARNING,
    why="A .bin and a .safetensors of one name hold different tensors, and which of them is loaded depends on the loader.",
    remedy="Keep the one that is meant and delete the other; peft and diffusers take the .safetensors.",
    fires="pytorch_lora_weights.bin and .safetensors of two trainings",
    passes="pytorch_lora_weights.bin and .safetensors with the same tensors",
    needs=Needs.TENSORS,
    source=f"{_PEFT}; diffusers 0.42 loaders/lora_base.py (_fetch_state_dict)",
)
UNREAD = Rule(
    "F049",
    "unread-weights",
    Severity.INFO,
    why="Weights beside adapter_model are read by no adapter loader: a head, an output or a base model that the user must "
    "know of.",
    remedy="Say in the model card what it is for, or leave it out.",
    fires="classifier.pt beside adapter_model.safetensors",
    passes="adapter_model.safetensors with the head in it (modules_to_save)",
)
TRAINING = Rule(
    "F050",
    "training-state",
    Severity.INFO,
    why="A trainer's state is twice the adapter's size, of no use to who loads it, and a pickle besides.",
    remedy="Delete it from what is published; keep it where you train.",
    fires="optimizer.pt, scheduler.pt and rng_state.pth beside adapter_model.safetensors",
    passes="adapter_config.json, adapter_model.safetensors and README.md",
    source="transformers 5 trainer.py; accelerate 1.15 checkpointing.py",
)
INTERMEDIATE = Rule(
    "F051",
    "intermediate-checkpoint",
    Severity.INFO,
    why="A state from the midst of the training stands beside the final one, and who downloads all may load the wrong one.",
    remedy="Publish the final file only, or say in the model card what the others are for.",
    fires="0000100_adapters.safetensors beside adapters.safetensors",
    passes="adapters.safetensors",
    source="mlx-lm tuner/trainer.py; sd-scripts library/train_util.py (EPOCH_FILE_NAME, STEP_FILE_NAME)",
)

_STEPS = (
    (re.compile(r"\d{7}_(adapters\.safetensors)"), "{}"),
    (re.compile(r"(.+)-(?:step)?(?:\d{6}|\d{8})\.safetensors"), "{}.safetensors"),
    (re.compile(r"(.+)_\d{9}\.safetensors"), "{}.safetensors"),
)
"""Names of intermediate states, and those of the final ones."""
_CHECKPOINT = re.compile(r"checkpoint-\d+")


@lru_cache(maxsize=2)
def _weights(files: tuple[str, ...]) -> list[str]:
    """A folder's files that may be an adapter's weights."""
    return [n for n in files if is_weights(n) and not n.startswith(".") and not is_training_state(n)]


@lru_cache(maxsize=2)
def _left(files: tuple[str, ...]) -> list[str]:
    """A folder's files that hold a trainer's state."""
    return [n for n in files if is_training_state(n)]


@checker(OTHER_NAME)
def other_name(subject: Subject) -> Iterable[Finding]:
    """Weights that peft does not find."""
    if subject.config is None or "peft_type" not in subject.config or any(n in subject.files for n in FOLDER_WEIGHTS):
        return
    if subject.weights.endswith(FOLDER_INDEX):
        yield OTHER_NAME.found(subject.weights, "peft does not read shards, and finds no weights in this folder")
        return
    name = subject.place.name
    if not name or name.endswith(INDEX_SUFFIX) or number_note(name):
        return
    if subject.recognised is None or subject.recognised[0].name != "peft":
        return
    new = FOLDER_WEIGHTS[0] if name.endswith(".safetensors") else FOLDER_WEIGHTS[1]
    change = Change(f"rename {name} to {new}", rename=new) if _weights(subject.files) == [name] else None
    yield OTHER_NAME.found(
        subject.weights, f"peft looks for {' and '.join(FOLDER_WEIGHTS)}, and does not find {name}", change=change
    )


@checker(LONE_SHARD)
def lone_shard(subject: Subject) -> Iterable[Finding]:
    """One of several files, by its name."""
    if subject.place.name and subject.source is not None:
        for note in number_note(subject.place.name):
            yield LONE_SHARD.found(subject.weights, note)


@checker(LINK)
def link(subject: Subject) -> Iterable[Finding]:
    """Links that lead out of a folder of several files."""
    folder = subject.place.folder
    if not isinstance(folder, LocalFolder) or not (subject.is_folder or subject.place.name.endswith(INDEX_SUFFIX)):
        return
    paths = dict.fromkeys([subject.weights, *(tensor.source.path for tensor in subject.tensors.values())])
    if subject.config is not None:
        paths[subject.config_path] = None
    home = os.path.realpath(folder.path)
    for path in paths:
        if os.path.islink(path):
            real = os.path.realpath(path)
            cached = os.path.basename(os.path.dirname(real)) == "blobs"
            if not cached and os.path.commonpath([home, real]) != home:
                yield LINK.found(path, f"is a link to {real}, which is not in the folder")


@checker(TWO_FILES)
def two_files(subject: Subject) -> Iterable[Finding]:
    """A pickle and a safetensors file of one name."""
    if subject.is_folder:
        other, first = FOLDER_WEIGHTS[1], FOLDER_WEIGHTS[0]
        if other not in subject.files or subject.weights != os.path.join(subject.path, first):
            return
    else:
        stem, suffix = os.path.splitext(subject.place.name)
        other, first = subject.place.name, f"{stem}.safetensors"
        if suffix.lower() not in PICKLES or first not in subject.files or subject.source is None:
            return
    path = os.path.join(subject.place.folder.path, other)
    try:
        old = subject.tensors if not subject.is_folder else open_in(subject.place.folder, other).tensors
    except AdapterOpsError as error:  # nobody else looks at it
        yield by_fault()[error.fault].found(path, in_words(error, path), error.keys)
        return
    try:
        new = subject.tensors if subject.is_folder else open_in(subject.place.folder, first).tensors
    except AdapterOpsError:  # told of where that file itself is examined
        return
    difference = _difference(old, new) if new else ""
    if difference:
        yield TWO_FILES.found(path, f"is not what {first} beside it is: {difference}")


def _difference(old: Mapping[str, LazyTensor], new: Mapping[str, LazyTensor]) -> str:
    """How the tensors of two files differ; "" where they do not."""
    if old.keys() != new.keys():
        alone = [key for key in old if key not in new], [key for key in new if key not in old]
        names = several([*alone[0], *alone[1]])
        return f"{len(alone[0])} tensors stand only in it, and {len(alone[1])} only in the other ({names})"
    other = [key for key, tensor in old.items() if not same_bytes(tensor, new[key])]
    return f"{len(other)} of {len(old)} tensors have other values ({several(other)})" if other else ""


@checker(UNREAD, NOT_AN_ADAPTER)
def unread(subject: Subject) -> Iterable[Finding]:
    """What is no adapter, beside one, is told of less loudly."""
    name = subject.place.name
    known = (*FOLDER_WEIGHTS, *(HUB_WEIGHTS if CONFIG_NAME in subject.files else ()))
    weights = next((other for other in known if other in subject.files), "")
    if name and not weights:
        adapters, left = without_state([n for n in subject.files if is_weights(n)])
        weights = adapters[0] if adapters and name in left else ""
    if name and weights and name not in known:
        subject.adapter  # noqa: B018  # whose faults are told now
        for error in take(subject, "not-an-adapter"):
            text = in_words(error, subject.weights, subject.path)
            yield UNREAD.found(subject.weights, f"stands beside {weights} and is no adapter: {text}")


@checker(TRAINING)
def training(subject: Subject) -> Iterable[Finding]:
    """What trainers keep to go on."""
    left = _left(subject.files)
    # Once a folder, however many adapters it holds.
    if (
        left
        and subject.source is not None
        and (subject.is_folder or _weights(subject.files)[:1] == [subject.place.name])
    ):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        yield TRAINING.found(
            os.path.join(subject.place.folder.path, left[0]),
            f"{left[0]}{more} beside the adapter: the state of a trainer",
        )


@checker(INTERMEDIATE)
def intermediate(subject: Subject) -> Iterable[Finding]:
    """States of a training beside its last one."""
    name, folder = subject.place.name, subject.place.folder
    for pattern, final in _STEPS:
        match = pattern.fullmatch(name)
        if match and final.format(match[1]) in subject.files:
            yield INTERMEDIATE.found(
                subject.weights,
                f"by its name a state from the midst of the training of {final.format(match[1])} beside it",
            )
            return
    if not name and isinstance(folder, LocalFolder):
        above, own = os.path.split(os.path.abspath(folder.path))
        if _CHECKPOINT.fullmatch(own) and any(os.path.isfile(os.path.join(above, n)) for n in FOLDER_WEIGHTS):
            yield INTERMEDIATE.found(subject.path, f"is a checkpoint of the adapter in {above}")


RULES: tuple[Rule, ...] = (
    OTHER_NAME,
    NO_WEIGHTS,
    NO_ADAPTER,
    LONE_SHARD,
    MISSING_SHARD,
    OUTSIDE,
    INDEX,
    LINK,
    TWO_FILES,
    UNREAD,
    TRAINING,
    INTERMEDIATE,
)
CHECKERS: tuple[Checker, ...] = (
    unread,
    other_name,
    lone_shard,
    link,
    two_files,
    training,
    intermediate,
)
