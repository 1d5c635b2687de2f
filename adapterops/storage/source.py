"""What a path holds: tensors, header metadata, and the JSON config that stands beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

from adapterops.errors import AdapterOpsError, NotAnAdapter, UnreadableFile, UnsafePickle
from adapterops.storage import foreign, safetensors
from adapterops.storage.folder import NOT_FETCHED, Folder, LocalFolder, named
from adapterops.storage.regular import open_regular
from adapterops.storage.tensor import LazyTensor
from adapterops.storage.training_state import without_state

CONFIG_NAME = "adapter_config.json"
FOLDER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
HUB = "hf://"
INDEX_SUFFIX = ".safetensors.index.json"
FOLDER_INDEX = "adapter_model" + INDEX_SUFFIX
OTHER_WEIGHTS = ("adapters.safetensors", "adapters.npz")
"""What mlx-lm calls an adapter beside its `adapter_config.json`, and its numbered checkpoints after it."""
HUB_WEIGHTS = ("pytorch_adapter.bin", "adapter.safetensors")
"""What AdapterHub's library calls an adapter beside its `adapter_config.json`; the model's head stands in a file of its own."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".lora")
"""The last may be safetensors as well: its first bytes tell."""
_MAX_CONFIG = 10_000_000
"""Bytes.  A config that lists a pattern for each of 10,000 modules has two."""
_MAX_VALUES = 500_000
"""Values in a config or an index, which take many times their text in memory."""
WEIGHTS_SUFFIXES = (".safetensors", *_PICKLES, ".npz", ".gguf")


@dataclass(frozen=True, slots=True)
class Source:
    """An opened input.  `parts` holds one source a subfolder where a folder keeps its components apart.

    `path` is what the user named, on this disk or on the Hub; the tensors' own sources name the files that are read.
    """

    path: str
    tensors: Mapping[str, LazyTensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    config_path: str = ""
    parts: Mapping[str, Source] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    component: str = ""
    """The subfolder's name, for a part."""
    whole: bool = True
    """Whether the tensors are all that their file holds (a checkpoint has more, of which the notes tell)."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """What of that more is plain data: where a trainer keeps its settings."""
    folder: Folder | None = None
    """Where the weights stand."""

    @property
    def size(self) -> int:
        """Bytes of tensors, parts included."""
        return sum(t.nbytes for t in self.tensors.values()) + sum(p.size for p in self.parts.values())

    @property
    def key_count(self) -> int:
        """The number of tensors, parts included."""
        return len(self.tensors) + sum(p.key_count for p in self.parts.values())

    @contextmanager
    def settings(self, name: str) -> Iterator[tuple[str, str] | None]:
        """A trainer's own settings beside the weights: the file's path on this disk, and what messages call it.

        None where there is no such file.  Raises `UnreadableFile` for one that cannot be fetched.
        """
        if self.folder is None or not _has_file(self.folder, name):
            yield None
            return
        with named(self.folder, name) as path:
            yield path, os.path.join(self.folder.path, name)


class _Parts(Mapping[str, Source]):
    """The sources of subfolders, each opened (and downloaded) when it is asked for, not when it is counted."""

    def __init__(self, folder: Folder, names: list[str]) -> None:
        self._folder, self._names = folder, names
        self._opened: dict[str, Source] = {}

    def __getitem__(self, name: str) -> Source:
        if name not in self._opened:
            if name not in self._names:
                raise KeyError(name)
            self._opened[name] = replace(_open_folder(self._folder.folder(name)), component=name)
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Weights(NamedTuple):
    """What one file, or one set of shards, holds."""

    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()
    whole: bool = True
    beside: Mapping[str, Any] = {}


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a file, a folder, or what stands at `hf://owner/repo[@revision][/path]`.

    Reads headers only (a pickle is memory-mapped); from the Hub the chosen files are downloaded whole.

    Raises `UnreadableFile` and its kin for what cannot be read, `NotAnAdapter` for a folder without weights,
    `UsageError` for an hf:// name that is none.
    """
    path = os.fspath(path)
    if path.startswith(HUB):
        from adapterops.storage import hub

        place, file = hub.locate(path)
        if file:
            return _open_file(place, file)
        try:
            return _open_folder(place)
        except NotAnAdapter as error:
            raise NotAnAdapter(f"{error}{place.candidates()}") from error
    if os.path.isdir(path):
        return _open_folder(LocalFolder(path))
    if not os.path.lexists(path):
        lost = f"; to name the Hub give a string, a Path turns {HUB} into hf:/" if path.startswith("hf:/") else ""
        raise UnreadableFile(f"{path}: no such file or folder{lost}")
    return _open_file(LocalFolder(os.path.dirname(path)), os.path.basename(path))


def open_in(folder: Folder, name: str = "", tell: Callable[[AdapterOpsError], None] | None = None) -> Source:
    """Open a file of a folder, or the one adapter that the folder is.

    With `tell`, what is wrong with the config beside the weights is told to it, and the weights are opened without one.

    Raises what `open_source` raises.
    """
    return _open_file(folder, name, tell) if name else _open_folder(folder, tell)


def shards_beside(folder: Folder, names: Iterable[str]) -> set[str]:
    """Those of a folder's names that are shards of an index beside them."""
    indexes = [n for n in names if n.endswith(INDEX_SUFFIX)]
    shards: set[str] = set()
    for name in indexes:
        from adapterops.storage.sharded import files_of

        try:
            shards.update(files_of(os.path.join(folder.path, name), _read_index_json(folder, name)).values())
        except AdapterOpsError:
            continue  # told of when the index itself is opened
    return shards


def stem(path: str) -> str:
    """The name of a source without its weights' suffix: what a file made from it is called after."""
    if path.startswith(HUB):
        from adapterops.storage import hub

        name = hub.parse(path)
        last = os.path.basename(name.path) or name.repo.partition("/")[2]
    else:
        path = os.path.abspath(path)
        last = os.path.basename(path)
        if os.path.isdir(path):
            return last
        if not last.endswith(INDEX_SUFFIX):
            return os.path.splitext(last)[0]
    for suffix in (INDEX_SUFFIX, *WEIGHTS_SUFFIXES):
        if last.lower().endswith(suffix) and last.lower() != suffix:
            return last[: -len(suffix)]
    return last


def _open_file(folder: Folder, name: str, tell: Callable[[AdapterOpsError], None] | None = None) -> Source:
    path = os.path.join(folder.path, name)
    if name.endswith(INDEX_SUFFIX):
        weights = _read_index(folder, name)
    else:
        weights = _read_file(folder, name)
        if name.endswith(".safetensors"):
            weights = weights._replace(notes=(*weights.notes, *_alone(folder, name)))
    notes = (*folder.notes, *weights.notes)
    source = Source(
        path,
        weights.tensors,
        weights.metadata,
        notes=notes,
        whole=weights.whole,
        beside=weights.beside,
        folder=folder,
    )
    # peft writes the two side by side under fixed names; any other file does not own the config next to it.
    fixed = name in (*FOLDER_WEIGHTS, FOLDER_INDEX, *OTHER_WEIGHTS, *HUB_WEIGHTS) or _is_checkpoint(name)
    if fixed and _has_file(folder, CONFIG_NAME):
        config = _read_config(folder, tell)
        config_path = os.path.join(folder.path, CONFIG_NAME) if config is not None else ""
        return replace(source, config=config, config_path=config_path)
    return source


def _is_checkpoint(name: str) -> bool:
    number, _, rest = name.partition("_")
    return number.isdecimal() and rest in OTHER_WEIGHTS


def _has_file(folder: Folder, name: str) -> bool:
    if isinstance(folder, LocalFolder):  # which may be entered though it cannot be listed
        return os.path.isfile(folder.fetch(name))
    return name in folder.names() and not folder.is_folder(name)


def _alone(folder: Folder, name: str) -> tuple[str, ...]:
    """Notes on a file that was named by itself.  Raises `UnreadableFile` where an index says it is a part."""
    from adapterops.storage import sharded

    index = _covering(folder, name)
    if index is not None:
        raise UnreadableFile(
            f"{os.path.join(folder.path, name)}: is one shard of several, as {index} beside it says; name that index, "
            "or the folder",
            fault="shard",
        )
    return sharded.number_note(name)


def _covering(folder: Folder, name: str) -> str | None:
    from adapterops.storage import sharded

    return sharded.covering(folder, name, lambda index: _read_index_json(folder, index))


def _read_config(folder: Folder, tell: Callable[[AdapterOpsError], None] | None = None) -> dict[str, Any] | None:
    try:
        with named(folder, CONFIG_NAME) as path:
            return read_json(path)
    except AdapterOpsError as error:
        if tell is None:
            raise
        if error.fault != NOT_FETCHED:
            error.fault = "config-unreadable"
        tell(error)
        return None


def _read_index_json(folder: Folder, name: str) -> dict[str, Any]:
    from adapterops.storage.sharded import MAX_INDEX

    with named(folder, name) as path:
        return read_json(path, MAX_INDEX)


def _read_index(folder: Folder, name: str) -> _Weights:
    from adapterops.storage import sharded

    def shard(name: str) -> tuple[Mapping[str, LazyTensor], Mapping[str, str]]:
        return _read_file(folder, name)[:2]

    return _Weights(*sharded.read(folder, name, _read_index_json(folder, name), shard))


def _read_file(folder: Folder, name: str) -> _Weights:
    part = folder.ranges(name)
    if part is not None:
        with part.reader() as file:
            kind = _kind(part.path, file.read(16) or b"")
        if kind is _Kind.SAFETENSORS:
            with part.reader() as file:
                weights = _Weights(*safetensors.read_header_from(file, part.size, part))
            part.expect((t.start, t.start + t.nbytes) for t in weights.tensors.values())
            return weights
        if kind is _Kind.GGUF:
            from adapterops.storage import gguf_file

            with part.reader() as file:
                gguf_file.check(file, part.size, part.path)  # a model is refused before it is downloaded
    with named(folder, name) as path:
        return _read_weights(path)


class _Kind(Enum):
    SAFETENSORS = "safetensors"
    NPZ = "npz"
    PICKLE = "pickle"
    GGUF = "gguf"


def _read_weights(path: str) -> _Weights:
    descriptor, _ = open_regular(path)
    try:
        with open(descriptor, "rb", buffering=0) as file:
            head = file.read(16)
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}") from error
    kind = _kind(path, head)
    if kind is _Kind.NPZ:
        from adapterops.storage import npz

        return _Weights(*npz.read(path))
    if kind is _Kind.GGUF:
        from adapterops.storage import gguf_file

        return _Weights(*gguf_file.read(path))
    if kind is _Kind.PICKLE:
        from adapterops.storage import pickle  # with it come zip archives, and torch when it reads

        return _Weights(*pickle.read(path))
    return _Weights(*safetensors.read_header(path))


def _kind(path: str, head: bytes) -> _Kind:
    """How weights are read, by their file's name and first bytes.  Raises for what is plainly something else."""
    suffix = os.path.splitext(path)[1].lower()
    if not head:
        raise UnreadableFile(f"{path}: the file is empty; download it again", fault="empty-file")
    if head.startswith(b"version https:/"):
        raise UnreadableFile(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`", fault="lfs-pointer")
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        raise UnreadableFile(
            f"{path}: is a web page (a log-in page or an error?); download the file again", fault="web-page"
        )
    if head.startswith(b"GGUF"):
        return _Kind.GGUF
    if suffix not in (".safetensors", ".npz"):
        foreign.refuse(path, head)
    if suffix == ".npz":
        return _Kind.NPZ
    if suffix == ".json" and head.lstrip()[:1] in (b"{", b"["):
        _refuse_pickle_as_text(path)
        raise NotAnAdapter(f"{path}: is a JSON file, not weights; name the weights or their folder")
    if suffix in _PICKLES[:-1] or (suffix != ".safetensors" and (head[:2] == b"PK" or head[:1] == b"\x80")):
        return _Kind.PICKLE
    return _Kind.SAFETENSORS


def _refuse_pickle_as_text(path: str) -> None:
    """Raise `UnsafePickle` for a JSON object one of whose values is a pickle in base64 (soft prompts are shared so)."""
    try:
        value = read_json(path) if os.path.isfile(path) else {}
    except UnreadableFile:
        return  # what it is then is for the caller to say
    for name, text in value.items():
        if isinstance(text, str) and text.startswith("gA") and _is_pickle_in_base64(text):
            raise UnsafePickle(
                f"{path}: refused: the field {name[:80]!r} holds a pickle as text, as mkultra saves soft prompts, and "
                "loading one can run code. Load it where it came from, and save the tensor as .safetensors (a prompt of "
                "PEFT under the key prompt_embeddings, beside an adapter_config.json)"
            )


def _is_pickle_in_base64(text: str) -> bool:
    from base64 import b64decode

    try:
        data = b64decode(text, validate=True)
    except ValueError:
        return False
    return data[:1] == b"\x80" and 2 <= data[1] <= 5 and data.endswith(b".")


def _open_folder(folder: Folder, tell: Callable[[AdapterOpsError], None] | None = None) -> Source:
    names = folder.names()
    if CONFIG_NAME not in names:
        foreign.refuse(folder.path)
    # Names with a dot in front are other programs' (macOS keeps `._NAME` beside NAME on foreign disks).
    visible = [n for n in names if not n.startswith(".")]
    chosen, notes = _choose(folder, names, visible)
    if chosen:
        config = _read_config(folder, tell) if CONFIG_NAME in names else None
        config_path = os.path.join(folder.path, CONFIG_NAME) if config is not None else ""
        weights = _read_index(folder, chosen) if chosen.endswith(INDEX_SUFFIX) else _read_file(folder, chosen)
        notes = (*folder.notes, *notes, *weights.notes)
        return Source(
            folder.path,
            weights.tensors,
            weights.metadata,
            config,
            config_path,
            notes=notes,
            whole=weights.whole,
            beside=weights.beside,
            folder=folder,
        )
    parts = [n for n in visible if folder.is_folder(n) and _holds_weights(folder.folder(n))]
    if parts:
        return Source(folder.path, parts=_Parts(folder, parts))
    foreign.refuse_any(folder.path, visible)
    lone = CONFIG_NAME in names
    what = f"has {CONFIG_NAME} but no weights ({' or '.join(FOLDER_WEIGHTS)})" if lone else "holds no weights"
    what += f" ({notes[0]})" if notes else ""
    raise NotAnAdapter(f"{folder.path}: {what}", fault="no-weights" if lone else "no-adapter")


def _choose(folder: Folder, names: list[str], visible: list[str]) -> tuple[str, tuple[str, ...]]:
    """The one file or index of a folder that is its adapter ("" where there is none), and notes."""
    present = [name for name in (*FOLDER_WEIGHTS, FOLDER_INDEX) if name in names]
    if len(present) > 1:
        if FOLDER_INDEX in present and _covering(folder, present[0]) == FOLDER_INDEX:
            return FOLDER_INDEX, ()
        return present[0], tuple(f"{present[0]} is read and {name} is not, as peft does" for name in present[1:])
    if present:
        return present[0], _beside(present[0], visible)
    indexes = [n for n in visible if n.endswith(INDEX_SUFFIX)]
    shards: set[str] = set()
    if indexes:
        from adapterops.storage.sharded import files_of

        for name in indexes:
            shards.update(files_of(os.path.join(folder.path, name), _read_index_json(folder, name)).values())
    weights = [n for n in visible if os.path.splitext(n)[1].lower() in WEIGHTS_SUFFIXES and n not in shards] + indexes
    weights, state = without_state(weights)
    left = (f"{', '.join(state)}: by the name what a trainer keeps to go on with; not read",) if state else ()
    last = next((name for name in OTHER_WEIGHTS if name in weights), "")
    if last and all(name == last or _is_checkpoint(name) for name in weights):
        return last, (*(f"{last} is read; {name}, a checkpoint, is not" for name in weights if name != last), *left)
    hubs = [name for name in HUB_WEIGHTS if name in weights and CONFIG_NAME in names]
    if hubs:
        return hubs[0], (*_beside(hubs[0], visible), *left)
    if len(weights) > 1:
        raise NotAnAdapter(f"{folder.path}: holds several weight files ({', '.join(weights)}); name one of them")
    return (weights[0] if weights else ""), left


_FEW = 3
"""Files that a note names."""


def _beside(chosen: str, visible: list[str]) -> tuple[str, ...]:
    """A note on other weights of the folder: trainers keep a projector, a head or a tower there that was trained as well."""
    index = chosen.endswith(INDEX_SUFFIX)
    weights = [n for n in visible if os.path.splitext(n)[1].lower() in WEIGHTS_SUFFIXES and n != chosen]
    others = [name for name in without_state(weights)[0] if not (index and name.startswith("adapter_model-"))]
    if not others:
        return ()
    more = f" and {len(others) - _FEW} more" if len(others) > _FEW else ""
    stand = "stands" if len(others) == 1 else "stand"
    return (
        f"{', '.join(others[:_FEW])}{more} {stand} beside {chosen}; what is in there is no part of the adapter as read",
    )


def _holds_weights(folder: Folder) -> bool:
    names = folder.names()
    return any(name in names for name in (*FOLDER_WEIGHTS, FOLDER_INDEX))


def read_json(path: str, limit: int = _MAX_CONFIG) -> dict[str, Any]:
    """A JSON object from `path`.  Raises `UnreadableFile` where it is not one, names a field twice, or is too long."""
    descriptor, (_, _, size, _) = open_regular(path)
    with open(descriptor, "rb") as file:
        if size > limit:
            raise UnreadableFile(f"{path}: {size} bytes are too many for a config; is it one?", fault="json-size")
        try:
            text = file.read()
        except OSError as error:
            raise UnreadableFile(f"{path}: {error.strerror}") from error
    if sum(map(text.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise UnreadableFile(f"{path}: holds more than {_MAX_VALUES} values; is it a config?", fault="json-size")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=safetensors.no_duplicates)
        # What was read must be writable again; JSON can spell half a character, no file can hold it.
        json.dumps(value, ensure_ascii=False).encode()
    except safetensors.Duplicate as error:
        raise UnreadableFile(
            f"{path}: names the field {error.args[0][:200]!r} twice; remove one", fault="json"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UnreadableFile(f"{path}: is not JSON: {reason[:200]}", fault="json") from error
    if not isinstance(value, dict):
        raise UnreadableFile(f"{path}: must be a JSON object, not a {type(value).__name__}", fault="json")
    return value
