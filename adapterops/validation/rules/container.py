"""Containers: what opening a file tells, and how weights are packed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from adapterops.errors import AdapterOpsError
from adapterops.storage.safetensors import NullMetadata
from adapterops.validation.registry import Checker, checker
from adapterops.validation.rule import Change, Finding, Rule, Severity
from adapterops.validation.subject import Subject, in_words

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files that torch.save wrote."""
_FORMAT = "safetensors README, section Format, and safetensors/src/tensor.rs"

UNREADABLE = Rule(
    "F001",
    "unreadable-file",
    Severity.ERROR,
    why="No loader can load what cannot be opened, or what is of no known kind.",
    remedy="Make it an ordinary file that this user may read, or download it again.",
    fires="adapter_model.safetensors is a link to a file that is not there",
    passes="adapter_model.safetensors is a file, or a link to one",
    faults=("unreadable",),
)
BAD_HEADER = Rule(
    "F002",
    "bad-header",
    Severity.ERROR,
    why="safetensors refuses a file whose header is not the JSON object that its format asks for.",
    remedy="Download the file again; if it is so at its source, save it there again with safetensors.torch.save_file.",
    fires='{"a": {"dtype": "F32", "shape": [1]}}: an entry without data_offsets',
    passes='{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    faults=("header",),
    source=_FORMAT,
)
EMPTY = Rule(
    "F003",
    "empty-file",
    Severity.ERROR,
    why="A file of no bytes holds no weights: a download or an upload did not begin.",
    remedy="Download it again, or upload it again from where it was trained.",
    fires="adapter_model.safetensors of 0 bytes",
    passes="adapter_model.safetensors of 2 MB",
    faults=("empty-file",),
)
CUT_SHORT = Rule(
    "F004",
    "cut-short",
    Severity.ERROR,
    why="Part of the file is missing or damaged, and every loader refuses it.",
    remedy="Download it again and compare its size and SHA-256 with those that the Hub shows.",
    fires="a header whose tensors take 2,000,000 bytes, and 1,048,576 bytes behind it",
    passes="as many bytes behind the header as its tensors take",
    faults=("cut-short",),
    source=_FORMAT,
)
LFS_POINTER = Rule(
    "F005",
    "lfs-pointer",
    Severity.ERROR,
    why="The repository was cloned without Git LFS, so a note of 130 bytes stands where the weights should be.",
    remedy="Run `git lfs install && git lfs pull` in the clone, or download with `hf download`.",
    fires="adapter_model.safetensors begins with `version https://git-lfs.github.com/spec/v1`",
    passes="adapter_model.safetensors begins with the length of its header",
    faults=("lfs-pointer",),
    source="git-lfs docs/spec.md",
)
NOT_WEIGHTS = Rule(
    "F006",
    "text-for-weights",
    Severity.ERROR,
    why="A web page or a text stands where the weights should be: a log-in page, an error, a placeholder.",
    remedy="Open the file to read what it says, then download it again (with a token where the repository asks for one).",
    fires="adapter_model.safetensors begins with `<!DOCTYPE html>`",
    passes="adapter_model.safetensors begins with the length of its header",
    faults=("web-page", "text"),
)
HEADER_SIZE = Rule(
    "F007",
    "huge-header",
    Severity.ERROR,
    why="A header or index beyond 16 MB (or of a million values) is no adapter's, and would ask for many times its size in "
    "memory.",
    remedy="Look at what fills it, a long string in `__metadata__` most likely, and save the tensors without that.",
    fires="a header of 90 MB with a training log in `__metadata__`",
    passes="a header of 300 KB with sd-scripts' lists of tags",
    faults=("header-size", "json-size"),
    source="safetensors itself refuses headers beyond 100 MB (MAX_HEADER_SIZE in safetensors/src/tensor.rs)",
)
DUPLICATE = Rule(
    "F008",
    "duplicate-keys",
    Severity.ERROR,
    why="Of two tensors with one name a loader takes one and drops the other without a word.",
    remedy="Save the file again from a state dict, in which a name stands once.",
    fires='{"a": {…}, "a": {…}}',
    passes='{"a": {…}, "b": {…}}',
    faults=("duplicate",),
    source="RFC 8259 section 4; safetensors/src/tensor.rs (HashMetadata)",
)
WRONG_SUFFIX = Rule(
    "F009",
    "wrong-suffix",
    Severity.ERROR,
    why="Loaders choose their reader by the file's suffix: safetensors' reader takes no pickle, and torch.load takes no "
    "safetensors file.",
    remedy="Give the file the suffix of what it is.",
    fires="adapter_model.bin, written by safetensors.torch.save_file",
    passes="adapter_model.safetensors, written by safetensors.torch.save_file",
    fixable=True,
    faults=("wrong-suffix",),
    source="peft 0.21 utils/save_and_load.py (load_peft_weights)",
)
UNSAFE_PICKLE = Rule(
    "F010",
    "unsafe-pickle",
    Severity.ERROR,
    why="Whoever loads the file with pickle or an old torch runs what it names; torch.load refuses it since version 2.6.",
    remedy="Do not load it unless you know who made it; ask them for the plain state dict as .safetensors.",
    fires="adapter_model.bin whose pickle calls os.system('…')",
    passes="adapter_model.bin whose pickle names torch._utils._rebuild_tensor_v2 and collections.OrderedDict only",
    faults=("unsafe-pickle",),
    source="torch 2.13 _weights_only_unpickler.py",
)
PICKLE = Rule(
    "F011",
    "pickle",
    Severity.WARNING,
    why="Loading a pickle can run code, so it asks every user for trust, and readers of safetensors alone cannot load it.",
    remedy="Run `adapterops validate --fix`, which writes the same tensors as .safetensors.",
    fires="adapter_model.bin",
    passes="adapter_model.safetensors",
    fixable=True,
    source="peft 0.21 peft_model.py (safe_serialization=True by default since 0.7)",
)
TORCHSCRIPT = Rule(
    "F012",
    "torchscript",
    Severity.ERROR,
    why="A TorchScript program is code with weights in it, and no adapter loader runs it.",
    remedy="Load it where it was made and save its state_dict() as .safetensors.",
    fires="lora.pt, written by torch.jit.save",
    passes="lora.pt, written by torch.save(state_dict)",
    faults=("torchscript",),
)
COMPRESSED = Rule(
    "F013",
    "repacked-archive",
    Severity.ERROR,
    why="torch.save stores tensors as they are so that they can be mapped into memory; an archive that was unpacked and "
    "packed again is read wrongly or not at all.",
    remedy="Load it where it came from and save it again, best as .safetensors.",
    fires="adapter_model.bin whose entry archive/data/0 is deflated",
    passes="adapter_model.bin as torch.save wrote it",
    faults=("compressed",),
    source="torch 2.13 serialization.py (mmap=True); numpy/lib/_npyio_impl.py",
)
BOMB = Rule(
    "F014",
    "bomb",
    Severity.ERROR,
    why="The file claims far more than it holds, and a loader that believes it runs out of memory or time.",
    remedy="Delete it; no trainer writes such a file.",
    fires="a pickle of 2 KB whose tensor has 10^12 elements, all the same one",
    passes="a pickle in which two names share one tensor",
    faults=("bomb",),
)
ENCODED_PICKLE = Rule(
    "F015",
    "encoded-pickle",
    Severity.WARNING,
    why="Tensors that stand in a JSON file as the text of a pickle are read by pickle.loads, which runs whatever a stranger "
    "put there.",
    remedy="Load it once where you trust it, and publish the tensor as .safetensors.",
    fires='soft_prompt.json with "tensor": "gASVgz0AAAAAAACMDHRvcmNo…"',
    passes='soft_prompt.json with "shape": [10, 768] beside soft_prompt.safetensors',
)
NOT_AN_ADAPTER = Rule(
    "F020",
    "not-an-adapter",
    Severity.ERROR,
    why="The file is sound, but an embedding, a model's own weights or a trainer's state, and no adapter loader takes it.",
    remedy="Name or publish the adapter's own file; what is no adapter belongs into another repository or folder.",
    fires="learned_embeds.safetensors with '<style>' [1, 768]",
    passes="lora.safetensors with pairs of lora_down.weight and lora_up.weight",
    faults=("not-an-adapter",),
)
UNSUPPORTED = Rule(
    "F021",
    "not-converted",
    Severity.INFO,
    why="adapterops knows the format by name and does not read it, so only the file's container and values were checked.",
    remedy="Nothing need be done; `adapterops formats` lists those that are checked in full.",
    fires="lora_unet_….a1.weight, .a2.weight, .b1.weight and .b2.weight: GLoRA, as LyCORIS saves it",
    passes="base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [8, 64]",
    faults=("unsupported",),
)
TWO_DIALECTS = Rule(
    "F022",
    "two-dialects",
    Severity.ERROR,
    why="A loader reads the keys of one dialect and drops the others, so that half of the adapter is missing.",
    remedy="Save each dialect's keys as a file of their own; adapterops merge makes one adapter of the two.",
    fires="lora_unet_….lora_down.weight and unet.….lora_A.weight in one file",
    passes="lora_unet_….lora_down.weight and lora_te_….lora_down.weight in one file",
    faults=("mixture",),
)
UNCLAIMED = Rule(
    "F023",
    "unknown-keys",
    Severity.ERROR,
    why="Keys that belong to no part of the format are dropped or refused by its loaders, and what they hold is lost.",
    remedy="Find out what wrote them; rename them as the format spells them, or save the adapter without them.",
    fires="lora_unet_….lora_down.weight beside step_count",
    passes="lora_unet_….lora_down.weight, .lora_up.weight and .alpha",
    faults=("unclaimed",),
)
DTYPE = Rule(
    "F030",
    "unknown-dtype",
    Severity.ERROR,
    why="safetensors refuses the whole file for one tensor of a type that it does not know.",
    remedy="Save the tensor as float32, float16 or bfloat16.",
    fires='"dtype": "F128"',
    passes='"dtype": "BF16"',
    faults=("dtype",),
    source=_FORMAT,
)
SHAPE = Rule(
    "F031",
    "bad-shape",
    Severity.ERROR,
    why="The shape and type of a tensor do not account for the bytes that it is given, so that no loader can read it.",
    remedy="Download the file again; if it is so at its source, save it there again.",
    fires='"dtype": "F32", "shape": [1000000000], "data_offsets": [0, 4]',
    passes='"dtype": "F32", "shape": [1], "data_offsets": [0, 4]',
    faults=("shape",),
    source=_FORMAT,
)
OFFSETS = Rule(
    "F032",
    "bad-offsets",
    Severity.ERROR,
    why="The place of a tensor's bytes is no place: negative, no number, or ending before it begins.",
    remedy="Download the file again; if it is so at its source, save it there again.",
    fires='"data_offsets": [-4, 0]',
    passes='"data_offsets": [0, 4]',
    faults=("offsets",),
    source=_FORMAT,
)
OVERLAP = Rule(
    "F033",
    "overlapping-tensors",
    Severity.ERROR,
    why="Two tensors claim the same bytes, which safetensors refuses: one of them holds the other's values.",
    remedy="Save the file again with safetensors.torch.save_file, which gives each tensor bytes of its own.",
    fires='"a": {…, "data_offsets": [0, 8]}, "b": {…, "data_offsets": [4, 12]}',
    passes='"a": {…, "data_offsets": [0, 8]}, "b": {…, "data_offsets": [8, 16]}',
    faults=("overlap",),
    source=_FORMAT,
)
GAP = Rule(
    "F034",
    "gap-between-tensors",
    Severity.ERROR,
    why="Bytes between two tensors belong to none; safetensors refuses them, since anything could hide there.",
    remedy="Save the file again with safetensors.torch.save_file.",
    fires='"a": {…, "data_offsets": [0, 8]}, "b": {…, "data_offsets": [16, 24]}',
    passes='"a": {…, "data_offsets": [0, 8]}, "b": {…, "data_offsets": [8, 16]}',
    faults=("gap",),
    source=_FORMAT,
)
TRAILING = Rule(
    "F035",
    "trailing-bytes",
    Severity.ERROR,
    why="Bytes behind the last tensor belong to none, and safetensors refuses the file for them.",
    remedy="Download the file again: two downloads may have been written into one. Or save it again.",
    fires="a header whose tensors take 400 bytes, and 412 bytes behind it",
    passes="a header whose tensors take 400 bytes, and 400 bytes behind it",
    faults=("trailing",),
    source=_FORMAT,
)
NULL_METADATA = Rule(
    "F036",
    "null-metadata",
    Severity.INFO,
    why="The format's description has strings in `__metadata__`; null, which MLX writes, is taken by the reference reader "
    "and refused by stricter ones.",
    remedy="Run `adapterops validate --fix`, which writes the header without it.",
    fires='{"__metadata__": null, "a": {…}}',
    passes='{"a": {…}}',
    fixable=True,
    source="mlx/io/safetensors.cpp; safetensors README, section Format",
)
METADATA = Rule(
    "F037",
    "metadata-not-strings",
    Severity.ERROR,
    why="safetensors takes nothing but strings in `__metadata__` and refuses the whole file for a number there.",
    remedy="Save the file again with every value as a string (json.dumps of it, say).",
    fires='{"__metadata__": {"epoch": 3}}',
    passes='{"__metadata__": {"epoch": "3"}}',
    faults=("metadata",),
    source=_FORMAT,
)
UNUSABLE_NAME = Rule(
    "F038",
    "unusable-name",
    Severity.ERROR,
    why="A name or a string that no safetensors file can hold: half a Unicode character, or the reserved `__metadata__`.",
    remedy="Rename the tensor, or save the header's string anew.",
    fires='{"lora\\ud800.weight": {…}}',
    passes='{"lora\\ud83d\\ude00.weight": {…}}: both halves of one character',
    faults=("not-unicode", "reserved-name"),
    source=_FORMAT,
)
ODD_TENSOR = Rule(
    "F039",
    "odd-tensor",
    Severity.ERROR,
    why="Sparse tensors, tensors without bytes and types that are no plain numbers cannot be used as an adapter's weights.",
    remedy="Save it as a plain (dense) tensor of float32, float16 or bfloat16.",
    fires="adapter_model.bin with a sparse_coo tensor, or one on the meta device",
    passes="adapter_model.bin with tensors of torch.float16",
    faults=("odd-tensor",),
)

_MAX_JSON = 32 << 20
_ENCODED = re.compile(rb'"gA[I-X][A-Za-z0-9+/]{20,}={0,2}"')
"""Base64 of the first bytes of a pickle of protocol 2 to 5, and what follows."""
_TORCH_BYTES = re.compile(r"torch\.storage\._load_from_bytes")
"""What a tensor's own pickle calls: torch.load of the bytes that it is given, which are looked at too."""


def take(subject: Subject, fault: str) -> list[AdapterOpsError]:
    """The faults of one kind, which are told by the caller from now on."""
    taken = [error for error in subject.faults if error.fault == fault]
    subject.faults[:] = [error for error in subject.faults if error.fault != fault]
    return taken


@checker(WRONG_SUFFIX)
def wrong_suffix(subject: Subject) -> Iterable[Finding]:
    """A file called as another kind; a safetensors file can be renamed without another look."""
    for error in take(subject, "wrong-suffix"):
        text = in_words(error, subject.weights, subject.path)
        new = os.path.splitext(os.path.basename(subject.weights))[0] + ".safetensors"
        change = None
        if text.startswith("is a safetensors file") and new not in subject.files:
            change = Change(f"rename {os.path.basename(subject.weights)} to {new}", rename=new)
        yield WRONG_SUFFIX.found(subject.weights, text, change=change)


@checker(PICKLE)
def pickle(subject: Subject) -> Iterable[Finding]:
    """Weights that torch.save wrote."""
    name = os.path.basename(subject.weights)
    if not name.lower().endswith(PICKLES) or not subject.tensors:
        return
    subject.adapter  # noqa: B018  # what is no adapter need not be one in safetensors
    if any(error.fault in NOT_AN_ADAPTER.faults for error in subject.faults):
        return
    new = os.path.splitext(name)[0] + ".safetensors"
    whole = subject.source is None or subject.source.whole
    change = Change(f"write {name} as {new}", rewrite=True) if whole and new not in subject.files else None
    remedy = "" if change else f"{new} stands beside it; where that is the same adapter, delete this one."
    if not whole:
        remedy = (
            f"Run `adapterops convert {name} --to peft` (or another format): a checkpoint holds more than the adapter."
        )
    yield PICKLE.found(
        subject.weights,
        f"is a pickle: tensors only ({len(subject.tensors)} of them), but no safetensors file",
        remedy=remedy,
        change=change,
    )


@checker(NULL_METADATA)
def null_metadata(subject: Subject) -> Iterable[Finding]:
    """A header that says null."""
    if isinstance(subject.metadata, NullMetadata):
        change = Change("write the header without its null", rewrite=True)
        yield NULL_METADATA.found(
            subject.weights,
            "`__metadata__` in the header is null, not a table of strings",
            field="__metadata__",
            change=change,
        )


@checker(ENCODED_PICKLE, UNSAFE_PICKLE)
def encoded_pickle(subject: Subject) -> Iterable[Finding]:
    """Pickles in the text of a JSON file."""
    if not subject.place.name.lower().endswith(".json") or subject.source is not None:
        return
    for raw in encoded(subject):
        import base64

        from adapterops.storage.pickle_scan import scan_bytes

        data = base64.b64decode(raw)
        found = scan_bytes(data, reads=_TORCH_BYTES)
        if found.damage or found.bomb:
            continue
        for fault in ("not-an-adapter", "unsafe-pickle"):
            take(subject, fault)  # told of here, by what the pickle does
        what = f"holds a pickle of {len(data)} bytes as text"
        if found.does:
            yield UNSAFE_PICKLE.found(subject.path, f"{what}, and loading it would {found.does}")
        else:
            yield ENCODED_PICKLE.found(subject.path, f"{what}: a tensor, and nothing else")
        return


def encoded(subject: Subject) -> Iterable[bytes]:
    """The base64 of what may be pickles in the JSON file that the subject is."""
    try:
        with open(subject.place.folder.fetch(subject.place.name), "rb") as file:
            text = file.read(_MAX_JSON)
    except (OSError, AdapterOpsError):
        return
    for match in _ENCODED.finditer(text):
        raw = match[0].strip(b'"').rstrip(b"=")
        raw = raw[:-1] if len(raw) % 4 == 1 else raw  # six bits alone are no byte
        yield raw + b"=" * (-len(raw) % 4)


RULES: tuple[Rule, ...] = (
    UNREADABLE,
    BAD_HEADER,
    EMPTY,
    CUT_SHORT,
    LFS_POINTER,
    NOT_WEIGHTS,
    HEADER_SIZE,
    DUPLICATE,
    WRONG_SUFFIX,
    UNSAFE_PICKLE,
    PICKLE,
    TORCHSCRIPT,
    COMPRESSED,
    BOMB,
    ENCODED_PICKLE,
    NOT_AN_ADAPTER,
    UNSUPPORTED,
    TWO_DIALECTS,
    UNCLAIMED,
    DTYPE,
    SHAPE,
    OFFSETS,
    OVERLAP,
    GAP,
    TRAILING,
    NULL_METADATA,
    METADATA,
    UNUSABLE_NAME,
    ODD_TENSOR,
)
CHECKERS: tuple[Checker, ...] = (wrong_suffix, pickle, null_metadata, encoded_pickle)
